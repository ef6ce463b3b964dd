"""Models of the hub: what is downloaded of them, and what is told where that fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_tool import Capture, Tool
from huggingface_hub import errors

from dash_onnx.cli import info, run, train
from dash_onnx.core.errors import SourceError
from dash_onnx.exporters.sources import open as sources

INFO, RUN = Tool("dash-info", info.main), Tool("dash-run", run.main)
TRAIN = Tool("dash-train", train.main)

FILES = ["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_0.gguf", "mmproj-m-Q4_0.gguf", "README.md"]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the hub were asked, also where HF_HUB_OFFLINE keeps the tests from it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import huggingface_hub

    files = list(FILES)
    monkeypatch.setattr(huggingface_hub, "model_info", holding(files))
    return files


def holding(files: list[str]) -> Callable[..., SimpleNamespace]:
    """Stands for `model_info` of a repository with these files."""
    siblings = [SimpleNamespace(rfilename=file) for file in files]
    return lambda name, revision=None: SimpleNamespace(siblings=siblings)


@pytest.mark.parametrize(
    ("quantization", "file"), [("", "m-Q4_K_M.gguf"), ("q8_0", "m-Q8_0.gguf"), ("Q4_0", FILES[2])]
)
def test_a_quantization_names_a_file_of_a_repository(
    hub: list[str], quantization: str, file: str
) -> None:
    assert sources._gguf_file("org/m", quantization, sources._files("org/m", None, "")) == file


def test_a_missing_quantization_is_refused_with_those_that_are_there(hub: list[str]) -> None:
    with pytest.raises(SourceError, match=r"no GGUF file of Q2_K: m-Q8_0\.gguf"):
        sources._gguf_file("org/m", "Q2_K", sources._files("org/m", None, ""))


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

    monkeypatch.setattr(huggingface_hub, "model_info", holding(names))
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
    for variants, wide in (("int8", False), ("int4,wide", True)):
        assert INFO.run("org/tiny", "--variants", variants) == 0
        assert ("INT8 copy" in capsys.readouterr().out) == wide
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


def test_a_model_of_which_some_files_are_here_is_shown_all_the_same(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a download that was interrupted."""
    shards = {"x": "a.safetensors", "y": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "a.safetensors").touch()
    shapes = {"model.norm.weight": (64,)}
    seen: list[object] = []
    monkeypatch.setattr(sources, "_download", lambda *_: tmp_path)
    monkeypatch.setattr(sources, "_shapes", lambda *_: shapes)
    monkeypatch.setattr(sources, "open_folder", lambda *_, shapes, **__: seen.append(shapes))
    with pytest.raises(AttributeError):  # of nothing opened
        sources.open_source("org/m", {"llama"}, weights=False)
    assert seen == [shapes]


def test_pickled_weights_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(sources, "_download", lambda *_: tmp_path)
    monkeypatch.setattr(huggingface_hub, "model_info", holding(["pytorch_model.bin"]))
    with pytest.raises(SourceError, match=r"org/m has no safetensors .*: pickled"):
        sources.open_source("org/m", {"llama"})


def test_a_gguf_file_in_the_hubs_cache_needs_no_network(
    split_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise nowhere()

    first = sources.open_source("org/m:Q4_0", {"llama"})
    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    assert sources.open_source("org/m:Q4_0", {"llama"}).origin == first.origin
    for other in ("org/m:Q8_0", "org/m"):  # the usual one is not there, and the list is unknown
        with pytest.raises(SourceError, match="a file that is here: Q4_0/m-Q4_0"):
            sources.open_source(other, {"llama"})


# What fails


def unreachable() -> Exception:
    """Of the hub's HTTP client, without a network."""
    return errors.HTTPError("[Errno -2] Name or service not known")


def nowhere() -> Exception:
    """Of the hub's client, without a network."""
    return errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -2]\nAn error happened")


def missing() -> Exception:
    answer: Any = SimpleNamespace(headers={}, request=None)
    return errors.RepositoryNotFoundError("401 Client Error.\n\nNot Found", response=answer)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (unreachable, "go online, or give a local folder or a GGUF file"),
        (nowhere, "go online, or give a local folder or a GGUF file"),
        (missing, "check the name; a gated or private model needs `hf auth login`"),
    ],
)
@pytest.mark.parametrize("model", ["org/none", "org/none:Q4_0"])
@pytest.mark.parametrize("tool", [RUN, INFO, TRAIN], ids=lambda tool: tool.name)
def test_a_hub_that_gives_no_model_is_one_line_with_the_remedy(
    tool: Tool,
    model: str,
    error: Callable[[], Exception],
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    import huggingface_hub

    monkeypatch.setenv("DASH_CACHE", str(tmp_path))

    def fail(*_: object, **__: object) -> None:
        raise error()

    for name in ("snapshot_download", "model_info"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    arguments = [model, "hello"] if tool is RUN else [model]
    message = tool.refused(capsys, *arguments)
    assert "org/none" in message and message.endswith(f"): {remedy}\n")


@pytest.mark.parametrize("model", ["org/none", "org/none:Q4_0"])
def test_a_hub_that_is_switched_off_is_told(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("DASH_CACHE", str(tmp_path / "bundles"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = RUN.refused(capsys, model, "hello")
    assert "(HF_HUB_OFFLINE is set): go online" in message
