"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from dash_onnx.core.atomic import (
    check_destination,
    new_file,
    waiting_lock,
    workspace,
    write_text,
    writing,
)
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import BundleError


def snapshot(folder: Path) -> dict[str, bytes | str]:
    return {
        path.relative_to(folder).as_posix(): (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        )
        for path in folder.rglob("*")
    }


def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"b\\udcfcndel is not UTF-8"):
        check_destination(Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xfcndel")), False)


# Files


@pytest.mark.parametrize("error", [None, ValueError("no"), KeyboardInterrupt()])
def test_a_file_is_replaced_when_the_block_succeeds(
    tmp_path: Path, error: BaseException | None
) -> None:
    path = tmp_path / "report.html"
    write_text(path, "old")
    try:
        with new_file(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error
    assert path.read_text() == ("old" if error else "new")
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("umask", "before", "after"),
    [
        (0o022, None, 0o644),
        (0o077, None, 0o600),
        (0o002, None, 0o664),
        (0o022, 0o600, 0o600),
        (0o077, 0o644, 0o644),
        (0o022, 0o444, 0o444),
    ],
)
def test_a_file_keeps_its_permissions_and_a_new_one_has_those_of_the_umask(
    tmp_path: Path, umask: int, before: int | None, after: int
) -> None:
    path = tmp_path / "talk"
    if before is not None:
        path.touch()
        path.chmod(before)
    usual = os.umask(umask)
    try:
        with new_file(path) as temporary:
            assert temporary.stat().st_mode & ~after & 0o077 == 0  # nor is it open meanwhile
            temporary.write_text("private")
    finally:
        os.umask(usual)
    assert path.stat().st_mode & 0o777 == after


# Locks


class Windows:
    """Stands for `msvcrt`: what it locks of each file, by the open file that did."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.locked: dict[int, range] = {}

    def locking(self, file: int, mode: int, count: int) -> None:
        assert mode == self.LK_NBLCK
        start = os.lseek(file, 0, os.SEEK_CUR)
        wanted = range(start, start + count)
        for other in self.locked.values():
            if wanted.start < other.stop and other.start < wanted.stop:
                raise PermissionError(errno.EACCES, "Permission denied")
        self.locked[file] = wanted


class Busy(Exception):
    """Another process has the lock."""


@pytest.mark.parametrize("windows", [False, True])
def test_a_lock_is_shared_by_many_or_held_by_one(
    windows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"

    def busy() -> None:
        raise Busy

    if windows:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", Windows())
    with waiting_lock(path, busy, shared=True), waiting_lock(path, busy, shared=True):
        with pytest.raises(Busy), waiting_lock(path, busy):
            pass
    if windows:
        monkeypatch.setitem(sys.modules, "msvcrt", Windows())  # their locks are gone
    with waiting_lock(path, busy):
        for shared in (True, False):
            with pytest.raises(Busy), waiting_lock(path, busy, shared=shared):
                pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match="No locks available"), waiting_lock(tmp_path / "lock"):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "it is a folder"),
        ("link", "not a regular file"),
        ("pipe", "not a regular file"),
        ("none/file", "there is no folder"),
    ],
)
def test_what_is_no_file_is_never_replaced(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match=f"cannot write {tmp_path / name}: .*{message}"):
        write_text(tmp_path / name, "new")
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]


# Folders


def write(folder: Path, content: str = "new", overwrite: bool = False) -> None:
    with writing(folder, overwrite=overwrite) as temporary:
        (temporary / "layers").mkdir()
        (temporary / "dash.json").write_text(content)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An existing bundle, as far as `writing` looks."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "dash.json").write_text("old")
    (folder / "stale.onnx").write_text("stale")
    return folder


def test_a_bundle_appears_when_the_block_succeeds(tmp_path: Path) -> None:
    folder = tmp_path / "a/b/out"
    with writing(folder, overwrite=False) as temporary:
        assert temporary.parent.parent == folder.parent  # a rename, not a copy
        (temporary / "dash.json").write_text("new")
        assert not folder.exists()
    assert (folder / "dash.json").read_text() == "new"
    assert os.listdir(folder.parent) == ["out"]
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_leaves_no_destination_and_no_temporary(
    tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)), writing(tmp_path / "out", overwrite=False) as temporary:
        (temporary / "dash.json").write_text("new")
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_bundle_as_it_was(old: Path, error: BaseException) -> None:
    before = snapshot(old.parent)
    with pytest.raises(type(error)), writing(old, overwrite=True) as temporary:
        (temporary / "dash.json").write_text("new")
        raise error
    assert snapshot(old.parent) == before


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_a_failure_between_the_two_renames_brings_the_old_bundle_back(
    old: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = snapshot(old.parent)
    rename = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.name == "bundle":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(type(error)):
        write(old, overwrite=True)
    assert snapshot(old.parent) == before


def test_a_folder_that_cannot_be_renamed_is_moved(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one of a container's image."""
    rename = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self == old:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    write(old, overwrite=True)
    assert (old / "dash.json").is_file() and [path.name for path in old.parent.iterdir()] == ["out"]


def test_a_copy_of_what_cannot_be_renamed_outlives_two_interruptions(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, remove = Path.replace, shutil.rmtree

    def refuse(self: Path, target: Path) -> Path:
        if self == old:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    def interrupted(path: Path, **options: bool) -> None:
        if path == old:
            (old / "a.txt").unlink(missing_ok=True)
            raise KeyboardInterrupt
        remove(path, **options)

    (old / "a.txt").write_text("a")
    before = snapshot(old)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(old, overwrite=True)
    assert snapshot(old) != before
    with pytest.raises(ZeroDivisionError), writing(old, overwrite=True):
        raise ZeroDivisionError
    assert snapshot(old) == before and [path.name for path in old.parent.iterdir()] == ["out"]


def test_overwrite_replaces_the_whole_folder_once_the_new_one_is_complete(old: Path) -> None:
    with writing(old, overwrite=True) as temporary:
        (temporary / "dash.json").write_text("new")
        assert (old / "dash.json").read_text() == "old"
    assert snapshot(old.parent) == {"out": "", "out/dash.json": b"new"}


def test_an_existing_bundle_is_refused_without_overwrite(old: Path) -> None:
    before = snapshot(old.parent)
    with pytest.raises(BundleError, match=f"{old} exists; pass --overwrite"):
        write(old)
    with pytest.raises(BundleError, match="pass --overwrite"):
        check_destination(old, overwrite=False)
    assert snapshot(old.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, kind: str, overwrite: bool) -> None:
    place = tmp_path / "out"
    if kind == "folder":
        place.mkdir()
        (place / "thesis.tex").write_text("precious")
    elif kind == "file":
        place.write_text("precious")
    else:
        place.symlink_to(tmp_path / "nowhere")
    before = snapshot(tmp_path)
    with pytest.raises(BundleError, match=f"{place} exists and is not a bundle"):
        write(place, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_a_mount_point_is_refused_before_any_work(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path in (old, tmp_path))
    for place in (old, tmp_path):
        with pytest.raises(BundleError, match="mount point: give a folder inside it"):
            check_destination(place, overwrite=True)


def test_the_folder_one_is_in_and_a_link_are_no_mount_points(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old)
    check_destination(Path(), overwrite=True)
    (tmp_path / "link").symlink_to("/proc")
    with pytest.raises(BundleError, match="mount point"):
        check_destination(tmp_path / "link", overwrite=True)
    (tmp_path / "other").symlink_to(old)
    check_destination(tmp_path / "other", overwrite=True)


def test_what_a_killed_process_left_is_swept_but_not_what_a_living_one_writes(old: Path) -> None:
    for left in ("bundle", "replaced"):
        (old.with_name(".out.new") / left).mkdir(parents=True)
        (old.with_name(".out.new") / left / "graph").write_text("left")
    with writing(old, overwrite=True) as new:
        assert snapshot(new.parent) == {"lock": b"", "bundle": ""}
        (new / "dash.json").write_text("new")
        with pytest.raises(BundleError, match="another process is writing"):
            write(old, overwrite=True)
    assert snapshot(old.parent) == {"out": "", "out/dash.json": b"new"}


def test_the_only_copy_that_a_killed_process_left_comes_back(tmp_path: Path) -> None:
    """Killed between two renames: the old bundle lies beside its place."""
    only = tmp_path / ".out.new/replaced"
    only.mkdir(parents=True)
    (only / "dash.json").write_text("old")
    with pytest.raises(BundleError, match="pass --overwrite"):
        write(tmp_path / "out")
    assert snapshot(tmp_path) == {"out": "", "out/dash.json": b"old"}


@pytest.mark.parametrize("name", ["new", "partial"])
def test_what_opens_the_bundle_says_where_its_only_copy_is(tmp_path: Path, name: str) -> None:
    only = tmp_path / f".out.{name}/replaced"
    only.mkdir(parents=True)
    with pytest.raises(BundleError, match=f"rename {re.escape(str(only))} to out$"):
        Bundle(tmp_path / "out")
    only.rename(tmp_path / "out")
    with pytest.raises(BundleError, match="is missing"):
        Bundle(tmp_path / "out")
    with pytest.raises(BundleError, match="there is no such folder"):
        Bundle("/missing/..")


def test_a_destination_that_appears_during_the_block_is_not_replaced(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with (
        pytest.raises(BundleError, match="is not a bundle"),
        writing(place, overwrite=True) as new,
    ):
        (new / "dash.json").write_text("new")
        place.mkdir()
        (place / "thesis.tex").write_text("precious")
    assert snapshot(tmp_path) == {"out": "", "out/thesis.tex": b"precious"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_filled(tmp_path: Path, overwrite: bool) -> None:
    place = tmp_path / "out"
    place.mkdir()
    write(place, overwrite=overwrite)
    assert snapshot(tmp_path) == {"out": "", "out/layers": "", "out/dash.json": b"new"}


def test_a_relative_destination_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("out"))
    assert os.listdir(tmp_path) == ["out"]


def test_a_destination_behind_a_link_is_replaced_where_the_link_leads(old: Path) -> None:
    link = old.parent / "link"
    link.symlink_to(old)
    write(link, overwrite=True)
    assert link.is_symlink() and (old / "dash.json").read_text() == "new"
    assert sorted(os.listdir(old.parent)) == ["link", "out"]


def test_a_destination_below_a_file_is_a_bundle_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError):
        write(tmp_path / "file/out")


@pytest.mark.parametrize("wanted", [True, False])
def test_a_workspace_is_kept_after_an_error_where_it_is_wanted(
    tmp_path: Path, wanted: bool
) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(ValueError),
        workspace(out, "new", overwrite=False, keep=lambda _: wanted) as space,
    ):
        (space / "part").write_text("finished")
        raise ValueError
    assert os.listdir(tmp_path) == ([".out.new"] if wanted else [])
    with workspace(out, "new", overwrite=False) as space:
        assert (space / "part").exists() == wanted
        (space / "bundle").mkdir()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(
    not Path("/proc/self/mountinfo").is_file(), reason="Linux tells what is mounted"
)
def test_a_folder_mounted_from_the_same_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: False)  # as of such a folder
    with pytest.raises(BundleError, match="is a mount point"):
        check_destination(Path("/proc"), overwrite=True)
    check_destination(tmp_path, overwrite=True)
