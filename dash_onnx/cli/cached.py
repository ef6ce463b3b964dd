"""A cache of bundles: a model named where a bundle is expected is exported into it once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from dash_onnx.core.atomic import (
    PARTIAL,
    TRAINING,
    WRITING,
    discard,
    waiting_lock,
    workspace_of,
    write_text,
)
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import BundleError, DashError, SourceError, first_line
from dash_onnx.core.gguf import parts_of, stem_of
from dash_onnx.core.manifest import MANIFEST_NAME
from dash_onnx.core.version import FORMAT_VERSION

_LOG = logging.getLogger(__name__)
_LIMIT_GB = 50.0
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_WORKSPACES = (PARTIAL, WRITING, TRAINING)
_WEIGHTS = (  # files that define a model
    *("config.json", "generation_config.json", "chat_template.json", "tokenizer*"),
    *("*.safetensors", "*.jinja", "merges.txt", "vocab.json"),
)


_IN_USE = ExitStack()
"""Shared locks on the bundles that this process uses, until it ends."""


@dataclass(frozen=True)
class Entry:
    """A bundle in the cache, or what an interrupted export of it left.

    Attributes:
        folder: folder of the bundle.
        source: the model that it is made from, as the user named it; a path is made absolute. If
            unknown, the name of the folder.
        used: time of last use, in seconds since 1970.
    """

    folder: Path
    source: str
    used: float

    @property
    def finished(self) -> bool:
        """Whether the bundle is complete."""
        return (self.folder / MANIFEST_NAME).is_file()

    @property
    def trained(self) -> bool:
        """Whether it has a policy that this version can run, or an unfinished training."""
        if any(workspace_of(self.folder, TRAINING).glob("*.*")):  # more than its lock
            return True
        try:
            return Bundle(self.folder).manifest.scorer is not None
        except (DashError, OSError):
            return False

    @property
    def bytes(self) -> int:
        """Its size on disk, including files that an export or training keeps next to it."""
        total = 0
        for place in (self.folder, *(workspace_of(self.folder, name) for name in _WORKSPACES)):
            for parent, _, files in os.walk(place):
                for file in files:
                    with suppress(OSError):  # another process is working on it
                        total += os.stat(os.path.join(parent, file)).st_size
        return total


def cache_folder() -> Path:
    """`DASH_CACHE`, or `dash-onnx` in the user's cache; a DashError without a home folder."""
    chosen, usual = map(os.environ.get, ("DASH_CACHE", "XDG_CACHE_HOME"))
    try:
        return Path(chosen or f"{usual or '~/.cache'}/dash-onnx").expanduser()
    except RuntimeError:
        raise DashError("there is no home folder: set DASH_CACHE to a folder") from None


def bundle_of(name: str | Path) -> str | Path:
    """The bundle that an argument names: a bundle itself, or the one in the cache for a model.

    No process removes a bundle from the cache while this one, which uses it, runs.

    Args:
        name: a bundle's folder; or a model as `dash-export` takes it, which is exported first
            unless it is in the cache, without training.

    Raises:
        DashError: the model cannot be exported. Finished work is kept for the next attempt.
    """
    found = _place(name)
    if found is None:
        return name
    while not _claim(*found):
        _make(*found)
    return found[1]


def known_bundle(name: str | Path) -> str | Path:
    """Like `bundle_of` without an export: for a model not in the cache, the name is returned."""
    try:
        found = _place(name)
        return name if found is None or not _claim(*found) else found[1]
    except (OSError, ValueError):  # not a possible file name, or a cache of somebody else's
        return name


def model_name(name: str | Path) -> str:
    """The name under which a server offers a bundle; for one in the cache, after its source."""
    path = Path(name).resolve()
    return stem_of(Path(_origin(path) or path).name)


def entries() -> list[Entry]:
    """Entries of the cache, most recently used first."""
    return sorted(_entries(), key=lambda entry: -entry.used)


