"""What guessing tokens saves, by kind of prompt, and whether the text stays the same.

    python benchmarks/speculate.py out/ --prompts spec_bench.jsonl
    python benchmarks/speculate.py out/ --prompts spec_bench.jsonl --policy full --json

PROMPTS has one JSON object a line, with `category` and `turns` or `prompt`. An editing task is
added: to return a source file with one change. Each prompt is answered without guesses and with
each kind of them, in turns, and the greedy texts are compared token by token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import dash_onnx
from dash_onnx.core.progress import Phase
from dash_onnx.core.text import json_lines
from dash_onnx.runtime.engine import Model
from dash_onnx.runtime.options import GREEDY
from dash_onnx.runtime.speculate import Speculate

KINDS: tuple[Speculate, ...] = ("off", "ngram", "dash", "auto")
CONVERSATIONS = (  # of MT-bench: one kind of Spec-Bench
    "writing roleplay reasoning math coding extraction stem humanities".split()
)


def main() -> None:
    """Prints a line for each kind of prompt, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--policy", default="int8", help="the target (default: int8)")
    parser.add_argument("--per-kind", type=int, default=14, help="prompts (default: 14)")
    parser.add_argument("--new-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prompts = editing(arguments.per_kind)
    for _, record in json_lines(arguments.prompts):
        kind = record.get("category", "prompt")
        kind = "conversation" if kind in CONVERSATIONS else kind
        if len(prompts[kind]) < arguments.per_kind:
            prompts[kind].append(record["prompt"] if "prompt" in record else record["turns"][0])
    model = dash_onnx.load(arguments.bundle)
    for speculate in KINDS:
        model.preload(arguments.policy, speculate=speculate)
    rows = []
    with Phase("prompts", total=sum(map(len, prompts.values()))) as phase:
        for kind, texts in prompts.items():
            found = []
            for text in texts:
                found.append(answers(model, text, arguments.policy, arguments.new_tokens))
                phase.update()
            rows.append({"kind": kind, **summary(found)})
            if not arguments.json:
                print(shown(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"policy": arguments.policy, "rows": rows}))


def editing(count: int) -> dict[str, list[str]]:
    """Prompts that ask for a file of some 60 lines with one change in it."""
    lines = [
        f"def area_{n}(width, height):\n    return width * height * {n}\n" for n in range(1, 21)
    ]
    source = "\n".join(lines)
    prompts: dict[str, list[str]] = defaultdict(list)
    for number in range(1, count + 1):
        task = f"Rename `area_{number}` to `surface_{number}` in this file, and print all of it:"
        prompts["editing"].append(f"{task}\n\n```python\n{source}```")
    return prompts


def answers(model: Model, prompt: str, policy: str, count: int) -> dict[str, dict[str, Any]]:
    """By who guesses: the tokens, their milliseconds without the first, and the guesses."""
    ids = model.text.encode_chat([{"role": "user", "content": prompt}])
    ids = ids[-(model.manifest.model.max_length - count) :]
    found: dict[str, dict[str, Any]] = {}
    for speculate in KINDS:
        chosen = dataclasses.replace(
            GREEDY, policy=policy, speculate=speculate, max_new_tokens=count
        )
        steps = [*model.generate_step(ids, options=chosen)]
        guesses = [step.guess for step in steps if step.guess]
        found[speculate] = {
            "tokens": [step.token for step in steps],
            "ms": sum(step.ms for step in steps[1:]),
            "guessed": sum(guess.tokens for guess in guesses),
            "right": sum(guess.right for guess in guesses),
        }
    return found


def summary(found: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Tokens per second alone; by who guesses, the ratio to it, what is right, what is the same."""
    alone = [one["off"] for one in found]
    decoded = sum(len(one["tokens"]) - 1 for one in alone)
    row: dict[str, Any] = {"prompts": len(found), "tokens": decoded}
    row["tokens_per_s"] = 1e3 * decoded / sum(one["ms"] for one in alone)
    for speculate in KINDS[1:]:
        with_ = [one[speculate] for one in found]
        rate = 1e3 * sum(len(one["tokens"]) - 1 for one in with_) / sum(one["ms"] for one in with_)
        guessed = sum(one["guessed"] for one in with_)
        row[speculate] = {
            "ratio": rate / row["tokens_per_s"],
            "right": sum(one["right"] for one in with_) / guessed if guessed else None,
            "guessed_per_token": guessed / decoded,
            "same_text": sum(a["tokens"] == b["tokens"] for a, b in zip(alone, with_, strict=True)),
            "same_tokens": statistics.mean(
                same_until(a["tokens"], b["tokens"]) for a, b in zip(alone, with_, strict=True)
            ),
        }
    return row


def same_until(one: list[int], other: list[int]) -> float:
    """Share of the answer before the first difference: what rounding moved between near-ties."""
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return same / len(one)


def shown(row: dict[str, Any]) -> str:
    """One kind of prompt in a line."""
    cells = [f"{row['kind']:16} {row['tokens_per_s']:6.1f} tokens/s"]
    for speculate in KINDS[1:]:
        one = row[speculate]
        right = "-" if one["right"] is None else f"{one['right']:.0%}"
        cells.append(
            f"{speculate} {one['ratio']:.2f} x, {right} right, "
            f"{one['same_text']}/{row['prompts']} the same"
        )
    return "  ".join(cells)


if __name__ == "__main__":
    main()
