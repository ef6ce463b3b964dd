"""Models that are named where a bundle is expected: exported once, into a cache."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
from cli_tool import Tool
from scored_bundle import with_scorer

from dash_onnx.cli import cached, info, run, train
from dash_onnx.cli import profile as profile_command
from dash_onnx.cli.cached import entries, known_bundle, listing, model_name, remove
from dash_onnx.core.atomic import TRAINING, locked, waiting_lock, workspace_of
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import BundleError, DashError, SourceError
from dash_onnx.core.manifest import MANIFEST_NAME
from dash_onnx.exporters import pipeline
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.exporters.export.partial import exporting

Capture = pytest.CaptureFixture[str]
INFO, RUN = Tool("dash-info", info.main), Tool("dash-run", run.main)
TRAIN = Tool("dash-train", train.main)


def end() -> None:
    """What the end of a process does to the bundles that it uses."""
    cached._IN_USE.close()


def bundle_of(name: str | Path) -> str | Path:
    """As a process of its own, which then ends."""
    try:
        return cached.bundle_of(name)
    finally:
        end()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DASH_CACHE", str(folder))
    yield folder
    end()


@pytest.fixture
def exports(tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is exported; a copy of the tiny bundle comes of it."""
    made: list[str] = []

    def export(model: str, out: Path, options: object, **_: object) -> None:
        made.append(model)
        time.sleep(0.3)
        shutil.copytree(tiny_bundle, out)

    monkeypatch.setattr(pipeline, "export", export)
    yield made


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "my model")


def test_a_bundle_is_itself_and_what_is_neither_is_left_to_who_opens_it(
    tiny_bundle: Path, exports: list[str], tmp_path: Path
) -> None:
    for path in (tiny_bundle, tmp_path / "nothing", tmp_path / "no.gguf", Path("nothing")):
        assert bundle_of(path) == path
    assert not exports


def test_a_model_is_exported_once_and_again_where_it_changed(
    model: Path, cache: Path, exports: list[str]
) -> None:
    first = bundle_of(model)
    assert first.parent == cache and (first / MANIFEST_NAME).is_file()
    assert bundle_of(model) == first and exports == [str(model)]
    config = model / "config.json"
    os.utime(config, ns=(1, 1))
    second = bundle_of(model)
    assert second != first and exports == [str(model)] * 2
    assert [entry.folder for entry in entries()] == [second]  # the first is of use to no one
    assert not first.exists()
    assert model_name(model) == model_name(second) == "my model"
    assert model_name("org/name") == "name" and model_name(second / "x") == "x"


def test_commands_that_read_a_bundle_take_a_model_that_is_in_the_cache(
    model: Path, exports: list[str], capsys: Capture
) -> None:
    profile = Tool("dash-profile", profile_command.main)
    assert "it is a model, export it first" in profile.refused(capsys, model)
    folder = bundle_of(model)
    os.utime(cached._note(folder), (1, 1))
    assert known_bundle(model) == folder and len(exports) == 1
    assert entries()[0].used > 1  # the least recently used goes first
    assert profile.json_of(capsys, model, "--dry-run")["layers_ms"]