def remove(name: str) -> list[Entry]:
    """Removes the bundles of a model from the cache, including interrupted exports.

    Args:
        name: its source as listed, or the folder of the bundle or its name.

    Raises:
        SourceError: there is no such bundle.
        BundleError: another process is exporting, training or using it.
    """
    source, path = _source(name) or name, Path(name)
    found = [
        entry
        for entry in _entries()
        if source == entry.source or path in (entry.folder, Path(entry.folder.name))
    ]
    if not found:
        raise SourceError(f"{name} is not in the cache: `dash-info` lists its models")
    for entry in found:
        _remove(entry)
    return found


def _place(name: str | Path) -> tuple[str, Path] | None:
    """Name of a model in the cache, and the folder of its bundle; None for anything else."""
    if (Path(name) / MANIFEST_NAME).is_file():
        folder = Path(name).resolve()
        source = _origin(folder)
        return None if source is None else (source, folder)
    # Windows writes a hub id with a backslash.
    source = _source(name.as_posix() if isinstance(name, PurePath) else name)
    return None if source is None else (source, cache_folder() / _entry_name(source))


def _source(name: str) -> str | None:
    """Name of a model in the cache; None if it is not a model."""
    path = Path(name)
    if (path / MANIFEST_NAME).is_file():
        return None
    if path.is_file() and name.endswith(".gguf"):
        return str(path.resolve())
    if (path / "config.json").is_file():
        return str(path.resolve())
    if _HUB_ID.fullmatch(name) and not path.exists():
        cached = cache_folder() / _entry_name(name)
        return name if cached.exists() or not path.parent.exists() else None
    return None


def _entry_name(source: str) -> str:
    """Name of the folder: it changes with the content of the source and with the bundle format."""
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
    """Exports a model into the cache, waiting for another process that is doing so.

    An interrupted export is continued, or discarded if that is not possible.
    """
    from dash_onnx.exporters.installed import require

    require()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DashError(
            f"cannot write the cache {folder.parent}: {error.strerror}; set DASH_CACHE"
        ) from None

    def waits() -> None:
        _LOG.warning("another process is exporting %s: waiting for it", source)

    limit = _limit_bytes()
    with waiting_lock(_lock(folder), waits):
        if (folder / MANIFEST_NAME).is_file():
            return
        _LOG.info("exporting %s once, into %s", source, folder)
        from dash_onnx.cli.prepare import prepare_export

        prepare_export()
        from dash_onnx.exporters.export import ExportOptions
        from dash_onnx.exporters.pipeline import build

        _used(source, folder)  # names what an interrupted export leaves
        shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted removal
        build(source, folder, ExportOptions(overwrite=True), check="none")
        _hold(folder)
        for entry in _entries():  # made from an earlier state of the source
            if entry.source == source and entry.folder != folder and not entry.trained:
                with suppress(BundleError, OSError):  # in use, or another user's
                    _remove(entry)
        _make_room(folder, limit)


def _make_room(newest: Path, limit: float) -> None:
    """Removes least recently used, untrained entries until the cache is within its limit."""
    found = [(entry, entry.bytes) for entry in entries()]
    total = sum(size for _, size in found)
    others = [(entry, size) for entry, size in found if entry.folder != newest]
    while others and total > limit:
        entry, size = others.pop()
        if entry.trained:
            continue
        try:
            _remove(entry)
        except (BundleError, OSError):  # in use, or another user's
            continue
        total -= size
        _LOG.info("removed %s from the cache, which DASH_CACHE_GB limits", entry.source)


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
    """One per name with a note or a lock: other folders belong to the user."""
    cache = cache_folder()
    names = {note.stem for note in cache.glob("*.json") if _noted(note) is not None}
    names |= {lock.name[1 : -len(".lock")] for lock in cache.glob(".?*.lock")}
    for name in sorted(names):
        note, folder = _note(cache / name), cache / name
        used = 0.0
        for path in (note, folder, workspace_of(folder, PARTIAL)):
            with suppress(OSError):
                used = path.stat().st_mtime
                break
        entry = Entry(folder, _noted(note) or name, used)
        if entry.finished or entry.bytes:
            yield entry


