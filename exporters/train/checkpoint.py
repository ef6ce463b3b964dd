"""The state of a training, so that an interrupted training resumes where it was last saved."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

from dash_onnx.core.atomic import TRAINING, clear, new_file, workspace_of
from dash_onnx.core.errors import DashError, first_line

_LOG = logging.getLogger(__name__)

_NAME = "state.pt"
_EVERY_S = 60  # in the middle of a phase


class Checkpoint:
    """A sibling folder of the bundle, which exists while training runs or is interrupted.

    Attributes:
        state: what the phases saved, by name.
        started: start time by `time.monotonic`, earlier by the time of interrupted runs.
    """

    started = 0.0
    _saved = math.inf

    def __init__(self, bundle: Path, fingerprint: str):
        """Reads the state that an interrupted run with the same fingerprint left.

        Args:
            bundle: folder of the bundle.
            fingerprint: hash of everything that determines the course of the training.
        """
        self._folder = workspace_of(bundle, TRAINING)
        self._fingerprint = fingerprint
        self.started = self._saved = time.monotonic()
        self.state: dict[str, Any] = {}
        try:
            found = torch.load(self._folder / _NAME, torch.get_default_device(), weights_only=True)
        except Exception:  # absent, or damaged in some way: start over
            return
        if isinstance(found, dict) and found.get("fingerprint") == fingerprint:
            self.state = found
            self.started -= found.get("seconds", 0.0)
        else:
            _LOG.warning(
                "%s holds a training with other options, text or costs: starting again",
                self._folder,
            )

    @property
    def due(self) -> bool:
        """Whether enough time has passed since the last save for a phase to save its progress."""
        return time.monotonic() - self._saved > _EVERY_S

    def save(self, **values: Any) -> None:
        """Adds values to the state and writes all of it.

        Raises:
            DashError: the disk is full.
        """
        seconds = time.monotonic() - self.started
        self.state.update(values, fingerprint=self._fingerprint, seconds=seconds)
        self._folder.mkdir(exist_ok=True)
        path = self._folder / _NAME
        try:
            with new_file(path) as temporary:
                torch.save(self.state, temporary)
        except RuntimeError as error:  # torch raises this if the disk is full
            raise DashError(f"cannot write {path}: {first_line(error)}") from None
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Clears the folder after training; the holder of its lock removes it."""
        if self._folder.is_dir():
            clear(self._folder)
