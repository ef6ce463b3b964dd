"""The demo's recipe: it answers before it trains, and repeats nothing that is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = os.path.relpath(Path(sys.executable).parent, ROOT)  # above ROOT may be a folder with a blank


def make(*arguments: object) -> subprocess.CompletedProcess[str]:
    """With the tools that run this test, whatever `pyproject.toml` is newer than."""
    fixed = ["-C", ROOT, "-o", ".venv/.export", f"BIN={BIN}", "--no-print-directory"]
    return subprocess.run(
        ["make", *map(str, (*fixed, *arguments))],
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # what a tiny model writes is no text
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def commands(done: subprocess.CompletedProcess[str], tools: Path | str = BIN) -> list[str]:
    """The tools that a call of make ran, or would run."""
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{tools}/dash-")]
    return [Path(line.split()[0]).name for line in lines]


@pytest.mark.parametrize(
    ("model", "bundle"),
    [
        ("org/Name-0.5B", "Name-0.5B"),
        ("some/Name-0.5B.Q4_K_M.gguf", "Name-0.5B.Q4_K_M"),
        ("für/Größe_&_Maß#1.gguf", "Größe_&_Maß#1"),
    ],
)
def test_any_model_goes_the_way_of_the_demo_into_a_folder_of_its_name(
    model: str, bundle: str
) -> None:
    done = make("-n", "demo-0.5b", f"MODEL={model}")
    steps = ["dash-export", "dash-run", "dash-train", "dash-run", "dash-report"]
    assert commands(done) == steps
    assert f'"build/demo-0.5b/{bundle}" --effort none' in done.stdout
    assert "--requantize" not in done.stdout


def test_a_demo_of_another_model_needs_one() -> None:
    done = make("-n", "demo-0.5b")
    assert done.returncode != 0 and "demo-0.5b needs MODEL=" in done.stderr


@pytest.mark.parametrize(
    "given",
    ["MODEL=my models/m.gguf", "MODEL=m 2.gguf", "MODEL=m%2.gguf", "MODEL=m:2", "BUNDLE=my out"],
)
def test_a_name_that_make_cannot_take_is_one_line(given: str) -> None:
    done = make("-n", "demo", given)
    (error,) = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert given in error and "link to it" in error


def test_the_demo_answers_trains_and_answers_again(tmp_path: Path) -> None:
    """With commands that do nothing; CI runs the real ones."""
    bundle, tools = tmp_path / "bundle", tmp_path / "bin"
    tools.mkdir()
    for name in ("dash-export", "dash-run", "dash-train"):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\n[ {name} != dash-export ] || mkdir -p "$2"\n')
        tool.chmod(0o755)
    demo = ("demo", f"MODEL={tmp_path}", f"BUNDLE={bundle}", f"BIN={tools}")
    assert commands(make(*demo), tools) == ["dash-export", "dash-run", "dash-train", "dash-run"]
    assert commands(make(*demo), tools) == ["dash-run"]
    (bundle / ".trained").unlink()  # as an interrupted training leaves it
    assert commands(make("-n", *demo), tools) == ["dash-run", "dash-train", "dash-run"]
