"""`dash-export` whose costs are fixed: measured ones differ from one run to the next."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dash_onnx.cli.export import main
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.facts import Costs
from dash_onnx.exporters.export import pipeline
from dash_onnx.runtime.ort import Device


def fixed(bundle: Bundle, _: Device) -> Costs:
    """Stands for `profile`: the further an action is from full precision, the cheaper."""
    manifest = bundle.manifest
    layer = {action: 1 / (1 + place) for place, action in enumerate(manifest.actions)}
    heads = {head: layer[head] for head in manifest.exported_heads}
    return Costs("fixed", 1, 0.1, 0.1, heads, (layer,) * len(manifest.layers))


def run(arguments: Sequence[str], log: Path) -> NoReturn:
    """The command in a process of its own, whose output is appended to a file."""
    with log.open("ab") as out:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), stream.fileno())
    pipeline.profile = fixed
    sys.exit(main([*arguments]))
