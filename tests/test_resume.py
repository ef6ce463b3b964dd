"""Exports that are killed at random moments, and go on."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_tool import Capture, Tool
from conftest import save_tiny
from fixed_costs import fixed

from dash_onnx.cli.export import main
from dash_onnx.core.bundle import file_facts
from dash_onnx.core.contract import CARD_NAME
from dash_onnx.core.errors import BundleError
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.export import pipeline
from dash_onnx.exporters.export.graph_writer import GraphWriter
from dash_onnx.exporters.export.partial import exporting

TOOL = Tool("dash-export", main)
LAYERS = 8
MOMENTS = 10


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "deep", num_hidden_layers=LAYERS)


def arguments(deep: Path, night: Path, out: Path, *more: object) -> list[str]:
    chosen = (deep, out, "--effort", "none", "--calibration", night, "--check", "none")
    return [*map(str, (*chosen, *more))]


def content_of(folder: Path) -> dict[str, Any]:
    """Every byte; of dash.json all but how long it took and the memory that it needed."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != CARD_NAME  # has speeds
    }
    manifest = json.loads(found["dash.json"])
    del manifest["export"]["seconds"], manifest["export"]["peak_rss_bytes"]
    return {**found, "dash.json": manifest}


@pytest.fixture(scope="module", autouse=True)
def costs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "profile", fixed)
        yield


@pytest.fixture(scope="module")
def whole(deep: Path, night: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An export that nobody interrupted, and how long its layers took."""
    out = tmp_path_factory.mktemp("whole") / "out"
    started = time.monotonic()
    assert main(arguments(deep, night, out)) == 0
    return out, time.monotonic() - started


def finished(partial: Path) -> int:
    try:
        return len(json.loads((partial / "progress.json").read_text())["layers"])
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_an_export_killed_at_random_moments_goes_on_to_the_same_bundle(
    deep: Path,
    night: Path,
    whole: tuple[Path, float],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Ten processes one after the other on one export, each killed at a moment of its own.

    The export to compare with has a process of its own as well: on some processors products
    differ in their last bits between that and this long one.
    """
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    rng, killed = random.Random(6), 0
    command = [sys.executable, str(Path(__file__).with_name("fixed_costs.py"))]
    reference = tmp_path_factory.mktemp("reference") / "out"
    subprocess.run([*command, *arguments(deep, night, reference)], check=True, capture_output=True)
    command += arguments(deep, night, out)
    while killed < MOMENTS:
        before = finished(partial)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
            # A moment of its work, not of its imports: it holds the lock then.
            while run.poll() is None and not locked(partial):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 1.2) * whole[1] / LAYERS)
            run.kill()
            _, errors = run.communicate()
        killed += 1
        if run.returncode == 0 or out.exists():  # it was quicker
            break
        assert run.returncode == -9, errors
        assert not out.exists()
        assert set(os.listdir(tmp_path)) <= {".out.partial"}
        assert finished(partial) >= before
    assert killed > 1
    if not out.exists():
        subprocess.run(command, check=True, capture_output=True)
    if partial.exists():  # killed behind its last step, which moves the bundle
        assert os.listdir(partial) == ["lock"]
        partial.joinpath("lock").unlink()
        partial.rmdir()
    assert os.listdir(tmp_path) == ["out"]
    assert content_of(out) == content_of(reference)


