"""Files and folders that appear whole or not at all, even if the process that writes them dies.

The system releases the lock on a folder that is being written when its process ends.
"""

from __future__ import annotations

import errno
import os
import random
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dash_onnx.core.errors import BundleError, DashError
from dash_onnx.core.manifest import MANIFEST_NAME

NEW, OLD, _LOCK = "bundle", "replaced", "lock"
"""In a workspace: what becomes the destination, what was there, and the lock."""

_COPIED = "copied"
"""Exists there from when `OLD` is a whole copy until what was copied is gone."""

PARTIAL, WRITING, TRAINING = "partial", "new", "training"
"""Names of the workspaces of a bundle: of its export, of `writing`, and of its training."""

_TAKEN = (BlockingIOError, PermissionError)
"""Errors of a lock that another process has."""

_BYTES = 1 << 30
"""Bytes that a lock covers on Windows; the file need not have them."""


def check_file(path: Path) -> None:
    """Refuses a file that must not be written, before any expensive work.

    Raises:
        BundleError: it exists and is not a regular file, or its folder does not exist or cannot
            be written.
    """
    if path.is_dir():
        raise BundleError(f"cannot write {path}: it is a folder")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BundleError(f"cannot write {path}: it exists and is not a regular file")
    if not path.parent.is_dir():
        raise BundleError(f"cannot write {path}: there is no folder {path.parent}")
    if not path.exists() and not os.access(path.parent, os.W_OK):
        raise BundleError(f"cannot write {path}: its folder is not writable")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`; what the block writes there replaces `path` at the end.

    On any error or interrupt, `path` stays as it was. It keeps its permissions; a new file has
    those that the umask grants.

    Raises:
        BundleError: see `check_file`.
    """
    check_file(path)
    temporary = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    kept = _mode(path) if path.exists() else None
    # Never more open than the file that it replaces, and writable for the block.
    wanted = 0o666 if kept is None else kept | 0o600
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, wanted))
    try:
        mode = _mode(temporary) if kept is None else kept
        yield temporary
        temporary.chmod(mode)
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, all or nothing: see `new_file`."""
    with new_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def check_destination(folder: Path, overwrite: bool, marker: str = MANIFEST_NAME) -> None:
    """Refuses a folder that must not be written, before any expensive work.

    Args:
        folder: the destination.
        overwrite: whether it may be replaced.
        marker: the file that every folder of this kind holds.

    Raises:
        BundleError: it exists without `overwrite`, holds something of another kind, or cannot be
            renamed; or its path is not UTF-8.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise BundleError(
            f"{folder} is not UTF-8, as ONNX needs paths to be: choose another folder"
        ) from None
    if not folder.exists() and not folder.is_symlink():
        return
    if _is_mount(folder.resolve()):  # unresolved, `.` looks like one
        raise BundleError(f"{folder} is a mount point: give a folder inside it")
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / marker).is_file():
        what = "is not a bundle" if marker == MANIFEST_NAME else f"holds no {marker}"
        raise BundleError(f"{folder} exists and {what}; choose another folder")
    if not overwrite:
        raise BundleError(f"{folder} exists; pass --overwrite to replace it")
    if os.name == "nt" and Path.cwd().is_relative_to(folder.resolve()):
        raise BundleError(f"Windows cannot replace {folder}: change to another folder first")


def _is_mount(folder: Path) -> bool:
    """Whether something is mounted there, perhaps another folder of the same file system."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    except OSError:  # not on Linux
        mounts = ""
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in str(folder))
    return os.path.ismount(folder) or f" {escaped} " in mounts


def check_room(what: str, needed: int, folder: Path, remedy: str, reused: int = 0) -> None:
    """Refuses what would not fit on the disk beside a folder, before it takes hours.

    Args:
        what: names it in the message.
        needed: bytes.
        folder: the destination, which need not exist.
        remedy: what to do.
        reused: bytes that are there already, and count as free.

    Raises:
        DashError: there is too little space; the message states what is needed.
    """
    place = next((parent for parent in folder.resolve().parents if parent.exists()), None)
    if place is None:
        raise DashError(f"there is no drive for {folder}")
    free = shutil.disk_usage(place).free + reused
    if needed > free:
        raise DashError(
            f"{what} needs {needed / 1e9:.1f} GB of disk beside {folder}, and {free / 1e9:.1f} GB "
            f"are free: {remedy}"
        )


@contextmanager
def writing(folder: Path, *, overwrite: bool, marker: str = MANIFEST_NAME) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` when the block succeeds.

    On any error or interrupt, it is removed and `folder` stays as it was. What a killed process
    left is removed, too.

    Raises:
        BundleError: see `workspace`.
    """
    with workspace(folder, WRITING, overwrite=overwrite, marker=marker) as space:
        clear(space)
        (space / NEW).mkdir()
        yield space / NEW


def workspace_of(folder: Path, name: str) -> Path:
    """Where `workspace` is, whether it exists or not."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.{name}")


def only_copy(folder: Path) -> Path | None:
    """What was at `folder`, if a process was killed just before it would have been replaced."""
    if folder.resolve().exists():  # such as of `missing/..`
        return None
    kept = (workspace_of(folder, name) / OLD for name in (WRITING, PARTIAL))
    return next(filter(Path.is_dir, kept), None)


