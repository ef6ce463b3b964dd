"""The C++ example finds the tokens that Python finds."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import missing
from scored_bundle import with_scorer
from test_fused import PROMPT, Client

from dash_onnx.core.bundle import Bundle
from dash_onnx.exporters.fused import BUDGET, MODEL, FuseOptions, fuse

SOURCE = Path(__file__).parent.parent / "examples/cpp/generate.cpp"
HEADERS = Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime"))
TOKENS = 24


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None or not (HEADERS / "onnxruntime_cxx_api.h").is_file():
        missing("needs g++ and the headers of libonnxruntime-dev (or ONNXRUNTIME_INCLUDE)")
    folder = tmp_path_factory.mktemp("cpp")
    capi = Path(onnxruntime.__file__).parent / "capi"
    (folder / "libonnxruntime.so.1").symlink_to(next(capi.glob("libonnxruntime.so.1.*")))
    command = ["g++", "-std=c++17", "-Wall", f"-I{HEADERS}", str(SOURCE), "-o", "generate"]
    command += ["./libonnxruntime.so.1", "-Wl,-rpath,$ORIGIN"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "generate"


def test_the_project_builds_with_cmake(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or not (HEADERS / "onnxruntime_cxx_api.h").is_file():
        missing("needs cmake and the headers of libonnxruntime-dev (or ONNXRUNTIME_INCLUDE)")
    packages = Path(onnxruntime.__file__).parent.parent
    options = [f"-DSITE_PACKAGES={packages}", f"-DONNXRUNTIME_INCLUDE={HEADERS}"]
    for command in (["-S", SOURCE.parent, "-B", tmp_path, *options], ["--build", tmp_path]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    usage = subprocess.run([tmp_path / "generate"], capture_output=True, text=True)
    assert usage.returncode == 2 and "usage" in usage.stderr


@pytest.mark.parametrize("budget", [None, 0.35, 0.6])
def test_tokens_are_those_of_python(
    program: Path, tiny_bundle: Path, tmp_path: Path, budget: float | None
) -> None:
    bundle = Bundle(with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path / "out"))))
    fuse(bundle, tmp_path / "fused", FuseOptions(), overwrite=False)
    client, ids, wanted = Client(tmp_path / "fused", bundle.manifest), PROMPT, []
    extra = {} if budget is None else {BUDGET: np.array([budget], np.float32)}
    for _ in range(TOKENS):
        ids = [int(client(ids, **extra)[0][-1].argmax())]
        wanted += ids
    command = [str(program), str(tmp_path / "fused" / MODEL), str(TOKENS), *map(str, PROMPT)]
    given = {} if budget is None else {"DASH_BUDGET": str(budget)}
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **given})
    assert result.returncode == 0, result.stderr
    assert [int(word) for word in result.stdout.split()] == wanted


def test_an_error_is_one_message(program: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    fuse(Bundle(tiny_bundle), tmp_path / "fused", FuseOptions("node", "int8"), overwrite=False)
    one_path, missing_file = tmp_path / "fused" / MODEL, tmp_path / "none.onnx"
    for model, why in ((missing_file, "none.onnx"), (one_path, BUDGET)):
        env = {**os.environ, "DASH_BUDGET": "0.5"}
        command = [str(program), str(model), "4", "1"]
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        assert result.returncode == 1 and not result.stdout
        assert result.stderr.startswith("generate: ") and why in result.stderr
