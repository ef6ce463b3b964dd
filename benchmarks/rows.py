"""Speed of a prompt, and of decoding by the number of rows that share a pass, on any device.

    python benchmarks/rows.py BUNDLE --policy int4

Tokens are random. Prompts have one row; in a batch, each row has a prompt of 16 tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

import dash_onnx
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.rows import Rows

PROMPT, TOKENS, WARM_UP = 16, 48, 8


def main() -> None:
    """Prints a table, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--policy", default="int4", help="fixed (default: %(default)s)")
    parser.add_argument("--rows", default="1,4,8,16,32", help="(default: %(default)s)")
    parser.add_argument("--prompts", default="512,2048", help="lengths (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    found: dict[str, float] = {}
    with dash_onnx.load(arguments.bundle) as model:
        policy = model.policy(arguments.policy)
        if policy.uniform is None:
            parser.error("--policy must be a fixed one, such as int4")
        decider = FixedPath(policy.uniform, policy.head)
        for length in map(int, arguments.prompts.split(",")):
            if length < model.manifest.model.max_length:
                found[f"prompt of {length}"] = prompt_rate(model, decider, length)
        for count in map(int, arguments.rows.split(",")):
            found[f"{count} rows"] = decoding_rate(model, decider, count)
    if arguments.json:
        print(json.dumps(found))
        return
    for name, rate in found.items():
        print(f"{name:16} {rate:8.1f} tokens/s")


def prompt_rate(model: Model, decider: FixedPath, length: int) -> float:
    """Tokens per second of the second run of a prompt."""
    sequence, ids = model.new_sequence(), _ids(model, length)
    for _ in range(2):
        sequence.truncate(0)
        started = time.perf_counter()
        sequence.prefill(ids, decider.path, decider.head)
    return round(length / (time.perf_counter() - started), 1)


def decoding_rate(model: Model, decider: FixedPath, count: int) -> float:
    """Tokens per second of all rows together."""
    rows, ids = Rows.new(model._sessions, count), _ids(model, PROMPT)
    for state in rows.states:
        state.prefill(ids, decider.path, decider.head)
    tokens, started = [[int(token)] for token in _ids(model, count)], 0.0
    for step in range(WARM_UP + TOKENS):
        if step == WARM_UP:
            started = time.perf_counter()
        logits, _ = rows.forward(range(count), tokens, [decider] * count)
        tokens = [[int(own[-1].argmax())] for own in logits]
    return round(count * TOKENS / (time.perf_counter() - started), 1)


def _ids(model: Model, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, model.manifest.model.vocab_size, count)


if __name__ == "__main__":
    main()
