"""`dash_onnx.export`, `train` and `fuse`: the Python API, one function per pipeline step.

Importing this module loads neither PyTorch nor transformers; calling a function does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_onnx.core.actions import parse_variants
from dash_onnx.exporters.installed import require

if TYPE_CHECKING:
    from dash_onnx.core.manifest import Manifest


def export(model: str | Path, out: str | Path, **options: Any) -> Manifest:
    """Exports a model to a bundle without a trained policy.

    Args:
        model: hub id, folder or GGUF file.
        out: folder of the new bundle.
        options: fields of `ExportOptions`, such as `variants=("int8", "int4")`,
            or `variants="int8,int4,wide"` as on the command line.

    Returns:
        What the bundle contains.

    Raises:
        DashError: the model cannot be exported, or `out` may not be replaced; `out` is unchanged.
    """
    require()
    from dash_onnx.exporters.export import ExportOptions
    from dash_onnx.exporters.export import export as write

    if isinstance(options.get("variants"), str):  # as on the command line
        options["variants"], wide = parse_variants(options["variants"])
        options.setdefault("wide", wide)
    return write(str(model), Path(out), ExportOptions(**options))


def train(bundle: str | Path, **options: Any) -> Manifest:
    """Trains the policy of a bundle, or trains it again.

    Args:
        bundle: folder of the bundle, which is unchanged until the training is complete.
        options: fields of `TrainOptions`, such as `effort="normal"`.

    Returns:
        What the bundle contains now.

    Raises:
        DashError: the bundle or the calibration text cannot be used.
    """
    require()
    from dash_onnx.exporters.train.options import TrainOptions
    from dash_onnx.exporters.train.train import train as learn

    return learn(Path(bundle), TrainOptions(**options))


def fuse(
    bundle: str | Path, out: str | Path | None = None, *, overwrite: bool = False, **options: Any
) -> Path:
    """Writes the policy of a bundle as one ONNX graph.

    Args:
        bundle: folder of the bundle.
        out: folder to write; None writes `fused` in the bundle.
        overwrite: replace an existing folder.
        options: fields of `FuseOptions`, such as `policy="int4"`.

    Returns:
        The folder.

    Raises:
        DashError: the policy cannot be fused, or the folder may not be replaced.
    """
    require()
    from dash_onnx.core.bundle import Bundle
    from dash_onnx.core.contract import FUSED_FOLDER
    from dash_onnx.exporters.fused import FuseOptions
    from dash_onnx.exporters.fused import fuse as write

    folder = Path(bundle) / FUSED_FOLDER if out is None else Path(out)
    write(Bundle(Path(bundle)), folder, FuseOptions(**options), overwrite=overwrite)
    return folder
