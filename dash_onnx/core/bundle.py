"""A bundle on disk, opened with every path and checksum checked."""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
from pathlib import Path, PurePosixPath

from dash_onnx.core.atomic import only_copy, write_text
from dash_onnx.core.contract import CARD_NAME, SHARED_DATA, data_name
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

    Opening checks that every file exists in its full size; contents are checked against
    their SHA-256 by `verified`, once per file, so that a lazy load reads only what it runs.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest | None = None,
        sha256: str | None = None,
    ):
        """Opens a bundle.

        Args:
            folder: the folder that `dash-export` wrote.
            manifest: replaces the one in the folder, while a new one is being made.
            sha256: checksum that `dash.json` must have, in hexadecimal; it contains those of all
                other files.

        Raises:
            BundleError: missing, of another format version, incomplete, or a path leads outside.
        """
        self.folder = Path(folder)
        path = self.folder / MANIFEST_NAME
        if not str(folder):
            raise BundleError("no bundle given: name the folder that `dash-export` wrote")
        try:
            there = _is_file(path)
        except (OSError, ValueError) as error:  # such as a name that is too long
            raise BundleError(f"no bundle at {folder}: {error}") from None
        if manifest is None and not there:
            raise BundleError(f"no bundle at {folder}: {_remedy(self.folder)}")
        if sha256 is not None and file_facts(path).sha256 != sha256.lower():
            raise BundleError(f"{path} is not the pinned one: its SHA-256 differs")
        self.manifest = manifest or self._read(path)
        self._verified: set[str] = set()
        for name, facts in self.manifest.files.items():
            file = self.folder / name
            try:
                self._check_inside(name)
                size = file.stat().st_size if _is_file(file) else None
            except (
                OSError,
                ValueError,
                RuntimeError,
            ) as error:  # such as circular links
                raise BundleError(f"{file} cannot be read ({error}); export again") from None
            if size is None:
                raise BundleError(f"{file} is missing from the bundle; export again")
            if size != facts.bytes:
                raise BundleError(
                    f"{file} has {size} bytes, the manifest says {facts.bytes}: "
                    "truncated or edited; export again"
                )
        for name in self.manifest.files:
            if name.endswith((".json", ".jinja")):
                self.verified(name)

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
            raise BundleError(
                f"{MANIFEST_NAME} names {name!r}, which is outside the bundle; refused"
            )

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
        for part in (name, data_name(name), SHARED_DATA.get(name, name)):
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


def _is_file(path: Path) -> bool:
    """Whether there is a file; an OSError if that cannot be told, in each version of Python."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _remedy(folder: Path) -> str:
    """What to do where there is no bundle: perhaps it is a model."""
    name = folder.as_posix()  # a hub id on Windows, too
    if name.endswith(".gguf") and not folder.exists():
        return "there is no such file"
    model = name.endswith(".gguf") or (folder / "config.json").is_file()
    if model or (name.count("/") == 1 and not folder.parent.exists()):
        out = folder.name.removesuffix(".gguf").lower() + "-onnx"
        what = "it is a model" if model else "a hub id is a model"
        command = f"dash-export {shlex.quote(name)} {shlex.quote(out)}"
        cached = "`dash-info` without arguments lists those that dash-run exported"
        return f"{what}, export it first with `{command}`; {cached}"
    missing, out = "there is no such folder", shlex.quote(name)
    if (kept := only_copy(folder)) is not None:
        return f"a process was killed while it replaced it; rename {kept} to {folder.name}"
    if folder.is_file():
        missing, out = "it is a file, which is a model only if its name ends in .gguf", "BUNDLE"
    elif folder.is_dir():
        missing, out = f"{MANIFEST_NAME} is missing", "BUNDLE" if any(folder.iterdir()) else out
    return f"{missing}; make a bundle with `dash-export MODEL {out}`"


def replace_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of an existing bundle, all or nothing."""
    write_text(folder / MANIFEST_NAME, manifest.to_text())


def list_files(folder: Path) -> dict[str, FileFacts]:
    """Facts of every file of a bundle, by POSIX path relative to it.

    The manifest and the card describe these files, and are not among them.
    """
    return {
        path.relative_to(folder).as_posix(): file_facts(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME and path != folder / CARD_NAME
    }