def _remove(entry: Entry) -> None:
    """Removes everything that belongs to an entry.

    Raises:
        BundleError: another process is exporting, training or using it.
    """

    def refuse() -> None:
        doing = "using" if entry.finished else "exporting"
        raise BundleError(f"another process is {doing} {entry.source}: wait for it, or stop it")

    with waiting_lock(_lock(entry.folder), refuse), waiting_lock(_users(entry.folder), refuse):
        for name in _WORKSPACES:
            discard(entry.folder, name)
        (entry.folder / MANIFEST_NAME).unlink(missing_ok=True)  # first: without it, no bundle
        shutil.rmtree(entry.folder, ignore_errors=True)
        _note(entry.folder).unlink(missing_ok=True)


def _claim(source: str, folder: Path) -> bool:
    """Whether the bundle is there; if so, it stays there while this process runs."""
    if not (folder / MANIFEST_NAME).is_file():
        return False
    _hold(folder)
    with suppress(DashError, OSError):  # a read-only cache can still be used
        _used(source, folder)
    return (folder / MANIFEST_NAME).is_file()  # not removed before it was held


def _hold(folder: Path) -> None:
    """Keeps others from removing a bundle while this process runs."""
    with suppress(OSError):  # of a read-only cache, from which nothing is removed
        _IN_USE.enter_context(waiting_lock(_users(folder), shared=True))


def _used(source: str, folder: Path) -> None:
    """Records that a bundle is in use, and its source if that is not yet recorded."""
    note = _note(folder)
    if _noted(note) == source:
        note.touch()
    else:
        write_text(note, json.dumps({"source": source}))


def _noted(note: Path) -> str | None:
    """The source recorded in a note; None if the note is missing or damaged."""
    try:
        source = json.loads(note.read_text("utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return source if isinstance(source, str) else None


def _origin(folder: Path) -> str | None:
    """The source of a bundle in the cache; None for any other folder, or if the note is lost."""
    with suppress(DashError):  # without a home folder there is no cache, either
        if folder.parent == cache_folder().resolve():
            return _noted(_note(folder))
    return None


def _note(folder: Path) -> Path:
    """The file that records the source of a bundle, and when it was last used."""
    return folder.with_name(f"{folder.name}.json")


def _lock(folder: Path) -> Path:
    """The file that a process locks while it exports into a folder; it is never removed."""
    return folder.with_name(f".{folder.name}.lock")


def _users(folder: Path) -> Path:
    """The file that the processes that use a bundle lock together; it is never removed."""
    return folder.with_name(f".{folder.name}.used")


def listing() -> tuple[list[dict[str, object]], list[str]]:
    """The cache as data for programs, and as lines for people."""
    told = [_told(entry) for entry in entries()]
    lines = [line for _, lines in told for line in lines]
    return [facts for facts, _ in told], [*lines, f"{len(told)} in {cache_folder()}"]


def _told(entry: Entry) -> tuple[dict[str, object], list[str]]:
    """An entry as data for programs, and as lines for people: what it is, and how to use it."""
    trained, origin, error = False, None, None
    if entry.finished:
        try:
            manifest = Bundle(entry.folder).manifest
            trained, origin = manifest.scorer is not None, manifest.export.source
        except (DashError, OSError) as wrong:
            error = first_line(wrong)
    size, day = entry.bytes, time.strftime("%Y-%m-%d", time.localtime(entry.used))
    facts: dict[str, object] = {
        "name": entry.folder.name,
        "folder": str(entry.folder),
        "source": entry.source,
        "made_from": origin,
        "bytes": size,
        "used": entry.used,
        "trained": trained,
        "finished": entry.finished,
        "error": error,
    }
    line = f"{entry.source}: {size / 1e6:.0f} MB, used {day}"
    if not entry.finished:
        return facts, [f"{line}, unfinished"]
    if error is not None:
        remedy = f"`dash-info --remove {entry.folder.name}`, and its next use exports it"
        return facts, [line, f"  {error}: {remedy}"]
    commit = f", from commit {origin.rpartition('@')[2][:10]}" if origin and "@" in origin else ""
    policy = ", with a policy" if trained else ""
    return facts, [f"{line}{commit}{policy}", f"  {shlex.quote(str(entry.folder))}"]
