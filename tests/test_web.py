"""The page in headless Chromium says what Python says, with the same decisions on show."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import missing
from node import example
from scored_bundle import with_scorer
from test_node import QUESTION, fused, python

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.text import TextCodec

COMPARED = 40  # tokens: later, sums in another order may turn a near-tie


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("web") / "out")
    return Bundle(with_scorer(Path(folder)))


@pytest.fixture(scope="module", params=["dash", "int4"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def address(bundle: Bundle, policy: str) -> Iterator[str]:
    command = [sys.executable, str(example("web") / "serve.py"), "--port", "0"]
    server = subprocess.Popen([*command, str(fused(bundle, policy, "web"))], stdout=subprocess.PIPE)
    assert server.stdout is not None
    yield server.stdout.readline().decode().strip()
    server.terminate()
    server.wait()


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    missing("chromium is not installed")


def shown(address: str, *arguments: str) -> dict[str, Any]:
    script = Path(__file__).parent / "browser.mjs"
    command = ["node", str(script), address, *arguments, "--chromium", chromium()]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict) and found["problems"] == []
    return found


def paths_of(answer: dict[str, Any]) -> list[list[str]]:
    return [re.findall(r"var\(--(\w+)\)", strip) for strip in answer["strips"]]


def test_the_answer_and_its_strips_are_those_of_python(
    bundle: Bundle, policy: str, address: str
) -> None:
    found = shown(address, QUESTION)
    (answer,) = found["answers"]
    wanted = python(bundle, fused(bundle, policy, "web"), None, COMPARED)
    text = TextCodec(bundle).decode(wanted["tokens"]).rstrip("\ufffd")
    assert "".join(answer["text"]).startswith(text) and text
    assert paths_of(answer)[:COMPARED] == wanted["paths"]
    assert found["isolated"]  # or WebAssembly would run on one thread


def test_the_slider_is_the_budget_of_the_graph(bundle: Bundle, policy: str, address: str) -> None:
    if policy != "dash":
        assert shown(address)["budget"] == ""
        return
    found = shown(address, QUESTION, "--budget", "0.35")
    assert found["budget"] == "35.0 %"
    wanted = python(bundle, fused(bundle, policy, "web"), 0.35, COMPARED)
    assert paths_of(found["answers"][0])[:COMPARED] == wanted["paths"]


def test_the_page_fits_a_phone_and_goes_on_with_a_conversation(address: str) -> None:
    found = shown(f"{address}?tokens=20", QUESTION, "and the ships?", "--width", "360")
    assert not found["wide"]
    assert [len(answer["strips"]) for answer in found["answers"]] == [20, 20]


def test_a_conversation_beyond_the_context_is_told(address: str) -> None:
    found = shown(address, QUESTION, "the keeper counts ships " * 80)  # alone too long
    assert "exceed the context, 256" in found["note"]