def test_two_at_once_make_one(
    model: Path, exports: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(bundle_of, [model, model])
    assert len(exports) == 1 and one == other
    assert "waiting for it" in caplog.text


def test_the_cache_keeps_its_limit_and_drops_what_was_not_used_for_longest(
    tiny_folder: Path, exports: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [shutil.copytree(tiny_folder, tmp_path / name) for name in ("a", "b", "c")]
    first = bundle_of(models[0])
    size = entries()[0].bytes
    monkeypatch.setenv("DASH_CACHE_GB", str(2.5 * size / 1e9))
    second = bundle_of(models[1])
    os.utime(cached._note(second), (1, 1))  # not used since 1970
    third = bundle_of(models[2])
    assert {entry.folder for entry in entries()} == {first, third}
    for wrong in ("0", "-1", "lots", "nan"):
        monkeypatch.setenv("DASH_CACHE_GB", wrong)
        with pytest.raises(DashError, match="DASH_CACHE_GB"):
            bundle_of(models[1])


def test_what_fails_leaves_no_bundle(
    model: Path, cache: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **_more: object) -> None:
        raise SourceError("no such weights")

    monkeypatch.setattr(pipeline, "export", fail)
    with pytest.raises(SourceError, match="no such weights"):
        bundle_of(model)
    assert not entries() and not [path for path in cache.iterdir() if path.is_dir()]


def test_a_missing_extra_is_told_before_anything_is_written(
    model: Path, cache: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DashError, match="reading a model needs torch"):
        bundle_of(model)
    assert not exports and not cache.exists()


def test_a_cache_that_cannot_be_written_is_told(
    model: Path, tmp_path: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DASH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DashError, match="set DASH_CACHE"):
        bundle_of(model)


def test_the_cache_is_listed_and_emptied(model: Path, exports: list[str], capsys: Capture) -> None:
    bundle_of(model)
    assert INFO.run("--json") == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["source"] == str(model) and facts["bytes"] > 0 and not facts["trained"]
    assert INFO.run() == 0
    assert str(model) in capsys.readouterr().out
    assert INFO.run("--remove", str(model)) == 0
    assert listing()[0] == []
    with pytest.raises(SourceError, match="not in the cache"):
        remove(str(model))


def test_dash_train_takes_a_model_as_dash_run_does(
    model: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    trained: list[Path] = []

    def stop(folder: Path, options: object) -> None:
        trained.append(folder)
        raise BundleError("enough")

    monkeypatch.setattr(pipeline, "announce_training", lambda *_: None)
    monkeypatch.setattr("dash_onnx.exporters.train.train.train", stop)
    for _ in range(2):
        assert "enough" in TRAIN.refused(capsys, model)
    (entry,) = entries()
    assert trained == [entry.folder] * 2 and exports == [str(model)]
    (model / "config.json").touch()
    assert "weight" in TRAIN.refused(capsys, model, "--calibration", "a@0.5", "b")
    assert len(exports) == 1  # what is wrong is told before an export


def test_a_training_counts_and_goes_with_its_bundle_but_not_while_it_runs(
    model: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder, size = Path(bundle_of(model)), entries()[0].bytes
    with locked(folder, TRAINING) as state:
        (state / "state.pt").write_bytes(bytes(1000))
        assert entries()[0].bytes == size + 1000
        assert f"another process is training {folder}" in INFO.refused(capsys, "--remove", model)
        monkeypatch.setenv("DASH_CACHE_GB", "1e-6")
        os.utime(model / "config.json", ns=(1, 1))
        assert bundle_of(model) != folder and len(entries()) == 2
        assert (folder / MANIFEST_NAME).is_file() and (state / "state.pt").is_file()
    remove(str(folder))
    assert not state.exists() and not folder.exists()


# Bundles that are not removed


@pytest.mark.parametrize("use", [cached.bundle_of, known_bundle])
@pytest.mark.parametrize("named", ["model", "folder"])
def test_a_bundle_in_use_stays(
    use: Callable[[str | Path], str | Path],
    named: str,
    model: Path,
    tiny_folder: Path,
    exports: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Neither another model, nor another state of its own, nor the user removes it."""
    folder = Path(bundle_of(model))
    assert use(model if named == "model" else folder) == folder
    os.utime(cached._note(folder), (1, 1))  # a server that was started long ago
    monkeypatch.setenv("DASH_CACHE_GB", "1e-6")
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    cached.bundle_of(other)
    os.utime(model / "config.json", ns=(1, 1))
    cached.bundle_of(model)
    assert Bundle(folder).manifest and len(entries()) == 3
    refusal = INFO.refused(capsys, "--remove", folder.name)
    assert f"another process is using {model}" in refusal
    assert Bundle(folder).manifest
    end()
    assert INFO.run("--remove", folder.name) == 0 and not folder.exists()


def test_a_bundle_is_in_use_until_the_process_ends(
    model: Path, exports: list[str], capsys: Capture
) -> None:
    folder = bundle_of(model)
    code = (
        "import sys; from dash_onnx.cli.cached import known_bundle;"
        "print(known_bundle(sys.argv[1]), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(model)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == f"{folder}\n"
        assert "another process is using" in INFO.refused(capsys, "--remove", model)
        user.kill()
    assert INFO.run("--remove", model) == 0 and not entries()


@pytest.mark.parametrize("finished", [True, False])
def test_only_the_user_removes_what_was_trained(
    finished: bool,
    model: Path,
    tiny_folder: Path,
    exports: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(bundle_of(model))
    if finished:
        with_scorer(folder)
    else:
        with locked(folder, TRAINING) as state:
            (state / "state.pt").write_bytes(bytes(1000))
    os.utime(cached._note(folder), (1, 1))
    monkeypatch.setenv("DASH_CACHE_GB", "1e-6")
    os.utime(model / "config.json", ns=(1, 1))
    untrained = Path(bundle_of(model))
    workspace_of(untrained, TRAINING).mkdir()
    (workspace_of(untrained, TRAINING) / "lock").touch()  # of a training that was killed early
    last = bundle_of(shutil.copytree(tiny_folder, tmp_path / "other"))
    assert {entry.folder for entry in entries()} == {folder, last} and not untrained.exists()
    assert INFO.run("--remove", folder.name) == 0 and not folder.exists()


@pytest.mark.parametrize("use", [cached.bundle_of, known_bundle])
def test_a_cache_that_can_only_be_read_is_used(
    use: Callable[[str | Path], str | Path],
    model: Path,
    exports: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = bundle_of(model)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(os, "open", refuse)
    assert use(model) == folder


def test_the_separator_of_windows_is_no_part_of_a_hub_id(exports: list[str]) -> None:
    folder = bundle_of(PureWindowsPath("org/name"))  # type: ignore[arg-type]
    assert exports == ["org/name"] and Path(folder).is_dir()


def test_a_model_in_the_cache_is_found_where_there_is_a_folder_of_its_organization(
    exports: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle_of("org/name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert bundle_of("org/name") == folder
    assert bundle_of("org/other") == "org/other" and exports == ["org/name"]


def test_what_cannot_be_removed_does_not_fail_an_export(
    tiny_folder: Path, exports: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a cache that several users share."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "another user's")

    models = [shutil.copytree(tiny_folder, tmp_path / name) for name in ("a", "b")]
    bundle_of(models[0])
    monkeypatch.setattr(cached, "_remove", refuse)
    monkeypatch.setenv("DASH_CACHE_GB", "1e-6")
    os.utime(models[0] / "config.json", ns=(1, 1))
    for model in models:
        assert (Path(bundle_of(model)) / MANIFEST_NAME).is_file()


def test_a_cache_of_another_user_is_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cached, "_claim", refuse)
    assert known_bundle(model) == model


# Interrupted exports


class Tools:
    """What an export depends on, and whether it is interrupted after a layer."""

    version = "1"
    interrupt = False


@pytest.fixture
def tools(tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """Stands for the export, with the partial folder of a true one."""
    state = Tools()

    def export(model: str, out: Path, options: ExportOptions, **_: object) -> None:
        key = {"tools": state.version}
        with exporting(out, key, overwrite=options.overwrite) as partial:
            partial.calibrate(np.zeros((1, 2), np.int64), Bundle(tiny_bundle).manifest.calibration)
            (partial.bundle / f"layer-0 of {state.version}").write_bytes(bytes(1000))
            if state.interrupt:
                raise KeyboardInterrupt
            shutil.copytree(tiny_bundle, partial.bundle, dirs_exist_ok=True)

    monkeypatch.setattr(pipeline, "export", export)
    return state


def interrupt(tools: Tools, model: Path) -> Path:
    """Interrupts an export; returns what it leaves."""
    tools.interrupt = True
    with suppress(KeyboardInterrupt):
        bundle_of(model)
    tools.interrupt = False
    return next(cached.cache_folder().glob(".*.partial"))


def layers(bundle: str | Path) -> list[str]:
    return sorted(path.name for path in Path(bundle).glob("layer-0*"))


def test_what_an_interrupted_export_left_is_gone_on_with(
    model: Path, tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    (interrupt(tools, model) / "bundle" / "layer-0 before").write_text("")
    assert layers(bundle_of(model)) == ["layer-0 before", "layer-0 of 1"]
    assert "discarding it" not in caplog.text


@pytest.mark.parametrize(
    ("damage", "told"),
    [(None, "another tools"), ("{", "is damaged"), ("[1]", "is damaged"), ("3", "is damaged")],
)
def test_what_an_interrupted_export_left_is_discarded_where_no_export_goes_on_with_it(
    damage: str | None,
    told: str,
    model: Path,
    tools: Tools,
    caplog: pytest.LogCaptureFixture,
) -> None:
    partial = interrupt(tools, model)
    if damage is None:
        tools.version = "2"
    else:
        (partial / "key.json").write_text(damage)
        (partial / "bundle" / "layer-0 before").write_text("")
    bundle = bundle_of(model)
    assert layers(bundle) == [f"layer-0 of {tools.version}"] and not partial.exists()
    (line,) = [record.message for record in caplog.records if "discarding it" in record.message]
    assert told in line and "--overwrite" not in line


def test_an_unfinished_export_is_listed_and_removed(model: Path, tools: Tools, cache: Path) -> None:
    partial = interrupt(tools, model)
    (facts,), (line, _) = listing()
    assert facts["source"] == str(model) and not facts["finished"] and facts["error"] is None
    assert line.endswith(", unfinished") and entries()[0].bytes > 1000
    assert INFO.run("--remove", model) == 0 and not partial.exists() and not entries()
    interrupt(tools, model)
    next(cache.glob("*.json")).unlink()
    assert INFO.run("--remove", entries()[0].source) == 0 and not partial.exists()


def test_what_was_interrupted_before_the_source_changed_is_listed_until_it_is_exported(
    model: Path, tools: Tools
) -> None:
    partial = interrupt(tools, model)
    os.utime(model / "config.json", ns=(1, 1))
    assert [entry.source for entry in entries()] == [str(model)]
    bundle = bundle_of(model)
    assert [entry.folder for entry in entries()] == [bundle] and not partial.exists()


def test_an_unfinished_export_counts_to_the_limit(
    model: Path, tiny_folder: Path, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupt(tools, model)
    monkeypatch.setenv("DASH_CACHE_GB", "1e-6")
    with (partial / "bundle" / "large").open("wb") as file:
        file.truncate(10**6)
    other = bundle_of(shutil.copytree(tiny_folder, tmp_path / "other"))
    assert [entry.folder for entry in entries()] == [other] and not partial.exists()


@pytest.mark.parametrize("lock", ["the partial's", "the cache's"])
def test_what_another_process_is_exporting_is_left_alone(
    lock: str,
    model: Path,
    tiny_folder: Path,
    tools: Tools,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    partial = interrupt(tools, model)
    name = partial.name[1 : -len(".partial")]
    beside = partial.with_name(f".{name}.lock")
    with waiting_lock(partial / "lock" if lock == "the partial's" else beside, lambda: None):
        assert "another process is" in INFO.refused(capsys, "--remove", model)
        monkeypatch.setenv("DASH_CACHE_GB", "1e-6")
        bundle_of(shutil.copytree(tiny_folder, tmp_path / "other"))
        os.utime(model / "config.json", ns=(1, 1))
        bundle_of(model)
        assert layers(partial / "bundle")
    assert INFO.run("--remove", name) == 0
    assert not partial.exists()


def test_the_users_own_folders_in_the_cache_are_not_of_it(
    model: Path, tiny_bundle: Path, tools: Tools, cache: Path
) -> None:
    own = shutil.copytree(tiny_bundle, cache / "own")
    (cache / "own.json").write_text("{}")
    (cache / ".other.partial").mkdir()
    (cache / ".other.partial" / "key.json").write_text("{}")
    assert [bundle_of(model)] == [entry.folder for entry in entries()]
    with pytest.raises(SourceError, match="not in the cache"):
        remove("own")
    assert own.exists()


# Damage


def test_a_damaged_bundle_is_listed_with_what_is_wrong_and_removed(
    model: Path, tiny_folder: Path, exports: list[str], tmp_path: Path
) -> None:
    whole = bundle_of(shutil.copytree(tiny_folder, tmp_path / "other"))
    damaged = Path(bundle_of(model))
    (damaged / MANIFEST_NAME).write_text("{")
    facts, lines = listing()
    told = {one["folder"]: one["error"] for one in facts}
    assert told[str(whole)] is None and MANIFEST_NAME in str(told[str(damaged)])
    assert [line for line in lines if f"`dash-info --remove {damaged.name}`" in line]
    assert f"  {whole}" in lines  # as other commands take it
    assert INFO.run("--remove", model) == 0
    assert not damaged.exists()


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"source": 3}'])
def test_a_note_that_is_lost_or_damaged_is_made_whole(
    text: str | None, model: Path, exports: list[str]
) -> None:
    folder = Path(bundle_of(model))
    note = cached._note(folder)
    note.unlink()
    if text is not None:
        note.write_text(text)
    assert [(entry.folder, entry.source) for entry in entries()] == [(folder, folder.name)]
    assert bundle_of(model) == folder and len(exports) == 1
    assert [(entry.folder, entry.source) for entry in entries()] == [(folder, str(model))]


def test_a_bundle_is_noted_before_it_is_there(
    model: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = pipeline.export

    def killed(*arguments: Any, **more: Any) -> None:
        make(*arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "export", killed)
    with suppress(KeyboardInterrupt):
        bundle_of(model)
    assert [entry.source for entry in entries() if entry.finished] == [str(model)]


def test_what_an_interrupted_removal_left_is_no_bundle(model: Path, exports: list[str]) -> None:
    folder = Path(bundle_of(model))
    (folder / MANIFEST_NAME).unlink()
    assert [entry.finished for entry in entries()] == [False]
    assert bundle_of(model) == folder and len(exports) == 2


def test_a_gguf_file_answers_in_one_command_and_the_second_time_without_torch(
    tmp_path: Path, cache: Path
) -> None:
    from gguf_files import write_model
    from gguf_models import tiny_model

    file = tmp_path / "tiny.gguf"
    write_model(file, tiny_model("llama"))
    code = (
        "import sys; from dash_onnx.cli.run import main; code = main(sys.argv[1:]);"
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(file), "a b", "--raw", "--json"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        told.append((json.loads(done.stdout)["text"], done.stderr.strip().splitlines()))
    (one, first), (other, second) = told
    assert any("exporting" in line for line in first) and first[-1] == "True"
    assert second[-1] == "False" and not any("exporting" in line for line in second)
    assert one == other