def locked(partial: Path) -> bool:
    """Whether a process holds the export; to try the lock would refuse it to that process."""
    try:
        inode = (partial / "lock").stat().st_ino
    except FileNotFoundError:
        return False
    return f":{inode} " in Path("/proc/locks").read_text()


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets an export break off when it begins a layer; tells which layers were written."""
    write, written = GraphWriter.layer, []

    def stopping(layer: int | None) -> list[int]:
        def until(self: GraphWriter, folder: Path, index: int, *states: Any) -> Any:
            if index == layer:
                raise KeyboardInterrupt
            written.append(index)
            return write(self, folder, index, *states)

        written.clear()
        monkeypatch.setattr(GraphWriter, "layer", until)
        return written

    return stopping


@pytest.fixture
def interrupted(deep: Path, night: Path, tmp_path: Path, stop_at: Any, capsys: Capture) -> Path:
    """Destination of an export that broke off at its second layer."""
    stop_at(1)
    main(arguments(deep, night, tmp_path / "out"))
    capsys.readouterr()
    return tmp_path / "out"


def test_a_resumed_export_writes_the_layers_that_are_left_and_equals_a_whole_one(
    deep: Path, night: Path, whole: tuple[Path, float], tmp_path: Path, stop_at: Any
) -> None:
    out = tmp_path / "out"
    stop_at(5)
    assert main(arguments(deep, night, out)) == 130
    assert os.listdir(tmp_path) == [".out.partial"]
    states = [path.name for path in (tmp_path / ".out.partial").glob("hidden-*")]
    assert states == ["hidden-05.npy"]  # nothing that is not needed any more
    written = stop_at(None)
    assert main(arguments(deep, night, out)) == 0
    assert written == [5, 6, 7]
    assert os.listdir(tmp_path) == ["out"]
    assert content_of(out) == content_of(whole[0])


def test_an_export_that_broke_off_behind_its_last_file_is_whole_when_resumed(
    deep: Path,
    night: Path,
    whole: tuple[Path, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, write = tmp_path / "out", pipeline.write_card

    def struck(folder: Path, manifest: Manifest) -> None:
        write(folder, replace(manifest, model=replace(manifest.model, name="another")))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_card", struck)
        assert main(arguments(deep, night, out)) == 130
    assert main(arguments(deep, night, out)) == 0
    for name, facts in json.loads((out / "dash.json").read_text())["files"].items():
        assert dataclasses.asdict(file_facts(out / name)) == facts
    assert content_of(out) == content_of(whole[0])


def test_the_folders_above_a_destination_are_made(deep: Path, night: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/sub/out"
    assert main(arguments(deep, night, out)) == 0
    assert (out / "dash.json").is_file() and os.listdir(out.parent) == ["out"]


def test_a_resumed_export_counts_the_time_of_all_its_processes(
    deep: Path, night: Path, tmp_path: Path, stop_at: Any
) -> None:
    out = tmp_path / "out"
    stop_at(3)
    main(arguments(deep, night, out))
    path = tmp_path / ".out.partial/progress.json"
    progress = json.loads(path.read_text())
    path.write_text(json.dumps({**progress, "seconds": 5000.0, "peak_rss_bytes": 10**15}))
    stop_at(None)
    assert main(arguments(deep, night, out)) == 0
    facts = json.loads((out / "dash.json").read_text())["export"]
    assert 5000 < facts["seconds"] < 5600 and facts["peak_rss_bytes"] == 10**15


def test_an_interrupt_before_the_calibration_leaves_nothing(
    deep: Path, night: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def struck(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "calibration_ids", struck)
    assert main(arguments(deep, night, tmp_path / "out")) == 130
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--kv-cache", "int8"), "kv-cache"),
        (("--variants", "full"), "variants"),
        (("--max-length", "100"), "max-length"),
    ],
)
def test_what_another_export_left_is_not_gone_on_with(
    more: tuple[str, str],
    named: str,
    deep: Path,
    night: Path,
    interrupted: Path,
    capsys: Capture,
) -> None:
    message = TOOL.refused(capsys, *arguments(deep, night, interrupted, *more))
    assert named in message and "or pass --overwrite to start again" in message
    assert os.listdir(interrupted.parent) == [".out.partial"]  # and can be gone on with


def test_a_source_that_has_changed_is_not_gone_on_with(
    deep: Path, night: Path, tmp_path: Path, stop_at: Any, capsys: Capture
) -> None:
    source = Path(shutil.copytree(deep, tmp_path / "source"))
    stop_at(1)
    main(arguments(source, night, tmp_path / "out"))
    capsys.readouterr()
    os.utime(source / "model.safetensors", ns=(1, 1))
    message = TOOL.refused(capsys, *arguments(source, night, tmp_path / "out"))
    assert "another model" in message


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("key.json", "{}", "holds an interrupted export with another "),
        ("progress.json", "{", "progress.json is damaged"),
        ("ids.npy", "?", "ids.npy is damaged"),
    ],
)
def test_overwrite_discards_what_no_export_can_continue(
    file: str,
    content: str,
    told: str,
    deep: Path,
    night: Path,
    interrupted: Path,
    stop_at: Any,
    capsys: Capture,
) -> None:
    (interrupted.parent / ".out.partial" / file).write_text(content)
    message = TOOL.refused(capsys, *arguments(deep, night, interrupted))
    assert told in message and "--overwrite" in message
    written = stop_at(None)
    assert main(arguments(deep, night, interrupted, "--overwrite")) == 0
    assert told in capsys.readouterr().err
    assert written == [*range(LAYERS)]
    assert os.listdir(interrupted.parent) == ["out"]


def test_a_calibration_text_is_no_reason_to_refuse_another_export(
    deep: Path, night: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(GraphWriter, "embed", GraphWriter.layer)  # fails
        with pytest.raises(TypeError):
            main(arguments(deep, night, out))
    assert (tmp_path / ".out.partial/calibration.json").is_file()
    assert main(arguments(deep, night, out, "--variants", "int8")) == 0
    assert os.listdir(tmp_path) == ["out"]


KEY = {"model": "a"}


def test_the_folder_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with exporting(out, KEY, overwrite=False) as partial:
        (partial.bundle / "dash.json").write_text("new")
        with (
            pytest.raises(BundleError, match="another process is writing"),
            exporting(out, KEY, overwrite=False),
        ):
            pass
        assert (partial.bundle / "dash.json").read_text() == "new"
    assert (out / "dash.json").read_text() == "new"


def test_a_bundle_that_was_to_be_replaced_comes_back_after_a_kill_between_two_renames(
    tmp_path: Path,
) -> None:
    out, folder = tmp_path / "out", tmp_path / ".out.partial"
    (folder / "replaced").mkdir(parents=True)
    (folder / "replaced" / "dash.json").write_text("old")
    with pytest.raises(BundleError, match="--overwrite"):
        with exporting(out, KEY, overwrite=False):
            pass
    assert (out / "dash.json").read_text() == "old"
    with exporting(out, KEY, overwrite=True) as partial:
        (partial.bundle / "dash.json").write_text("new")
    assert (out / "dash.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]
