"""An export in the making: a folder beside its destination, locked, and enough to go on from."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from dash_onnx.core.bundle import check_destination, move_into_place
from dash_onnx.core.errors import BundleError
from dash_onnx.core.facts import Calibration, LayerFacts
from dash_onnx.core.records import RecordError, from_json, to_json
from dash_onnx.exporters.calibrate import Ids
from dash_onnx.exporters.states import States

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """What is finished: the embedding, and some layers.

    Attributes:
        layers: facts of those that are finished.
        fp32_kept: see `ExportFacts`, of what is finished.
        seconds: of all processes that took part.
        peak_rss_bytes: the highest of theirs.
    """

    layers: tuple[LayerFacts, ...] = ()
    fp32_kept: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_rss_bytes: int = 0


class Partial:
    """The folder `.OUT.partial`.

    Attributes:
        bundle: what becomes the destination.
    """

    def __init__(self, folder: Path):
        """Reads nothing yet."""
        self._folder = folder
        self.bundle = folder / "bundle"

    def states(self, layer: int) -> States:
        """Input of a layer, or the output of the last one."""
        return States(self._folder / f"hidden-{layer:02d}.npy")

    def progress(self) -> Progress | None:
        """What an earlier process finished; None where not even the embedding is."""
        return self._read(Progress, "progress")

    def finish(self, progress: Progress) -> None:
        """Notes what is finished; the input of its last layer is not needed any more."""
        self._write("progress", progress)
        for layer in range(len(progress.layers)):
            self.states(layer).path.unlink(missing_ok=True)

    def calibration(self, make: Callable[[], tuple[Ids, Calibration]]) -> tuple[Ids, Calibration]:
        """The calibration tokens, made by the first of the processes."""
        path = self._folder / "ids.npy"
        known = self._read(Calibration, "calibration")
        if known is None:
            ids, known = make()
            np.save(path, ids)
            self._write("calibration", known)
        return np.load(path), known

    def begin(self, key: Mapping[str, str], resume: bool) -> None:
        """Clears the folder, or takes up what is there.

        Raises:
            BundleError: that was another export.
        """
        path = self._folder / "key.json"
        if resume and path.is_file() and self.bundle.is_dir():
            found = json.loads(path.read_text("utf-8"))
            changed = sorted(k for k in {*found, *key} if found.get(k) != key.get(k))
            if changed:
                raise BundleError(
                    f"{self._folder} holds an export with another {', '.join(changed)}; "
                    "repeat that one, or leave --resume out to start afresh"
                )
            return
        self.clear()
        self.bundle.mkdir()
        _replace(path, json.dumps(key))

    def clear(self) -> None:
        """Removes everything but the lock."""
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _read(self, kind: type[T], name: str) -> T | None:
        path = self._folder / f"{name}.json"
        try:
            return from_json(kind, json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, RecordError) as error:
            raise BundleError(f"{path} is damaged ({error}); leave --resume out") from None

    def _write(self, name: str, record: Progress | Calibration) -> None:
        _replace(self._folder / f"{name}.json", json.dumps(to_json(record)))


@contextmanager
def exporting(
    out: Path, key: Mapping[str, str], *, overwrite: bool, resume: bool
) -> Iterator[Partial]:
    """Yields the partial folder, whose bundle becomes `out` when the block succeeds.

    On an error or interrupt, what is finished is kept where `resume` is set, else removed.

    Args:
        out: the destination.
        key: what the export depends on, by name.
        overwrite: whether `out` may be replaced.
        resume: go on with what a process that is dead has finished.

    Raises:
        BundleError: `out` must not be written, another process is at it, or there is nothing
            that could be gone on with.
    """
    check_destination(out, overwrite)
    out = out.resolve()
    folder = out.with_name(f".{out.name}.partial")
    with _locked(folder, out):
        partial, retired = Partial(folder), folder / "replaced"
        if retired.is_dir() and not out.exists():  # killed between two renames
            retired.rename(out)
            check_destination(out, overwrite)
        partial.begin(key, resume)
        keep = False
        try:
            yield partial
            check_destination(out, overwrite)
            move_into_place(partial.bundle, out, retired)
        except BaseException:
            keep = resume and partial.progress() is not None
            raise
        finally:
            if not keep:  # the lock last: until then no other process takes the folder
                partial.clear()
                (folder / "lock").unlink()
                with suppress(OSError):  # another process has it already
                    folder.rmdir()


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Makes the folder, and holds a lock that ends with the process."""
    path = folder / "lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except FileNotFoundError:  # removed in between by the process that had it
            continue
        except OSError as error:
            raise BundleError(f"cannot write {out}: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BundleError(
                    f"another dash-export is writing {out}; wait for it or choose another folder"
                ) from None
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                yield
                return


def _replace(path: Path, text: str) -> None:
    """Writes a file, all or nothing."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
