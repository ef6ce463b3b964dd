"""README and documents: their Python runs, their commands and paths exist."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import save_tiny
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.core import contract

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs/guide").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/reference").glob("*.md"))]
TOOLS = {entry.name: entry for entry in entry_points(group="console_scripts")}


def name_of(page: Path) -> str:
    return page.stem


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """Every `dash-*` command of a page, in a block or in a line, as its arguments."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = [
        *text.splitlines(),
        *re.findall(r"`(dash-[a-z]+(?: [^`]*)?)`", page.read_text("utf-8")),
    ]
    split = [shlex.split(line, comments=True) for line in lines]
    parts = [list(p) for line in split for _, p in itertools.groupby(line, lambda w: w in "&&|>")]
    return [part for part in parts if part[0].startswith("dash-") and "…" not in part]


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle in `out`; its policy is made up."""
    folder = tmp_path_factory.mktemp("reader")
    with_scorer(Path(shutil.copytree(tiny_bundle, folder / "out")))
    return folder


def run(page: Path, folder: Path, seconds: int = 120) -> list[str]:
    """Runs the Python of a page in one process; returns the lines it prints."""
    code = "\n".join(blocks(page, "python"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PROGRAMS = [
    ROOT / "README.md",
    *(ROOT / f"docs/guide/{x}.md" for x in ("embed", "speculate", "batch")),
]


@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
def test_the_python_of_a_page_runs(page: Path, folder: Path) -> None:
    assert run(page, folder)


def test_the_program_of_the_bundle_format_gives_the_tokens_of_the_runtime(folder: Path) -> None:
    printed = run(ROOT / "docs/reference/bundle.md", folder)
    with dash_onnx.load(folder / "out", policy="int8") as model:
        tokens = model.generate_step([5, 6, 7], prefill="int8", max_new_tokens=8, ignore_eos=True)
        assert list(map(int, printed)) == [token.token for token in tokens]


@pytest.mark.slow
def test_the_python_reference_exports_trains_and_fuses(night: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", num_hidden_layers=2, max_position_embeddings=64)
    (tmp_path / "notes.txt").write_text(night.read_text() * 4)
    printed = run(ROOT / "docs/reference/python.md", tmp_path, seconds=600)
    assert printed[0] == "new/fused" and len(printed) > 1
    assert dash_onnx.load(tmp_path / "new").manifest.scorer is not None


def test_the_bundle_format_names_every_port() -> None:
    text = (ROOT / "docs/reference/bundle.md").read_text("utf-8")
    dims = contract.Dims(64, 2, 16, 16, 384, "float32")
    graphs = [contract.embed_ports(dims), contract.layer_ports(dims), contract.head_ports(dims)]
    for ports in [*graphs, contract.scorer_ports(dims, 4, 3)]:
        for port in (*ports.inputs, *ports.outputs):
            assert f"`{port.name}`" in text


@cache
def options_of(tool: str) -> set[str]:
    """The options that `tool --help` lists."""
    command = [sys.executable, "-c", f"from {TOOLS[tool].module} import main; main(['--help'])"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z][a-z-]*", done.stdout))


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_the_commands_of_a_page_have_the_options_that_it_uses(page: Path) -> None:
    for tool, *arguments in commands(page):
        used = {argument for argument in arguments if argument.startswith("--")}
        assert used <= options_of(tool), (tool, used)
    known = set().union(*(options_of(tool) for tool in TOOLS if tool.startswith("dash-")))
    assert set(re.findall(r"`(--[a-z-]+)", page.read_text("utf-8"))) <= known


def test_the_reference_shows_the_help_of_every_tool() -> None:
    text = (ROOT / "docs/reference/cli.md").read_text("utf-8")
    shown = re.findall(r"^## (\S+)\n\n<!-- \1 --help -->$", text, re.M)
    assert sorted(shown) == sorted(tool for tool in TOOLS if tool.startswith("dash-"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    folders = "dash_onnx|runtime|exporters|tests|examples|benchmarks"
    for name in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w)", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name


def test_the_python_reference_tells_every_public_name() -> None:
    text = (ROOT / "docs/reference/python.md").read_text("utf-8")
    for name in set(dash_onnx.__all__) - {"__version__"}:
        assert f"::: dash_onnx.{name}\n" in text or f"`{name}`" in text
