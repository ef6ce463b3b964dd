"""Bundles in a cache: a model that is named where a bundle is expected is exported there, once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dash_onnx.core.atomic import waiting_lock, write_text
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import DashError, SourceError
from dash_onnx.core.gguf import parts_of, stem_of
from dash_onnx.core.manifest import MANIFEST_NAME
from dash_onnx.core.version import FORMAT_VERSION

_LOG = logging.getLogger(__name__)
_LIMIT_GB = 50.0
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_WEIGHTS = ("config.json", "tokenizer*", "*.safetensors", "*.jinja")  # of a model's folder


@dataclass(frozen=True)
class Entry:
    """A bundle in the cache.

    Attributes:
        folder: of the bundle.
        source: the model that it was made from, as it was named; a path is absolute.
        used: when it was last used, in seconds since 1970.
    """

    folder: Path
    source: str
    used: float

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())


def cache_folder() -> Path:
    """`DASH_CACHE`, or `dash-onnx` in the user's cache."""
    if chosen := os.environ.get("DASH_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dash-onnx"


def bundle_of(name: str | Path) -> str | Path:
    """The bundle that an argument names: itself, or the one in the cache that is made from it.

    Args:
        name: a bundle's folder; or a model as `dash-export` takes it, which is exported first
            unless it is in the cache, without training.

    Raises:
        DashError: the model cannot be exported. What was finished is kept for the next time.
    """
    source = _source(str(name))
    if source is None:
        return name
    folder = cache_folder() / _entry_name(source)
    if not (folder / MANIFEST_NAME).is_file():
        _make(source, folder)
    _note(folder).touch()
    return folder


def model_name(name: str | Path) -> str:
    """What a server calls the bundle that an argument names."""
    return stem_of(Path(name).resolve().name)


def entries() -> list[Entry]:
    """What is in the cache, the most recently used first."""
    return sorted(_entries(), key=lambda entry: -entry.used)


def remove(name: str) -> list[Entry]:
    """Removes the bundles of a model from the cache.

    Args:
        name: its source as listed, or the bundle's folder name.

    Raises:
        SourceError: there is none.
    """
    source = _source(name) or name
    found = [entry for entry in _entries() if name == entry.folder.name or source == entry.source]
    if not found:
        raise SourceError(f"{name} is not in the cache: `dash-info` lists what is")
    for entry in found:
        _remove(entry)
    return found


def _source(name: str) -> str | None:
    """What a model is called in the cache; None for what is no model."""
    path = Path(name)
    if (path / MANIFEST_NAME).is_file():
        return None
    if path.is_file() and name.endswith(".gguf"):
        return str(path.resolve())
    if (path / "config.json").is_file():
        return str(path.resolve())
    if _HUB_ID.fullmatch(name) and not path.exists() and not path.parent.exists():
        return name
    return None


def _entry_name(source: str) -> str:
    """Of the folder: it changes with the content of the source, and the form of bundles."""
    path = Path(source)
    files = [path.with_name(part) for part in parts_of(path.name)] if path.is_file() else []
    if path.is_dir():
        files = sorted({file for pattern in _WEIGHTS for file in path.glob(pattern)})
    found = [
        (file.name, (state := file.stat()).st_size, state.st_mtime_ns)
        for file in files
        if file.is_file()
    ]
    digest = hashlib.sha256(json.dumps([source, found, FORMAT_VERSION]).encode()).hexdigest()
    stem = re.sub(r"[^\w.-]+", "-", model_name(source))[:60]
    return f"{stem}-{digest[:10]}"


def _make(source: str, folder: Path) -> None:
    """Exports a model into the cache; another process that does so is waited for."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DashError(
            f"cannot write the cache {folder.parent}: {error.strerror}; set DASH_CACHE"
        ) from None

    def waits() -> None:
        _LOG.warning("another process is exporting %s: waiting for it", source)

    limit = _limit_bytes()
    with waiting_lock(folder.parent / f".{folder.name}.lock", waits):
        if (folder / MANIFEST_NAME).is_file():
            return
        _LOG.info("exporting %s once, into %s", source, folder)
        from dash_onnx.cli.prepare import prepare_export

        prepare_export()
        from dash_onnx.exporters.export import ExportOptions, export

        export(source, folder, ExportOptions(resume=True))
        write_text(_note(folder), json.dumps({"source": source, "made": time.time()}))
        for entry in _entries():  # made from what the source was before
            if entry.source == source and entry.folder != folder:
                _remove(entry)
        _make_room(folder, limit)


def _make_room(newest: Path, limit: float) -> None:
    """Removes what was not used for longest until the cache keeps its limit."""
    found = [(entry, entry.bytes) for entry in entries()]
    total = sum(size for _, size in found)
    others = [(entry, size) for entry, size in found if entry.folder != newest]
    while others and total > limit:
        entry, size = others.pop()
        total -= size
        _LOG.info("removing %s from the cache: DASH_CACHE_GB is its limit", entry.source)
        _remove(entry)


def _limit_bytes() -> float:
    text = os.environ.get("DASH_CACHE_GB", "")
    try:
        limit = float(text or _LIMIT_GB)
    except ValueError:
        limit = -1.0
    if not limit > 0:
        raise DashError(f"DASH_CACHE_GB={text} must be a number of gigabytes")
    return limit * 1e9


def _entries() -> Iterator[Entry]:
    for note in cache_folder().glob("*.json"):
        folder = note.with_suffix("")
        try:
            source, used = json.loads(note.read_text("utf-8"))["source"], note.stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if (folder / MANIFEST_NAME).is_file():
            yield Entry(folder, str(source), used)


def _remove(entry: Entry) -> None:
    shutil.rmtree(entry.folder, ignore_errors=True)
    _note(entry.folder).unlink(missing_ok=True)


def _note(folder: Path) -> Path:
    """The file that says what a bundle was made from, and when it was last used."""
    return folder.with_name(f"{folder.name}.json")


def listing() -> tuple[list[dict[str, object]], list[str]]:
    """The cache for programs, and as lines for people."""
    facts: list[dict[str, object]] = []
    lines = []
    for entry in entries():
        manifest = Bundle(entry.folder).manifest
        trained, origin = manifest.scorer is not None, manifest.export.source
        facts.append(
            {
                "name": entry.folder.name,
                "source": entry.source,
                "made_from": origin,
                "bytes": entry.bytes,
                "used": entry.used,
                "trained": trained,
            }
        )
        policy = ", with a policy" if trained else ""
        commit = f", from commit {origin.rpartition('@')[2][:10]}" if "@" in origin else ""
        day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        lines.append(f"{entry.source}: {entry.bytes / 1e6:.0f} MB, used {day}{commit}{policy}")
    return facts, [*lines, f"{len(lines)} in {cache_folder()}"]
