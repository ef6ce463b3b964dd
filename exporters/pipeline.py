"""From a model to a working bundle: export, check, train, fuse."""

from __future__ import annotations

import logging
import os
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
from dash_onnx.exporters.fused import FuseOptions, check_fusable, fuse
from dash_onnx.exporters.sources import open_source
from dash_onnx.exporters.train.options import TrainOptions
from dash_onnx.exporters.train.train import train
from dash_onnx.exporters.train.trainer import MIN_LAYERS
from dash_onnx.runtime.ort import has_device

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """The result of a pipeline.

    Attributes:
        manifest: manifest of the bundle.
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
        options: options of the export.
        check: how much of the bundle is compared; exceeded limits are in the result.
        training: options of the training; None trains no policy. It is skipped, with a warning, if
            the machine lacks the bundle's device.
        fused: options of the graph in `out`/fused; None writes none.

    Raises:
        DashError: a step failed; the steps before it leave a bundle that runs.
    """
    asked, training = training, training if has_device(options.device) else None
    typed = shlex.quote(str(out))  # as in a shell
    here = out.resolve() == Path.cwd()  # which the export replaces
    if here:
        out, model = out.resolve(), str(Path(model).resolve()) if Path(model).exists() else model
    manifest = export(
        model,
        out,
        options,
        opened=lambda facts, resolved: _announce(
            facts,
            resolved,
            training if facts.num_layers >= MIN_LAYERS else None,
            check=check != "none",
        ),
    )
    if here:
        os.chdir(out)  # relative names of texts mean what they did
    if fused is not None:  # before the training
        check_fusable(manifest, fused.client)
    if training is not None and manifest.model.num_layers < MIN_LAYERS:
        _LOG.warning("a model of one layer has nothing to decide, so no policy is trained")
        training = asked = None
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
    """Logs how long a training will take, if logging is enabled."""
    if _LOG.isEnabledFor(logging.INFO):
        announce(_training(model, training, Speed.measured()))


def _announce(
    model: ModelFacts, options: ExportOptions, training: TrainOptions | None, *, check: bool
) -> None:
    """Logs the phases to come, if logging is enabled: the estimate takes half a second."""
    if not _LOG.isEnabledFor(logging.INFO):
        return
    speed = Speed.measured()
    phases = export_phases(model, options, speed, check=check)
    announce(phases if training is None else phases + _training(model, training, speed))


def _training(model: ModelFacts, training: TrainOptions, speed: Speed) -> list[Expected]:
    plan = training.plan_for(model)
    phases = training_phases(model, plan, speed, generated=not training.calibration)
    return [one for one in phases if one.name != "scorer" or training.start is None]


def _checked(model: str, out: Path, options: ExportOptions, kind: CheckKind) -> CheckResult | None:
    if kind == "none":
        return None
    source = open_source(model, REGISTRY, options.requantize, options.revision)
    with Phase("check", total=1):
        result = check(source, Bundle(out), kind)
    for failure in result.failures:  # now: a training may follow
        _LOG.warning("check: %s; do not use this bundle", failure)
    return result
