"""Answers every prompt of a file with Ray Data, on as many processes as the cluster has room for.

    pip install 'ray[data]'
    python examples/ray_batch.py out/ prompts.jsonl answers/ --budget balanced

`prompts.jsonl` has an `id` and a `prompt` on each line. Answers are written as they come, a file
for each part. After an interruption, run it again to answer the remaining prompts. A prompt that
cannot be answered, such as one beyond the model's context, gets an `error` instead of a `text`.
"""

from __future__ import annotations

import argparse
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import ray

import dash_onnx


class Answers:
    """A process with a loaded bundle."""

    def __init__(self, bundle: str, folder: str, threads: int, budget: str | None, tokens: int):
        self._model = dash_onnx.load(bundle, threads=threads, budget=budget)
        self._options = dash_onnx.GenerationOptions(max_new_tokens=tokens)
        self._folder = Path(folder)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answers the prompts of a batch together, and writes them before the next one."""
        found = self._answers([str(prompt) for prompt in batch["prompt"]])
        lines = [
            json.dumps({"id": str(name), **line})
            for name, (line, _) in zip(batch["id"], found, strict=True)
        ]
        part = self._folder / f"{uuid.uuid4().hex}.jsonl"
        partial = part.with_suffix(".partial")
        partial.write_text("\n".join(lines) + "\n", "utf-8")
        partial.rename(part)
        return {"id": batch["id"], "tokens": np.array([tokens for _, tokens in found])}

    def _answers(self, prompts: list[str]) -> list[tuple[dict[str, str], int]]:
        """What to write for each prompt, and its number of generated tokens."""
        chat = self._model.text.chat_template is not None
        asked = [[{"role": "user", "content": one}] if chat else one for one in prompts]
        try:
            texts = self._model.batch(asked, options=self._options)
        except dash_onnx.DashError as error:
            if len(prompts) == 1:
                return [({"error": str(error)}, 0)]
            return [one for prompt in prompts for one in self._answers([prompt])]
        return [({"text": str(text)}, text.generated_tokens) for text in texts]


def answered(folder: Path) -> set[str]:
    """Ids that have an answer."""
    lines = (
        line for part in folder.glob("*.jsonl") for line in part.read_text("utf-8").split("\n")
    )
    return {json.loads(line)["id"] for line in lines if line}


def main() -> None:
    """Runs what is left to do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path, help="a folder")
    parser.add_argument("--budget")
    parser.add_argument("--processes", type=int, default=1, help="(default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="of each (default: 2)")
    parser.add_argument("--parallel", type=int, default=8, help="answers at once (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=256, help="(default: 256)")
    arguments = parser.parse_args()
    arguments.answers.mkdir(parents=True, exist_ok=True)
    done = answered(arguments.answers)
    left: list[dict[str, Any]] = []
    for line in arguments.prompts.read_text("utf-8").split("\n"):
        if line.strip():
            record = json.loads(line)
            if str(record["id"]) not in done:
                left.append({"id": str(record["id"]), "prompt": record["prompt"]})
    print(f"{len(done)} are answered, {len(left)} are left")
    if not left:
        return
    given = (
        str(arguments.bundle.resolve()),
        str(arguments.answers.resolve()),
        arguments.threads,
        arguments.budget,
        arguments.max_tokens,
    )
    found = ray.data.from_items(left).map_batches(
        Answers,
        fn_constructor_args=given,
        batch_size=arguments.parallel,
        num_cpus=arguments.threads,
        compute=ray.data.ActorPoolStrategy(size=arguments.processes),
    )
    print(f"{found.sum('tokens')} tokens in {len(left)} answers")


if __name__ == "__main__":
    main()
