"""The page of dash-serve in headless Chromium, at the widths of a desk and of a phone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from node import example
from scored_bundle import with_scorer
from test_serve import Server
from test_web import chromium

import dash_onnx
from dash_onnx.serve.limits import Limits


@pytest.fixture(scope="module")
def url(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("page") / "out")
    with dash_onnx.load(with_scorer(Path(folder)), policy="dash", budget=0.6) as model:
        short = Limits(most_tokens=16)  # two answers fit the context, whatever the policy chooses
        server = Server({"out": model}, short)
        yield server.url
        server.stop()


@pytest.mark.parametrize("look", [("--width", "1200"), ("--width", "390", "--dark")], ids=str)
def test_the_page_chats_and_fits(look: tuple[str, ...], url: str) -> None:
    example("web")  # has the browser's driver
    script = Path(__file__).parent / "chat_page.mjs"
    command = ["node", str(script), url, "the keeper", "counts", *look]
    result = subprocess.run(
        [*command, "--chromium", chromium()], capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["problems"] == []
    assert not found["wide"]
    assert found["told"] == "60 % of the time"  # as the server was started
    presets = httpx.get(f"{url}/v1/models").json()["data"][0]["dash"]["presets"]
    assert found["budgets"] == [None, min(presets.values())]  # only once the slider was moved
    _, facts = found["facts"]
    assert "a second" in facts and "int4" in facts
    assert "the keeper" in found["text"]
