"""An unfinished export: a locked folder next to its destination, with all that resuming needs."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from dash_onnx.core.atomic import NEW, PARTIAL, clear, workspace, workspace_of, write_text
from dash_onnx.core.errors import ResumeError, UnsupportedError
from dash_onnx.core.facts import Calibration, LayerFacts
from dash_onnx.core.records import RecordError, from_json
from dash_onnx.exporters.calibration.hidden_states import HiddenStateFile
from dash_onnx.exporters.calibration.tokens import Ids

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What is finished: the embedding, and some layers.

    Attributes:
        layers: facts of the finished layers.
        fp32_kept: see `ExportFacts`, for the finished part.
        seconds: total time of all processes that took part.
        peak_rss_bytes: highest peak among them.
    """

    layers: tuple[LayerFacts, ...] = ()
    fp32_kept: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_rss_bytes: int = 0


class Partial:
    """The folder `.OUT.partial`.

    Attributes:
        bundle: the folder that becomes the destination.
    """

    def __init__(self, folder: Path):
        """Does not read anything yet."""
        self._folder = folder
        self.bundle = folder / NEW

    def states(self, layer: int) -> HiddenStateFile:
        """Input of a layer, or the output of the last one."""
        return HiddenStateFile(self._folder / f"hidden-{layer:02d}.npy")

    def draft(self) -> Path:
        """An empty folder for the bundle that writes the calibration text."""
        folder = self._folder / "draft"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def progress(self) -> Progress | None:
        """What an earlier process finished; None if not even the embedding is."""
        return self._read(Progress, "progress")

    def finish(self, progress: Progress) -> None:
        """Records what is finished, and removes the hidden states that are no longer needed."""
        self._write("progress", dataclasses.asdict(progress))
        for layer in range(len(progress.layers)):
            self.states(layer).path.unlink(missing_ok=True)

    def calibration(self) -> tuple[Ids, Calibration] | None:
        """The calibration tokens; None if there are none yet."""
        known, path = self._read(Calibration, "calibration"), self._folder / "ids.npy"
        if known is None:
            return None
        try:
            return np.load(path), known
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(path, error) from None

    def calibrate(self, ids: Ids, facts: Calibration) -> None:
        """Keeps the calibration tokens."""
        shutil.rmtree(self._folder / "draft", ignore_errors=True)
        np.save(self._folder / "ids.npy", ids)
        self._write("calibration", dataclasses.asdict(facts))

    def begin(self, key: Mapping[str, str], overwrite: bool) -> None:
        """Continues with what the folder holds of the same export, or clears it.

        Args:
            key: see `exporting`.
            overwrite: discard what cannot be continued, even if layers are finished.

        Raises:
            ResumeError: it holds finished layers of a different export, or is damaged.
        """
        if (self._folder / "calibration.json").is_file() and self.bundle.is_dir():
            try:
                self._check(key)
            except ResumeError as error:
                if not overwrite and (self._folder / "progress.json").is_file():
                    raise
                _LOG.warning("%s: discarding it", error.reason)
            else:
                _LOG.info("continuing the interrupted export in %s", self._folder)
                return
        # First of all, so that nothing continues from a folder that is half cleared.
        (self._folder / "calibration.json").unlink(missing_ok=True)
        clear(self._folder)
        self.bundle.mkdir()
        self._write("key", key)

    def _check(self, key: Mapping[str, str]) -> None:
        """Raises a ResumeError unless an export with this key can continue from here."""
        path = self._folder / "key.json"
        try:
            found = dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(path, error) from None
        if changed := sorted(k for k in {*found, *key} if found.get(k) != key.get(k)):
            raise ResumeError(
                f"{self._folder} holds an interrupted export with another {', '.join(changed)}",
                "repeat that export, or pass --overwrite to start again",
            )
        self.progress()
        self.calibration()

    def _read(self, kind: type[T], name: str) -> T | None:
        path = self._folder / f"{name}.json"
        try:
            return from_json(kind, json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, RecordError) as error:
            raise _damaged(path, error) from None

    def _write(self, name: str, data: object) -> None:
        write_text(self._folder / f"{name}.json", json.dumps(data))


def _damaged(path: Path, error: Exception) -> ResumeError:
    return ResumeError(f"{path} is damaged ({error})", "pass --overwrite to start again")


def unfinished_bytes(out: Path) -> int:
    """Bytes on disk of an interrupted export of `out`, which the next export reuses."""
    space = workspace_of(out, PARTIAL)
    return sum(path.stat().st_size for path in space.rglob("*") if path.is_file())


@contextmanager
def exporting(out: Path, key: Mapping[str, str], *, overwrite: bool) -> Iterator[Partial]:
    """Yields the partial folder, whose bundle becomes `out` when the block succeeds.

    On an error or interrupt, what is finished is kept, and the next export continues from it; a
    note of the exception says so. If the model is unsupported, nothing is kept.

    Args:
        out: the destination.
        key: what the export depends on, by name.
        overwrite: whether `out` may be replaced, and what is finished of a different export.

    Raises:
        BundleError: `out` may not be replaced, or another process is working on it.
        ResumeError: layers of a different export are finished, or what is finished is damaged.
    """

    def keep(space: Path) -> bool:
        return (space / "calibration.json").exists()

    with workspace(out, PARTIAL, overwrite=overwrite, keep=keep) as space:
        partial = Partial(space)
        partial.begin(key, overwrite)
        try:
            yield partial
        except UnsupportedError:  # the command will fail again
            clear(space)
            raise
        except BaseException as error:
            if keep(space):
                error.add_note(
                    f"{space} keeps what is finished; the same command continues from there"
                )
            raise
