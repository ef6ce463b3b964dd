"""What `dash-train --from` is worth: a tenth of the training from a sibling's scorer, and anew.

    python benchmarks/transfer.py tuned/ base/ --text book.txt

Learns the policy of the first bundle three times, in memory, and prints the KL in nats at the same
costs of the layers (read between measured multipliers; the time of deciding is not counted).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from ablations import InMemory, other_text
from headroom import kl_at

from dash_onnx.core.bundle import Bundle
from dash_onnx.exporters.train.decisions import policy_curve
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.options import PLANS, TrainOptions
from dash_onnx.exporters.train.train import learn
from dash_onnx.exporters.train.trainer import Trainer

POINTS = 8  # multipliers at which a policy is measured
SHOWN = (6, 4, 3, 2)  # of which the costs are those of the columns, from little to much KL


def main() -> None:
    """Prints a row for each training and text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="OUT", type=Path)
    parser.add_argument("sibling", metavar="OTHER", type=Path, help="with a trained policy")
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=8, help="of 256 tokens (default: 8)")
    arguments = parser.parse_args()
    bundle, plan = Bundle(arguments.bundle), PLANS["quick"]
    short = TrainOptions(plan=plan, start=arguments.sibling)
    tenth = dataclasses.replace(
        short.plan_for(bundle.manifest.model), decision_points=plan.decision_points
    )
    trainings = {
        "anew": TrainOptions(plan=plan),
        "anew, a tenth": TrainOptions(plan=tenth),
        f"from {arguments.sibling.name}, a tenth": short,
    }
    ids: Tensor | None = None  # all learn from the same text
    costs: dict[Path, list[float]] = {}
    for name, options in trainings.items():
        started = time.monotonic()
        trainer = Trainer(bundle, options, checkpoint=InMemory)
        if ids is not None:
            trainer.checkpoint.state["ids"] = ids[: trainer.plan.sequences + trainer.plan.held_out]
        learn(trainer)
        ids = trainer.checkpoint.state["ids"] if ids is None else ids
        seconds = time.monotonic() - started
        for path in arguments.text:
            ids_of = other_text(trainer, path, arguments.sequences)
            points = policy_curve(trainer, ids_of, POINTS)
            columns = costs.setdefault(path, [points[at][0] for at in SHOWN])
            losses = "".join(f"{kl_at(cost, points):8.4f}" for cost in columns)
            print(f"{name:32}{path.stem:20}{losses}{seconds:7.0f} s", flush=True)


if __name__ == "__main__":
    main()
