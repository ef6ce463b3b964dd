"""Searches a trained bundle more widely for static assignments than its training does.

    python benchmarks/assignments.py out/ --calibration text.txt

Training searches before the compensation is trained, on a few sequences and with one or two moves
measured per step. Prints, for each number of skipped layers, the assignment that this search and
the bundle's table have, and the KL in nats of both on sequences that this search did not see (the
table's may have, where both read the same file). An assignment can be given to `dash-eval out/
--policy`.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from unittest import mock

import torch
from ablations import Remembering
from tqdm import tqdm

from dash_onnx.actions import SKIP
from dash_onnx.bundle import Bundle
from dash_onnx.exporters.train import learning, static
from dash_onnx.exporters.train.effort import Effort
from dash_onnx.exporters.train.learning import BATCH, Learning
from dash_onnx.exporters.train.options import TrainOptions
from dash_onnx.exporters.train.values import sampled_values

HELD_OUT = 16  # sequences


def main() -> None:
    """Prints a row for each assignment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="OUT", type=Path)
    parser.add_argument("--calibration", nargs="+", type=Path, default=[])
    parser.add_argument("--sequences", type=int, default=16, help="to search on")
    parser.add_argument("--tried", type=int, default=5, help="moves measured per step")
    parser.add_argument("--skips", type=int, default=8, help="layers to skip at most")
    arguments = parser.parse_args()
    options = TrainOptions(calibration=tuple(arguments.calibration), seed=1)
    with mock.patch.object(learning, "Checkpoint", Remembering):
        run = Learning(Bundle(arguments.bundle), options)
    run.effort = Effort(arguments.sequences, HELD_OUT, 0, 0, arguments.tried)
    run.texts()
    skip, scorer = run.actions.index(SKIP), run.bundle.manifest.scorer
    with run.autocast():
        parts = run.ids.split(BATCH)
        samples = [sampled_values(run.env, part, run.generator)[1] for part in parts]
        values = torch.cat([part[:, run.env.prompt_tokens :].flatten(0, 1) for part in samples])
        searched = run.env.reference(run.ids, run.actions[0])
        held_out = run.env.reference(run.held_out, run.actions[0])

        def told(name: str, path: tuple[int, ...]) -> None:
            (kl,) = static.path_kl(run.env, run.held_out, held_out, path, [run.frozen.head])
            runs = [(run.actions[at], len(list(same))) for at, same in itertools.groupby(path)]
            listed = ",".join(f"{action}*{count}" for action, count in runs)
            print(f"{path.count(skip):2} skips  {kl:.3f}  {name:6}  static:{listed}", flush=True)

        # Each path is in the table once per head.
        for path in dict.fromkeys(point.path for point in scorer.static[::-1]) if scorer else ():
            told("table", tuple(run.actions.index(action) for action in path))
        moves = static.search(
            run.env, run.ids, searched, run.costs, values.mean(0), arguments.tried
        )
        for move in tqdm(moves, desc="search", disable=None):
            if move.path.count(skip) > arguments.skips:
                break
            told("search", move.path)


if __name__ == "__main__":
    main()
