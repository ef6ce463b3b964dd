"""Cost of deciding per token: with the scorer beside the layers, between them, and without it.

    python benchmarks/overlap.py BUNDLE

BUNDLE has a trained policy. Three runs of the same text alternate: as in the runtime;
on a GPU also with a scorer that runs between two layers while the host waits; and on the recorded
paths, without a scorer. `hidden` is the share of the scorer's time that the overlap saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import dash_onnx
from dash_onnx.core.actions import ActionPath
from dash_onnx.core.bundle import Bundle
from dash_onnx.runtime.deciders import Decider, PathSequence, ScoredDecider
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.sequence import SequenceState

PROMPT, TOKENS, ROUNDS = 16, 128, 7


Make = Callable[[SequenceState], Decider]
"""Creates the decider of a sequence."""


def main() -> None:
    """Prints a table, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--budget", default="balanced", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    beside = dash_onnx.load(arguments.bundle)
    models = {"beside": beside}
    if beside.manifest.target.device == "cuda":
        from dash_onnx.runtime.cuda import CudaBackend, Driver, open_driver

        backend = CudaBackend(Driver(open_driver()), overlap=False)
        models["between"] = Model(Bundle(arguments.bundle), backend)
    policy = beside.policy("dash", arguments.budget)
    head, multiplier = policy.head, getattr(policy, "multiplier", 0.0)
    ids = np.random.default_rng(0).integers(2, beside.manifest.model.vocab_size, PROMPT + TOKENS)
    paths = {
        name: decoded(one, ids, head, scored(multiplier, head))[1] for name, one in models.items()
    }
    assert len({tuple(found) for found in paths.values()}) == 1, "the overlap changed a decision"
    replay = recorded(paths["beside"], head)
    runs = {name: (one, scored(multiplier, head)) for name, one in models.items()}
    runs["none"] = beside, replay
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (one, make) in runs.items():
            times[name].append(decoded(one, ids, head, make)[0])
    found = {f"{name}_ms": round(statistics.median(seen), 4) for name, seen in times.items()}
    found["scorer_share"] = round(found["beside_ms"] / found["none_ms"] - 1, 4)
    if "between" in models:
        visible, whole = (found[f"{n}_ms"] - found["none_ms"] for n in ("beside", "between"))
        found["hidden"] = round(1 - visible / whole, 3)
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:>14} {value}")


def scored(multiplier: float, head: str) -> Make:
    """The trained scorer at a fixed multiplier, so that it always decides the same."""
    return lambda sequence: ScoredDecider(sequence, head, multiplier)  # type: ignore[arg-type]


def recorded(paths: list[ActionPath], head: str) -> Make:
    """The recorded paths."""
    return lambda _: PathSequence(iter(paths), len(paths[0]), head)  # type: ignore[arg-type]


def decoded(model: Model, ids: np.ndarray, head: str, make: Make) -> tuple[float, list[ActionPath]]:
    """Median milliseconds per token, and the path of each token."""
    sequence = model.new_sequence()
    best = model.manifest.variants[0]
    sequence.prefill(ids[:PROMPT], (best,) * sequence.num_layers, model.manifest.heads[best])
    decider, times, paths = make(sequence), [], []
    for token in ids[PROMPT:].tolist():
        started = time.perf_counter()
        _, path = sequence.forward(token, decider)  # returns logits on the host
        times.append((time.perf_counter() - started) * 1e3)
        paths.append(path)
    return statistics.median(times), paths


if __name__ == "__main__":
    main()
