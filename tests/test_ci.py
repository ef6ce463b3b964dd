"""`.ci/run` tries the checkout in a folder called dash-onnx, wherever it lies."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci/run"
TOOLS = ("make", "npm", "chromium", "apt-get")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """What the script calls, which does nothing but say where; `make docs` may be told to fail."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).write_text(
            f'#!/bin/sh\necho {name} "$@" in "$(pwd -P)" with *\n[ "$*" != docs ] || exit "$DOCS"\n'
        )
        (folder / name).chmod(0o755)
    return folder


def ran(checkout: Path, tools: Path, docs: int = 0) -> subprocess.CompletedProcess[str]:
    """The script in a checkout with something built."""
    for name in (".ci", ".venv", "build", "examples/web/node_modules", "tests"):
        (checkout / name).mkdir(parents=True)
    shutil.copy(SCRIPT, checkout / ".ci")
    temporary = tools.parent / "temporary"
    temporary.mkdir()
    return subprocess.run(
        ["bash", ".ci/run"],
        cwd=checkout,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "TMPDIR": str(temporary),
            "DOCS": str(docs),
        },
    )


@pytest.mark.parametrize("name", ["checkout", "dash-onnx", "my chück-out"])
def test_it_runs_in_a_folder_called_dash_onnx_and_leaves_nothing(
    name: str, tools: Path, tmp_path: Path
) -> None:
    done = ran(tmp_path / name, tools)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if line.startswith("make ")]
    assert {"check", "docs", "test", "demo", "test-slow"} <= {line.split()[1] for line in lines}
    inside = tmp_path / name if name == "dash-onnx" else tmp_path / "temporary"
    for line in lines:
        assert f" in {inside}" in line and "/dash-onnx with " in line
        assert line.endswith(f" with {'build ' if name == 'dash-onnx' else ''}examples tests")
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("name", ["checkout", "dash-onnx"])
def test_its_exit_code_is_that_of_what_failed(name: str, tools: Path, tmp_path: Path) -> None:
    done = ran(tmp_path / name, tools, docs=7)
    assert done.returncode == 7
    assert "make docs " in done.stdout and "make test " not in done.stdout
    assert list((tmp_path / "temporary").iterdir()) == []
