"""The training pipeline: a bundle in, the same bundle with a scorer and its tables out."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from dash_onnx.core.atomic import TRAINING, check_destination, check_room, locked, writing
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.card import write_card
from dash_onnx.core.contract import FUSED_FOLDER, REPORT_NAME
from dash_onnx.core.errors import BundleError
from dash_onnx.core.manifest import MANIFEST_NAME, Manifest
from dash_onnx.exporters.device import torch_device
from dash_onnx.exporters.train.finish import Profile, finish
from dash_onnx.exporters.train.improve import improve
from dash_onnx.exporters.train.options import TrainOptions
from dash_onnx.exporters.train.regress import regress
from dash_onnx.exporters.train.trainer import Trainer
from dash_onnx.runtime.machine import machine_name, release_memory
from dash_onnx.runtime.ort import check_device
from dash_onnx.runtime.profile import profile

_LOG = logging.getLogger(__name__)


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
            training the bundle; there is too little disk space; or an export replaced the bundle
            meanwhile.
    """
    folder = Bundle(folder).folder
    check_destination(folder, overwrite=True)
    with locked(folder, TRAINING), torch_device(options.device):
        bundle = Bundle(folder)  # as it is now that no profile changes it
        check_device(bundle.manifest.target.device)  # for measuring the costs
        size = sum(facts.bytes for facts in bundle.manifest.files.values())
        check_room("the trained bundle", size, folder, "make room")
        if (timed := bundle.manifest.costs.machine) != machine_name():
            told = "the policy learns with times of another machine, %s: run dash-profile first"
            _LOG.warning(told, timed)
        trainer = Trainer(bundle, options)
        learn(trainer)
        with writing(folder, overwrite=True) as trained:
            _check_unchanged(bundle)
            # Files that show the old policy must not outlive it.
            old = shutil.ignore_patterns(FUSED_FOLDER, f".{FUSED_FOLDER}.*", REPORT_NAME)
            shutil.copytree(folder, trained, symlinks=True, dirs_exist_ok=True, ignore=old)
            manifest = finish(trainer, trained, profile)
            write_card(trained, manifest)
            (trained / MANIFEST_NAME).write_text(manifest.to_text(), "utf-8")
            _check_unchanged(bundle)
        trainer.checkpoint.remove()
    return manifest


def _check_unchanged(bundle: Bundle) -> None:
    """Refuses to write over a bundle that an export, which does not take its lock, has replaced."""
    if Bundle(bundle.folder).manifest != bundle.manifest:
        raise BundleError(f"{bundle.folder} was replaced meanwhile: train it again")


def learn(trainer: Trainer) -> None:
    """The phases that do not change the bundle; each resumes from the checkpoint."""
    for phase in (Trainer.prepare_text, regress, improve):
        phase(trainer)
        release_memory()
