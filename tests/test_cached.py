"""Models that are named where a bundle is expected: exported once, into a cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_tool import Tool

from dash_onnx.cli import cached, info, run
from dash_onnx.cli.cached import bundle_of, entries, listing, model_name, remove
from dash_onnx.core.errors import DashError, SourceError
from dash_onnx.core.manifest import MANIFEST_NAME
from dash_onnx.exporters import export as export_package

Capture = pytest.CaptureFixture[str]
INFO, RUN = Tool("dash-info", info.main), Tool("dash-run", run.main)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DASH_CACHE", str(folder))
    return folder


@pytest.fixture
def exports(tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is exported; a copy of the tiny bundle comes of it."""
    made: list[str] = []

    def export(model: str, out: Path, options: object) -> None:
        made.append(model)
        time.sleep(0.3)
        shutil.copytree(tiny_bundle, out)

    monkeypatch.setattr(export_package, "export", export)
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
    assert model_name(model) == "my model" and model_name("org/name") == "name"


def test_two_at_once_make_one(
    model: Path, exports: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(bundle_of(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(exports) == 1 and found[0] == found[1]
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
    def fail(*_: object) -> None:
        raise SourceError("no such weights")

    monkeypatch.setattr(export_package, "export", fail)
    with pytest.raises(SourceError, match="no such weights"):
        bundle_of(model)
    assert not entries() and not [path for path in cache.iterdir() if path.is_dir()]


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