@contextmanager
def workspace(
    folder: Path,
    name: str,
    *,
    overwrite: bool,
    marker: str = MANIFEST_NAME,
    keep: Callable[[Path], bool] = lambda space: False,
) -> Iterator[Path]:
    """Yields the locked folder `.FOLDER.NAME`, whose `NEW` becomes `folder` at the end.

    It may hold what an earlier process left.

    Args:
        folder: the destination.
        name: name of the workspace, a different one for each kind of writer.
        overwrite: see `check_destination`.
        marker: see `check_destination`.
        keep: whether the workspace is to be kept after an error or interrupt.

    Raises:
        BundleError: see `check_destination`; or another process is using it.
    """
    check_destination(folder, overwrite, marker)
    folder = folder.resolve()
    with locked(folder, name) as space:
        kept = False
        try:
            killed = not folder.exists() or (space / _COPIED).exists()  # between two renames
            if (space / OLD).is_dir() and killed:
                _put_back(space, folder)
                check_destination(folder, overwrite, marker)
            yield space
            check_destination(folder, overwrite, marker)
            _move(space, folder)
        except BaseException:
            kept = keep(space) or (space / OLD).exists()  # interrupted while it is put back
            raise
        finally:
            if not kept:
                clear(space)


def discard(folder: Path, name: str) -> None:
    """Removes the workspace that a dead process left, if there is one.

    Args:
        folder: the destination.
        name: see `workspace`.

    Raises:
        BundleError: a running process is using it.
    """
    if workspace_of(folder, name).is_dir():
        with locked(folder, name) as space:
            clear(space)


def clear(space: Path) -> None:
    """Removes everything in a workspace except its lock, as far as that is possible."""
    for path in space.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOCK:
            with suppress(OSError):
                path.unlink()


def _move(space: Path, folder: Path) -> None:
    """Puts the new folder in its place; what was there stays there on any error."""
    if folder.exists():
        try:
            _rename(folder, space / OLD)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copy = space / f"{OLD}.copy"  # of a container's image
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy, symlinks=True)
            _rename(copy, space / OLD)
            (space / _COPIED).touch()
    try:
        if folder.exists():
            shutil.rmtree(folder)
            (space / _COPIED).unlink()
        _rename(space / NEW, folder)
    except BaseException:  # Ctrl-C between the two renames
        if (space / OLD).exists():
            _put_back(space, folder)
        raise


def _put_back(space: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _rename(space / OLD, folder)
    (space / _COPIED).unlink(missing_ok=True)


def _rename(path: Path, to: Path) -> None:
    """Renames a file or folder; on Windows, a virus scanner may hold a new one for seconds."""
    for seconds in (0.1, 0.5, 2.0, 5.0) if os.name == "nt" else ():
        with suppress(PermissionError):
            path.replace(to)
            return
        time.sleep(seconds)
    path.replace(to)


@contextmanager
def locked(folder: Path, name: str) -> Iterator[Path]:
    """Yields the workspace of a folder, locked; an empty one is removed afterwards.

    The lock ends with the process.

    Args:
        folder: the folder that the workspace is beside.
        name: see `workspace`.

    Raises:
        BundleError: another process has it, or it cannot be created.
    """
    space = workspace_of(folder, name)
    path = space / _LOCK
    while True:
        try:
            space.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except FileNotFoundError:  # removed in between by the process that had it
            continue
        except OSError as error:
            raise BundleError(f"cannot write {folder}: {error.strerror}") from None
        with lock:
            try:
                _lock(lock)
            except _TAKEN:
                training = f"training {folder} or profiling it"
                doing = training if name == TRAINING else f"writing {folder}"
                raise BundleError(f"another process is {doing}: wait for it, or stop it") from None
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                try:
                    yield space
                finally:
                    with suppress(OSError):  # Windows keeps what is open
                        path.unlink()  # last: until then no other process takes the folder
                        space.rmdir()  # unless it holds more, or another process has it already
                return


@contextmanager
def waiting_lock(
    path: Path, waits: Callable[[], None] = lambda: None, *, shared: bool = False
) -> Iterator[None]:
    """Holds the lock on a file, which ends with the process; waits while another process has it.

    Args:
        path: the file, which is created and stays.
        waits: called once before it waits.
        shared: whether others may share the lock, also processes that can only read the file.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    flags = os.O_CREAT | (os.O_RDONLY if shared else os.O_RDWR)
    with os.fdopen(os.open(path, flags, 0o666)) as lock:
        told = False
        while True:
            try:
                _lock(lock, shared)
                break
            except _TAKEN:
                if not told:
                    waits()
                told = True
                time.sleep(0.5)
        yield


def _lock(file: IO[str], shared: bool = False) -> None:
    """Locks a file for this process; does nothing on a system that has no locks.

    Raises:
        OSError: one of `_TAKEN` if another process has it.
    """
    try:
        import fcntl
    except ImportError:
        pass
    else:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return
    try:
        import msvcrt
    except ImportError:
        return
    # Windows locks bytes, each for one process: those that share a lock have a byte each.
    os.lseek(file.fileno(), random.randrange(_BYTES) if shared else 0, os.SEEK_SET)
    count = 1 if shared else _BYTES
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, count)  # type: ignore[attr-defined]
