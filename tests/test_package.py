"""The wheel: what is in it, and that it runs where it is unpacked."""

from __future__ import annotations

import configparser
import email
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dash_onnx

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and a wheel built from it, made offline from a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dash_onnx", "exporters", "runtime"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    out = source / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    """The only wheel."""
    (path,) = dist.glob("*.whl")
    return zipfile.ZipFile(path)


def read(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode("utf-8")


def test_the_distributions_carry_name_and_version(dist: Path) -> None:
    assert sorted(path.name for path in dist.iterdir()) == [
        f"dash_onnx-{dash_onnx.__version__}-py3-none-any.whl",
        f"dash_onnx-{dash_onnx.__version__}.tar.gz",
    ]


def test_the_wheel_holds_every_file_of_the_sources_and_nothing_else(
    wheel: zipfile.ZipFile,
) -> None:
    files = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in (
            ("dash_onnx", "dash_onnx"),
            ("exporters", "dash_onnx/exporters"),
            ("runtime", "dash_onnx/runtime"),
        )
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {
        "dash_onnx/py.typed",
        "dash_onnx/exporters/export/pipeline.py",
        "dash_onnx/report/report.html.jinja",
        "dash_onnx/runtime/model.py",
        "dash_onnx/serve/page.js",
    } <= files
    assert found == files


def test_the_wheel_installs_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    roots = {name.partition("/")[0] for name in wheel.namelist()}
    assert roots == {"dash_onnx", f"dash_onnx-{dash_onnx.__version__}.dist-info"}
    assert read(wheel, "top_level.txt").split() == ["dash_onnx"]


def test_the_wheel_installs_its_tools_and_none_that_shadows_the_shell(
    wheel: zipfile.ZipFile,
) -> None:
    entries = configparser.ConfigParser()
    entries.read_string(read(wheel, "entry_points.txt"))
    assert entries.sections() == ["console_scripts"]
    assert dict(entries["console_scripts"]) == {
        "dash-export": "dash_onnx.cli.export:main",
        "dash-run": "dash_onnx.cli.run:main",
        "dash-serve": "dash_onnx.cli.serve:main",
        "dash-eval": "dash_onnx.cli.eval:main",
        "dash-train": "dash_onnx.cli.train:main",
        "dash-report": "dash_onnx.cli.report:main",
        "dash-profile": "dash_onnx.cli.profile:main",
        "dash-info": "dash_onnx.cli.info:main",
        "dash-fuse": "dash_onnx.cli.fuse:main",
        "dash-bench": "dash_onnx.cli.bench:main",
    }


def test_the_wheel_requires_the_runtime_only(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_string(read(wheel, "METADATA"))
    base = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split("[>!]", line)[0] for line in base} == {
        "numpy",
        "onnx",
        "ml_dtypes",  # of onnx
        "tokenizers",
        "jinja2",
        "tqdm",
    }
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in read(wheel, "licenses/LICENSE")


def test_an_unpacked_wheel_generates_from_a_bundle(
    wheel: zipfile.ZipFile, tiny_bundle: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    wheel.extractall(site)
    code = (
        "import sys, dash_onnx, dash_onnx.runtime.model as engine\n"
        "print(engine.__file__)\n"
        "model = dash_onnx.load(sys.argv[1], threads=1)\n"
        "print(sum(1 for _ in model.generate_step([5, 6], max_new_tokens=3, ignore_eos=True)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / "dash_onnx/runtime/model.py"), "3"]


def required(lines: Sequence[str], extras: Sequence[str]) -> dict[str, Distribution]:
    """The distributions here that requirements and extras ask for, and what those ask for."""
    found: dict[str, Distribution] = {}
    todo = [(line, extra) for line in lines for extra in ("", *extras)]
    seen: set[tuple[str, str]] = set()
    while todo:
        line, extra = todo.pop()
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": extra}):
            continue
        one = found.setdefault(needed.name, distribution(needed.name))
        assert needed.specifier.contains(one.version, prereleases=True), line
        for more in {"", *needed.extras} - {e for name, e in seen if name == needed.name}:
            seen.add((needed.name, more))
            todo += [(line, more) for line in one.requires or ()]
    return found


def bare_environment(wheel: Path, extras: Sequence[str], folder: Path) -> Path:
    """Makes one that has what the wheel requires, linked, and nothing else; returns its tools."""
    venv.create(folder)
    (site,) = folder.glob("[Ll]ib/**/site-packages")
    lines = email.message_from_string(read(zipfile.ZipFile(wheel), "METADATA"))
    for one in required(lines.get_all("Requires-Dist", []), extras).values():
        for top in {file.parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():  # else a namespace of several
                (site / top).symlink_to(Path(str(one.locate_file(top))).resolve())
    return folder / ("Scripts" if os.name == "nt" else "bin")


@pytest.mark.slow
def test_the_wheel_with_its_extras_exports_and_answers_in_a_bare_environment(
    dist: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    (wheel,) = dist.glob("*.whl")
    tools = bare_environment(wheel, ("cpu", "export"), tmp_path / "bare")
    env = {**os.environ, "DASH_CACHE": str(tmp_path / "cache")}
    env.pop("PYTHONPATH", None)

    def run(tool: object, *arguments: object) -> str:
        command = [str(tool), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--python", tools / "python")
    start = time.perf_counter()
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    answer = run(tools / "dash-run", tiny_folder, "a b", "--raw", "--max-tokens", 3, "--json")
    assert time.perf_counter() - start <= 180
    assert json.loads(answer)["generated_tokens"] == 3
    run(*pip, "check")
    assert str(tiny_folder) in run(tools / "dash-info")
