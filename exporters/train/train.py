"""The training pipeline: a bundle in, the same bundle with a scorer and its tables out."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from dash_onnx.core.atomic import check_destination, writing
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import FUSED_FOLDER, REPORT_NAME
from dash_onnx.core.manifest import MANIFEST_NAME, Manifest
from dash_onnx.exporters.train.describe import describe
from dash_onnx.exporters.train.improve import improve
from dash_onnx.exporters.train.learning import Learning
from dash_onnx.exporters.train.options import TrainOptions
from dash_onnx.exporters.train.regress import regress
from dash_onnx.runtime.machine import kept_memory
from dash_onnx.runtime.ort import check_device


def train(folder: Path, options: TrainOptions) -> Manifest:
    """Trains a scorer and the compensation of a bundle, and measures tables and fresh costs.

    The bundle stays as it was until the end, when a trained copy takes its place. An interrupted
    run goes on at the next call with the same options.

    Raises:
        DashError: the bundle or the calibration text cannot be used.
    """
    started = time.monotonic()
    bundle = Bundle(folder)
    check_device(bundle.manifest.target.device)  # the costs are measured there
    check_destination(bundle.folder, overwrite=True)
    run = Learning(bundle, options)
    with kept_memory():
        run.texts()
        regress(run)
        improve(run)
    with writing(run.bundle.folder, overwrite=True) as trained:
        # What shows the old policy must not outlive it.
        old = shutil.ignore_patterns(FUSED_FOLDER, REPORT_NAME)
        shutil.copytree(run.bundle.folder, trained, symlinks=True, dirs_exist_ok=True, ignore=old)
        manifest = describe(run, trained, started)
        (trained / MANIFEST_NAME).write_text(manifest.to_text(), "utf-8")
    run.checkpoint.remove()
    return manifest
