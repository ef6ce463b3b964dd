"""Time and memory of models of any size: measured with few layers, extrapolated to all of them.

    python benchmarks/scale.py FOLDER --shapes 1b 3b 8b

Each shape of a Llama 3 (see big.py) is exported with its own text, with few and with twice as many
layers of random weights, and one pass of the training runs on each. A line through both gives the
figures for all layers. FOLDER needs room for such a model and its bundle: 10 GB for `8b`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from big import SHAPES

FEW = {"1b": 4, "3b": 2, "8b": 2}  # enough layers to make the model a large one


def main() -> None:
    """Prints a JSON line for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=FEW, default=list(FEW))
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--a-pass", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.a_pass:
        a_pass(arguments.folder)
        return
    rows = []
    for shape in arguments.shapes:
        least, layers = FEW[shape], SHAPES[shape]["num_hidden_layers"]
        few, more = (measured(arguments.folder, shape, n) for n in (least, 2 * least))
        found: dict[str, object] = {"shape": shape, "layers": layers, "measured": [few, more]}
        for name in few:
            slope = (more[name] - few[name]) / least
            # Nothing shrinks with more layers, but a peak caused by other parts may seem to.
            found[name] = round(max(few[name] + slope * (layers - least), few[name], more[name]), 2)
        rows.append(found)
        if not arguments.json:
            print(json.dumps(found), flush=True)
    if arguments.json:
        print(json.dumps(rows))


def measured(folder: Path, shape: str, layers: int) -> dict[str, float]:
    """Seconds and peak memory of an export, and of a training pass on its bundle."""
    here, model, out = Path(__file__).parent, folder / "model", folder / "out"
    subprocess.run(
        [sys.executable, here / "big.py", model, "--shape", shape, "--layers", str(layers)],
        check=True,
        stdout=sys.stderr,
    )
    tool = Path(sys.executable).with_name("dash-export")
    options = ("--effort", "none", "--check", "none", "--overwrite")
    seconds, memory, _ = timed([tool, model, out, *options])
    _, pass_memory, printed = timed([sys.executable, __file__, out, "--a-pass"])
    facts = {
        "layers": layers,
        "export_s": round(seconds, 1),
        "export_gb": round(memory / 1e9, 2),
        "bundle_gb": round(sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e9, 2),
        "pass_s": float(printed),
        "pass_gb": round(pass_memory / 1e9, 2),
    }
    shutil.rmtree(model)
    shutil.rmtree(out)
    return facts


def timed(command: list[str | Path]) -> tuple[float, int, bytes]:
    """Seconds, peak memory in bytes and output of a command."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"scale.py: error: {command[0]} ended with status {status}")
    return time.monotonic() - started, usage.ru_maxrss * 1024, printed


def a_pass(bundle: Path) -> None:
    """Runs the two passes that need the most memory, once each; prints the seconds of the first."""
    import torch

    from dash_onnx.core.bundle import Bundle
    from dash_onnx.exporters.train.improve import drawing, explore
    from dash_onnx.exporters.train.options import TrainOptions
    from dash_onnx.exporters.train.trainer import Trainer
    from dash_onnx.exporters.train.values import sampled_values

    trainer = Trainer(Bundle(bundle), TrainOptions())
    shape = (trainer.plan.batch, trainer.plan.length)
    trainer.ids = torch.randint(2, 250, shape, generator=trainer.generator)
    started = time.monotonic()
    with trainer.autocast():
        sampled_values(trainer.env, trainer.batch(0), trainer.generator)
    seconds = time.monotonic() - started
    multipliers = trainer.log_multipliers(trainer.plan.batch)
    explore(trainer, 0, multipliers, drawing(trainer, multipliers, 0.4))
    print(round(seconds, 1))


if __name__ == "__main__":
    main()
