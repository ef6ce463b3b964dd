"""Time and memory of models of any size: measured with few layers, extrapolated to all of them.

    python benchmarks/scale.py FOLDER --shapes 1b 3b 8b

Each shape of a Llama 3 (see big.py) is exported with its own text, with few and with twice as many
layers of random weights, and one pass of the training runs on each. For all layers, the phases of
the larger export grow with what they run, and its pass with the weights; its memory and the bundle
follow a line through both. FOLDER needs room for such a model and its bundle: 10 GB for `8b`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from big import SHAPES

SIZES = ["1b", "3b", "8b"]
FEW = 2  # layers of the smaller export
_DONE = re.compile(r"^(?:.*: )?([\w ]+): done in ([\d.]+) s", re.M)


def main() -> None:
    """Prints a JSON line for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--a-pass", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.a_pass:
        a_pass(arguments.folder)
        return
    rows = []
    for shape in arguments.shapes:
        few, more = (measured(arguments.folder, shape, layers) for layers in (FEW, 2 * FEW))
        found = {"shape": shape, "measured": [few, more], **extrapolated(shape, few, more)}
        rows.append(found)
        if not arguments.json:
            print(json.dumps(found), flush=True)
    if arguments.json:
        print(json.dumps(rows))


def measured(folder: Path, shape: str, layers: int) -> dict[str, Any]:
    """Seconds and peak memory of an export, and of a training pass on its bundle."""
    here, model, out = Path(__file__).parent, folder / "model", folder / "out"
    subprocess.run(
        [sys.executable, here / "big.py", model, "--shape", shape, "--layers", str(layers)],
        check=True,
        stdout=sys.stderr,
    )
    tool = Path(sys.executable).with_name("dash-export")
    options = ("--effort", "none", "--check", "none", "--overwrite")
    seconds, memory, printed = timed([tool, model, out, *options])
    _, pass_memory, pass_printed = timed([sys.executable, __file__, out, "--a-pass"])
    facts = {
        "layers": layers,
        "export_s": round(seconds, 1),
        "phases_s": {name: float(took) for name, took in _DONE.findall(printed)},
        "export_gb": round(memory / 1e9, 2),
        "bundle_gb": round(sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e9, 2),
        "pass_s": float(pass_printed.split()[-1]),
        "pass_gb": round(pass_memory / 1e9, 2),
    }
    shutil.rmtree(model)
    shutil.rmtree(out)
    return facts


def extrapolated(shape: str, few: dict[str, Any], more: dict[str, Any]) -> dict[str, float]:
    """What `measured` would return for all layers of a shape."""
    sizes = SHAPES[shape]
    layers, width = sizes["num_hidden_layers"], sizes["hidden_size"]
    kv = sizes["num_key_value_heads"] * sizes["head_dim"]
    layer = 2 * width * (width + kv) + 3 * width * sizes["intermediate_size"]  # weights
    head = sizes["vocab_size"] * width
    growth = (layers * layer + head) / (more["layers"] * layer + head)
    growths = {"layers": layers / more["layers"], "LM head": 1.0}
    phases = more["phases_s"]
    left = more["export_s"] - sum(phases.values())  # starts, and the last files
    found = {
        "layers": layers,
        "export_s": left + sum(took * growths.get(name, growth) for name, took in phases.items()),
        "pass_s": more["pass_s"] * growth,
    }
    # The peak memory of a pass differs more between runs than between two and four layers.
    for name in ("export_gb", "bundle_gb"):
        slope = (more[name] - few[name]) / (more["layers"] - few["layers"])
        # Nothing shrinks with more layers, but a peak caused by other parts may seem to.
        line = more[name] + slope * (layers - more["layers"])
        found[name] = max(few[name], more[name], line)
    return {name: round(value, 2) for name, value in found.items()}


def timed(command: list[str | Path]) -> tuple[float, int, str]:
    """Seconds, peak memory in bytes and output of a command, which is shown as it comes."""
    started, printed = time.monotonic(), []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        printed.append(line)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"scale.py: error: {command[0]} ended with status {status}")
    return time.monotonic() - started, usage.ru_maxrss * 1024, "".join(printed)


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
