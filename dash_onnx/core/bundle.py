"""A bundle on disk: opened with every path and checksum checked, written all or nothing."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from dash_onnx.core.contract import data_name
from dash_onnx.core.errors import BundleError
from dash_onnx.core.facts import FileFacts
from dash_onnx.core.manifest import MANIFEST_NAME, Manifest


def file_facts(path: Path) -> FileFacts:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileFacts(bytes=path.stat().st_size, sha256=digest)


class Bundle:
    """An opened bundle: a manifest, and files that are verified when they are first used.

    Opening checks that every file is there in its full size; contents are checked against
    their SHA-256 by `verified`, once per file, so that a lazy load reads only what it runs.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest | None = None):
        """Opens a bundle.

        Args:
            folder: the folder that `dash-export` wrote.
            manifest: instead of the one in the folder, while a new one is in the making.

        Raises:
            BundleError: missing, of another format version, incomplete, or a path leaves it.
        """
        self.folder = Path(folder)
        path = self.folder / MANIFEST_NAME
        if not path.is_file():
            raise BundleError(
                f"no bundle at {self.folder}: {MANIFEST_NAME} is missing; "
                f"make one with `dash-export MODEL {self.folder}`"
            )
        self.manifest = manifest or self._read(path)
        self._verified: set[str] = set()
        for name, facts in self.manifest.files.items():
            self._check_inside(name)
            file = self.folder / name
            if not file.is_file():
                raise BundleError(f"{file} is missing from the bundle; export again")
            size = file.stat().st_size
            if size != facts.bytes:
                raise BundleError(
                    f"{file} has {size} bytes, the manifest says {facts.bytes}: "
                    "truncated or edited; export again"
                )

    @staticmethod
    def _read(path: Path) -> Manifest:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise BundleError(f"{path} is not UTF-8 text; export again") from None
        return Manifest.from_text(text, str(path))

    def _check_inside(self, name: str) -> None:
        parts = PurePosixPath(name)
        outside = parts.is_absolute() or ".." in parts.parts or any(c in name for c in "\\:\0")
        if outside or not (self.folder / name).resolve().is_relative_to(self.folder.resolve()):
            raise BundleError(f"{MANIFEST_NAME} names {name!r}, which leaves the bundle; refused")

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.files

    def verified(self, name: str) -> Path:
        """Returns the path of a file (and of its weights) after checking the contents.

        Args:
            name: path inside the bundle, as the manifest lists it.

        Raises:
            BundleError: not part of the bundle, or its SHA-256 differs.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder} has no {name}; export again")
        for part in (name, data_name(name)):
            facts = self.manifest.files.get(part)
            if part in self._verified or (facts is None and not (self.folder / part).exists()):
                continue
            try:
                found = file_facts(self.folder / part)
            except OSError as error:
                raise BundleError(f"cannot read {self.folder / part}: {error.strerror}") from None
            if found != facts:
                raise BundleError(
                    f"{self.folder / part} does not match its SHA-256 in {MANIFEST_NAME}: "
                    "truncated or edited; export again"
                )
            self._verified.add(part)
        return self.folder / name


def check_destination(folder: Path, overwrite: bool, marker: str = MANIFEST_NAME) -> None:
    """Refuses a destination that must not be written, before any expensive work.

    Args:
        folder: the destination.
        overwrite: whether it may be replaced.
        marker: the file that every folder of this kind holds.

    Raises:
        BundleError: it exists without `overwrite`, holds something of another kind, or cannot be
            renamed.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.resolve().is_mount():  # unresolved, `.` looks like one
        raise BundleError(f"{folder} is a mount point: give a folder inside it")
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / marker).is_file():
        what = "is not a bundle" if marker == MANIFEST_NAME else f"holds no {marker}"
        raise BundleError(f"{folder} exists and {what}; choose another folder")
    if not overwrite:
        raise BundleError(f"{folder} exists; pass --overwrite to replace it")


def replace_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of an existing bundle, all or nothing."""
    temporary = folder / f"{MANIFEST_NAME}.partial"
    temporary.write_text(manifest.to_text(), "utf-8")
    temporary.replace(folder / MANIFEST_NAME)


@contextmanager
def writing(folder: Path, *, overwrite: bool, marker: str = MANIFEST_NAME) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes `folder` when the block succeeds.

    On any error or interrupt the temporary folder is removed and `folder` is untouched. What an
    earlier process left that was killed is removed, too.

    Raises:
        BundleError: see `check_destination`.
    """
    check_destination(folder, overwrite, marker)
    folder = folder.resolve()
    _sweep(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        lock = _locked(temporary)
    except OSError as error:
        raise BundleError(f"cannot write {folder}: {error.strerror}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        check_destination(folder, overwrite, marker)
        retired = temporary.with_name(temporary.name.replace(".partial-", ".replaced-"))
        move_into_place(temporary, folder, retired)
        if retired.exists():
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
        os.close(lock)


def _locked(folder: Path) -> int:
    """Locks a folder for as long as this process lives; raises OSError where another has it."""
    import fcntl  # bundles are written on POSIX systems only, and read anywhere

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(folder: Path) -> None:
    """Removes what killed processes left beside a folder."""
    for state in ("replaced", "partial"):
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.{state}-*"):
            made = left.with_name(left.name.replace(".replaced-", ".partial-"))
            try:
                lock = _locked(made) if made.exists() else None
            except OSError:  # its process is alive
                continue
            if state == "partial" or folder.exists():  # else it is the only copy
                shutil.rmtree(left, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def move_into_place(temporary: Path, folder: Path, retired: Path) -> None:
    """Makes `temporary` the folder; what was there goes to `retired`, or stays on any error."""
    if folder.exists():
        folder.rename(retired)
    try:
        temporary.rename(folder)
    except BaseException:  # Ctrl-C between the two renames
        if retired.exists():
            retired.rename(folder)
        raise


def list_files(folder: Path) -> dict[str, FileFacts]:
    """Facts of every file below `folder` but the manifest, by POSIX path relative to it."""
    return {
        path.relative_to(folder).as_posix(): file_facts(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
