"""Exports that are killed at random moments, and go on."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_tool import Tool
from conftest import save_tiny

from dash_onnx.cli.export import main

TOOL = Tool("dash-export", main)
LAYERS = 8
MOMENTS = 10
COMMAND = "import sys; from dash_onnx.cli.export import main; sys.exit(main())"

MEASURED = ("costs", "seconds", "peak_rss_bytes")
"""What differs between two exports: keys of dash.json, the latter two in `export`."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "deep", num_hidden_layers=LAYERS)


def arguments(deep: Path, night: Path, out: Path, *more: object) -> list[str]:
    chosen = (deep, out, "--effort", "none", "--calibration", night, "--check", "none")
    return [*map(str, (*chosen, *more))]


def content_of(folder: Path) -> dict[str, Any]:
    """Every byte, but what was measured."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    manifest = json.loads(found["dash.json"])
    del manifest["costs"]
    del manifest["export"]["seconds"], manifest["export"]["peak_rss_bytes"]
    return {**found, "dash.json": manifest}


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
    deep: Path, night: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    """Ten processes one after the other on one export, each killed at a moment of its own."""
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    rng, killed = random.Random(6), 0
    command = [sys.executable, "-c", COMMAND, *arguments(deep, night, out, "--resume")]
    while killed < MOMENTS:
        before = finished(partial)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
            # A moment of its work, not of its imports: it holds the lock then.
            while run.poll() is None and not locked(partial):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 1.8) * whole[1] / LAYERS)
            run.kill()
            _, errors = run.communicate()
        killed += 1
        if run.returncode == 0:  # it was quicker
            break
        assert run.returncode == -9, errors
        assert not out.exists()
        assert set(os.listdir(tmp_path)) <= {".out.partial"}
        assert finished(partial) >= before
    if not out.exists():
        assert main(arguments(deep, night, out, "--resume")) == 0
    assert os.listdir(tmp_path) == ["out"]
    assert content_of(out) == content_of(whole[0])


def locked(partial: Path) -> bool:
    try:
        with (partial / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
