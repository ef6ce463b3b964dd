"""From a model to a bundle that answers: export, check, train, fuse."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import FUSED_FOLDER
from dash_onnx.core.facts import ModelFacts
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.progress import Expected, Phase, announce
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.expected import Speed, export_phases, training_phases
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.exporters.export.check import CheckKind, CheckResult, check
from dash_onnx.exporters.fused import FuseOptions, fuse
from dash_onnx.exporters.sources import open_source
from dash_onnx.exporters.train.options import TrainOptions
from dash_onnx.exporters.train.train import train
from dash_onnx.runtime.ort import has_device

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """What a pipeline made.

    Attributes:
        manifest: of the bundle.
        checked: the comparison with transformers; None if there was none.
    """

    manifest: Manifest
    checked: CheckResult | None


def build(
    model: str,
    out: Path,
    options: ExportOptions,
    *,
    check: CheckKind = "quick",
    training: TrainOptions | None = None,
    fused: FuseOptions | None = None,
) -> Built:
    """Exports a model, compares the bundle with transformers, trains its policy and fuses it.

    Args:
        model: hub id, folder or GGUF file.
        out: folder of the new bundle.
        options: of the export.
        check: how much of the bundle is compared; what exceeds a limit is in the result.
        training: of the policy; None trains none. It is left out, with a warning, where the
            machine lacks the bundle's device.
        fused: of the graph in `out`/fused; None writes none.

    Raises:
        DashError: a step refuses; the steps before it have left a bundle that runs.
    """
    asked, training = training, training if has_device(options.device) else None
    typed = shlex.quote(str(out))  # as a command has it in a shell
    manifest = export(
        model,
        out,
        options,
        opened=lambda facts, resolved: _announce(facts, resolved, training, check != "none"),
    )
    if training is not None:
        _LOG.info('%s can answer now: dash-run %s "Hello!"; training the policy', out, typed)
    checked = _checked(model, out, options, check)
    if training is not None:
        manifest = train(out, training)
    elif asked is not None:
        _LOG.warning(
            "no %s device here, so no policy was trained: run `dash-train %s` on a machine "
            "with one",
            *(options.device, typed),
        )
    if fused is not None:
        fuse(Bundle(out), out / FUSED_FOLDER, fused, overwrite=True)
    return Built(manifest, checked)


def announce_training(model: ModelFacts, training: TrainOptions) -> None:
    """Says how long a training will take, where somebody listens."""
    if _LOG.isEnabledFor(logging.INFO):
        announce(_training(model, training, Speed.measured()))


def _announce(
    model: ModelFacts, options: ExportOptions, training: TrainOptions | None, check: bool
) -> None:
    """Says what is coming, where somebody listens: it takes half a second to tell how long."""
    if not _LOG.isEnabledFor(logging.INFO):
        return
    speed = Speed.measured()
    phases = export_phases(model, options, speed, check=check)
    announce(phases if training is None else phases + _training(model, training, speed))


def _training(model: ModelFacts, training: TrainOptions, speed: Speed) -> list[Expected]:
    plan = training.plan_for(model)
    return training_phases(model, plan, speed, generated=not training.calibration)


def _checked(model: str, out: Path, options: ExportOptions, kind: CheckKind) -> CheckResult | None:
    if kind == "none":
        return None
    source = open_source(model, REGISTRY, options.requantize, options.revision)
    with Phase("check", total=1):
        return check(source, Bundle(out), kind)
