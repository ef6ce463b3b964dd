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
from dash_onnx.exporters.sources import open as sources

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


# GGUF files in a repository of the hub

FILES = ["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_0.gguf", "mmproj-m-Q4_0.gguf", "README.md"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import huggingface_hub

    files = list(FILES)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision=None: files)
    return files


@pytest.mark.parametrize(
    ("quantization", "file"), [("", "m-Q4_K_M.gguf"), ("q8_0", "m-Q8_0.gguf"), ("Q4_0", FILES[2])]
)
def test_a_quantization_names_a_file_of_a_repository(
    hub: list[str], quantization: str, file: str
) -> None:
    files = sources._gguf_files("org/m", None)
    assert len(files) == 3
    assert sources._gguf_file("org/m", quantization, files) == file


def test_a_missing_quantization_is_refused_with_those_that_are_there(hub: list[str]) -> None:
    with pytest.raises(SourceError, match=r"no GGUF file of Q2_K: m-Q8_0\.gguf"):
        sources._gguf_file("org/m", "Q2_K", sources._gguf_files("org/m", None))


@pytest.fixture
def split_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot of the hub with a model in parts; only what is asked for is there."""
    import huggingface_hub
    from gguf_files import write_model
    from gguf_models import tiny_model

    store, folder = tmp_path / "store", tmp_path / "c0ffee"
    (store / "Q4_0").mkdir(parents=True)
    write_model(store / "Q4_0" / "m-Q4_0.gguf", tiny_model("llama"), tensors_a_file=20)
    (store / "README.md").write_text("---\nlicense: other\nlicense_name: my-terms\n---\n# M\n")
    (store / "LICENSE").write_text("my terms")
    names = sorted(path.relative_to(store).as_posix() for path in store.rglob("*.*"))

    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        for path in [path for pattern in allow_patterns for path in store.glob(pattern)]:
            target = folder / path.relative_to(store)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision=None: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


def test_a_model_of_the_hub_is_shown_without_its_weights(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The hub gives names and shapes from the headers of its files."""
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
    from safetensors import safe_open

    folder = tmp_path / "c0ffee"

    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        folder.mkdir(exist_ok=True)
        for path in [path for pattern in allow_patterns for path in tiny_folder.glob(pattern)]:
            shutil.copy(path, folder)
        return str(folder)

    def headers(name: str, revision: str) -> SafetensorsRepoMetadata:
        with safe_open(tiny_folder / "model.safetensors", "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        tensors = {key: TensorInfo("F32", shape, (0, 0)) for key, shape in shapes.items()}
        parts = {"model.safetensors": SafetensorsFileMetadata({}, tensors)}
        return SafetensorsRepoMetadata(None, False, {}, parts)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    told = INFO.json_of(capsys, "org/tiny")
    assert not [*folder.glob("*.safetensors")]
    wanted = INFO.json_of(capsys, tiny_folder)
    assert told["estimates"] == wanted["estimates"]
    assert told["source"] == "hub:org/tiny@c0ffee"
    sources.open_source("org/tiny", {"llama"})
    assert [*folder.glob("*.safetensors")]


def test_the_parts_of_a_model_come_from_the_hub_with_license_and_revision(
    split_repository: Path,
) -> None:
    source = sources.open_source("org/m:Q4_0", {"llama"})
    assert source.origin == "gguf:org/m/m-Q4_0@c0ffee"
    assert source.license == "my-terms"
    assert [path.name for path in source.documents] == ["LICENSE", "README.md"]
    assert len(source.files) == 2
