"""What a bundle computes, as checksums: run on two commits, it shows whether anything changed.

    python benchmarks/identity.py out/ --write before.json      # on one commit
    python benchmarks/identity.py out/ --compare before.json    # on the other

Fixed, random and scored policies over prompts of 1, 37 and 600 tokens: logits to the bit, paths,
tokens and text. Everything runs twice, the second time on two threads at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import dash_onnx

PROMPTS = (1, 37, 600)
NEW = 24  # tokens after each prompt
MESSAGES = [{"role": "user", "content": "What does a lighthouse keeper do at night?"}]


def policies(model: Any) -> list[dict[str, Any]]:
    """Options of the generations to compare."""
    manifest = model.manifest
    layers = manifest.model.num_layers
    precisions = manifest.variants
    mixed = ",".join([precisions[0], f"{precisions[-1]}*{layers - 3}", "skip", precisions[-1]])
    found = [{"policy": name} for name in (*precisions, f"static:{mixed}", "random:1", "random:2")]
    if manifest.scorer is not None:
        found += [{"policy": "dash", "budget": name} for name in sorted(manifest.scorer.presets)]
    return found


def decoded(model: Any, ids: list[int], prompt: int, options: dict[str, Any]) -> list[Any]:
    """Checksum of the logits after each decoded token, and its path."""
    policy = model.policy(**options)
    if hasattr(model, "score"):
        scored = model.score(ids, prompt_tokens=prompt, policy=policy)
        rows = ((token.logits, token.path) for token in scored)
    else:  # before `score` there was
        rows = model.teacher_forced(ids, policy, prompt)
    return [[checksum(logits), "".join(action[-1] for action in path)] for logits, path in rows]


def checksum(array: np.ndarray) -> str:
    """Of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def case(model: Any, options: dict[str, Any], length: int) -> dict[str, Any]:
    """All that is compared for one policy and one length of the prompt."""
    rng = np.random.default_rng(length)
    ids = rng.integers(0, model.manifest.model.vocab_size, length).tolist()
    steps = list(model.generate_step(ids, max_new_tokens=NEW, ignore_eos=True, **options))
    tokens = [step.token for step in steps]
    return {
        "options": options,
        "prompt": length,
        "tokens": tokens,
        "paths": ["".join(action[-1] for action in step.path) for step in steps],
        "decoded": decoded(model, ids + tokens, length, options),
        "logits": checksum(model.logits(ids[:64], **options)),
        "text": model.generate(MESSAGES, max_new_tokens=NEW, **options) if length == 1 else "",
        "drawn": model.generate("A ship", max_new_tokens=8, temperature=0.8, seed=3, **options),
    }


def main() -> None:
    """Writes or compares the checksums; exit code 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE")
    what.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = dash_onnx.load(arguments.bundle, threads=arguments.threads)
    cases = [(options, length) for options in policies(model) for length in PROMPTS]
    found = [case(model, *one) for one in tqdm(cases, disable=None)]
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda one: case(model, *one), cases))
    differ = [one for one, a, b in zip(cases, found, again, strict=True) if a != b]
    if arguments.write:
        arguments.write.write_text(json.dumps(found))
    else:
        before = json.loads(arguments.compare.read_text("utf-8"))
        differ += [one for one, a, b in zip(cases, before, found, strict=True) if a != b]
    print(f"{len(cases)} cases, {len(differ)} differ", *differ, sep="\n")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
