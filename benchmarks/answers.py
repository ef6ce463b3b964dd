"""Length and repetition of greedy answers at each preset, compared to the highest precision.

    python benchmarks/answers.py out/ --prompts chats.jsonl --limit 100

Repeated 4-grams: the share of an answer's 4-grams that occurred in it before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import dash_onnx
from dash_onnx.bench.prompts import read_prompts
from dash_onnx.core.statistics import standard_error
from dash_onnx.runtime.options import GREEDY


def repeated(tokens: list[int], size: int = 4) -> float:
    """Share of repeated n-grams in an answer; 0 if it is too short."""
    grams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def main() -> None:
    """Prints a row per policy, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = dash_onnx.load(arguments.bundle)
    scorer = model.manifest.scorer
    assert scorer is not None, "train a policy first: dash-train BUNDLE"
    policies: list[tuple[str, str | None]] = [(model.manifest.variants[0], None)]
    budgets = sorted(scorer.presets, key=lambda preset: -scorer.presets[preset])
    policies += [("dash", preset) for preset in budgets]
    # Evenly spaced, so that every group is represented in a file sorted by group.
    texts = read_prompts(arguments.prompts)
    texts = texts[:: max(1, len(texts) // arguments.limit)][: arguments.limit]
    rows = []
    for policy, budget in policies:
        answers: list[list[int]] = []
        ended = 0
        name = budget or policy
        for text in tqdm(texts, desc=name, disable=None):
            message = {"role": "user", "content": text}
            answer = list(
                model.stream(
                    [message],
                    options=GREEDY,
                    policy=policy,
                    budget=budget,
                    max_new_tokens=arguments.max_tokens,
                )
            )
            answers.append([chunk.token for chunk in answer])
            ended += answer[-1].finish_reason == "stop"
        row: dict[str, Any] = {"name": name, "ended": ended / len(answers)}
        for what, measure in (("length", len), ("repeated", repeated)):
            values = [float(measure(answer)) for answer in answers]
            row |= {what: float(np.mean(values)), f"{what}_stderr": standard_error(values)}
        rows.append(row)
        if not arguments.json:
            print(
                "{name:9} {length:.1f} (+- {length_stderr:.1f}) tokens, {ended:.0%} ended, "
                "{repeated:.1%} (+- {repeated_stderr:.1%}) repeated".format(**row),
                flush=True,
            )
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
