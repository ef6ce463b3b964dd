"""What a prompt's precision costs: KL of the first token of answers to chats.

    dash-export MODEL out/
    dash-export MODEL reference/ --variants full --effort none
    python benchmarks/first_token.py out/ reference/ --prompts chats.jsonl

Prints, for each precision, the mean over chats of KL(full || precision) in nats, its standard
error, the largest, and how many first tokens are another one. `default` is a prompt under `int4`
without `--prefill`: in the wide form where that is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

import dash_onnx
from dash_onnx.bench.prompts import read_prompts
from dash_onnx.core.actions import Action
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.statistics import kl_divergence, log_softmax, standard_error
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GREEDY

LogProbs: TypeAlias = npt.NDArray[np.float64]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("reference", type=Path, help="a bundle of the same model that has `full`")
    parser.add_argument("--prompts", type=Path, required=True, help="as of dash-bench")
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    arguments = parser.parse_args()
    prompts = read_prompts(arguments.prompts)[: arguments.chats]
    ours, reference = dash_onnx.load(arguments.bundle), dash_onnx.load(arguments.reference)
    chats = [ours.text.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    wanted = [first(reference, ids, "full", "full") for ids in chats]
    runs: dict[str, tuple[Action, Action | None]] = {a: (a, a) for a in ours.manifest.variants}
    if ours.manifest.wide is not None and "int4" in runs:
        runs["default"] = "int4", None
    rows = []
    for precision, run in runs.items():
        found = [first(ours, ids, *run) for ids in chats]
        kl = np.concatenate([kl_divergence(*pair) for pair in zip(wanted, found, strict=True)])
        others = sum(int(p.argmax() != q.argmax()) for p, q in zip(wanted, found, strict=True))
        facts = {
            "precision": precision,
            "chats": len(chats),
            "kl": round(float(kl.mean()), 5),
            "kl_stderr": round(standard_error(kl.tolist()), 5),
            "kl_max": round(float(kl.max()), 5),
            "other_first_token": others,
        }
        rows.append(facts)
        if not arguments.json:
            print(json.dumps(facts))
    if arguments.json:
        print(json.dumps(rows))


def first(model: Model, ids: Ids, policy: Action, prefill: Action | None) -> LogProbs:
    """Log probabilities `[1, V]` of an answer's first token, as a generation finds them."""
    seen: list[Logits] = []

    def keep(_: Sequence[int], logits: Logits) -> Logits:
        seen.append(logits.copy())
        return logits

    options = dataclasses.replace(
        GREEDY, policy=policy, prefill=prefill, max_new_tokens=1, logits_processor=keep
    )
    list(model.generate_step(ids, options=options))
    return log_softmax(seen[0][None])


if __name__ == "__main__":
    main()
