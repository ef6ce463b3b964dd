"""The training pipeline: a bundle in, the same bundle with a scorer and its tables out."""

from __future__ import annotations

import shutil
from pathlib import Path

from dash_onnx.core.atomic import TRAINING, check_destination, locked, writing
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.card import write_card
from dash_onnx.core.contract import FUSED_FOLDER, REPORT_NAME
from dash_onnx.core.manifest import MANIFEST_NAME, Manifest
from dash_onnx.exporters.device import torch_device
from dash_onnx.exporters.train.finish import Profile, finish
from dash_onnx.exporters.train.improve import improve
from dash_onnx.exporters.train.options import TrainOptions
from dash_onnx.exporters.train.regress import regress
from dash_onnx.exporters.train.trainer import Trainer
from dash_onnx.runtime.machine import release_memory
from dash_onnx.runtime.ort import check_device
from dash_onnx.runtime.profile import profile


def train(folder: Path, options: TrainOptions, *, profile: Profile = profile) -> Manifest:
    """Trains a scorer and the compensation of a bundle, and measures tables and fresh costs.

    The bundle is unchanged until the end, when a trained copy replaces it. After an interruption,
    the next call with the same options continues the training.

    Args:
        folder: folder of the bundle.
        options: the user's options.
        profile: measures the costs.

    Returns:
        The bundle's new manifest.

    Raises:
        DashError: the bundle or the calibration text cannot be used, or another process is
            training the bundle.
    """
    bundle = Bundle(folder)
    check_device(bundle.manifest.target.device)  # for measuring the costs
    check_destination(bundle.folder, overwrite=True)
    with locked(bundle.folder, TRAINING), torch_device(options.device):
        trainer = Trainer(bundle, options)
        learn(trainer)
        with writing(bundle.folder, overwrite=True) as trained:
            # Files that show the old policy must not outlive it.
            old = shutil.ignore_patterns(FUSED_FOLDER, REPORT_NAME)
            shutil.copytree(bundle.folder, trained, symlinks=True, dirs_exist_ok=True, ignore=old)
            manifest = finish(trainer, trained, profile)
            write_card(trained, manifest)
            (trained / MANIFEST_NAME).write_text(manifest.to_text(), "utf-8")
        trainer.checkpoint.remove()
    return manifest


def learn(trainer: Trainer) -> None:
    """The phases that do not change the bundle; each resumes from the checkpoint."""
    for phase in (Trainer.prepare_text, regress, improve):
        phase(trainer)
        release_memory()
