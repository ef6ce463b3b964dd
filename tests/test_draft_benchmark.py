"""benchmarks/speculate.py and serve.py: what they ask, and what they say of the answers."""

from __future__ import annotations

import contextlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dash_onnx.runtime.model import Model

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def speculate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import speculate

    return speculate


def test_edits_of_150_lines_change_one(speculate: Any) -> None:
    edits = speculate.tasks(4)["edit of 150 lines"]
    assert len({task.prompt for task in edits}) == 4
    for task in edits:
        source = task.expected
        assert len(source.splitlines()) == 150 and source in task.prompt
        compile(source, "source", "exec")
        _, field, _, name, _ = task.prompt.partition(" in this file")[0].split("`")
        old = task.prompt.partition(" from ")[2].partition(" to ")[0]
        its_own = source.partition(f"class {name}:")[2].partition("def ")[0]
        assert its_own.count(f"{field}: float = {old}\n") == 1


def test_the_mean_is_over_the_kinds_of_the_file_alone(
    speculate: Any,
    tiny_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit = speculate.Task("the keeper", expected="the keeper counts the ships")
    own = {"questions": [speculate.Task("the night")], "edits": [edit]}
    monkeypatch.setattr(speculate, "tasks", lambda count: own)
    monkeypatch.setattr(speculate.dash_onnx, "load", lambda *_, **__: tiny_model)
    prompts = tmp_path / "spec_bench.jsonl"
    lines = [{"category": kind, "turns": ["the ships"]} for kind in ("qa", "rag", "qa")]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    words = ["speculate.py", "bundle", "--prompts", str(prompts), "--target", "full"]
    monkeypatch.setattr(sys, "argv", [*words, "--max-tokens", "8", "--per-kind", "1", "--json"])
    speculate.main()
    told = json.loads(capsys.readouterr().out)
    found = {(row["kind"], row["speculate"]): row for row in told["rows"]}
    assert {kind for kind, _ in found} == {"questions", "edits", "qa", "rag", "all"}
    assert ("edits", "expected") in found and ("qa", "expected") not in found
    kinds = ("qa", "rag")
    assert [(mean["speculate"], mean["kind"]) for mean in told["means"]] == [
        ("off", "Spec-Bench, geometric mean"),
        ("on", "Spec-Bench, geometric mean"),
    ]
    product = found["qa", "on"]["ratio"] * found["rag", "on"]["ratio"]
    assert told["means"][1]["ratio"] == pytest.approx(product ** (1 / len(kinds)))
    assert "Spec-Bench, geometric mean on " in speculate.table(told["rows"], told["means"])


def test_llama_cpp_that_is_not_installed_is_one_line(
    speculate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "dash_onnx_peers.llama_cpp", raising=False)
    with pytest.raises(SystemExit, match="no llama-cpp-python: run `make"):
        [*speculate.peers_of(Namespace(genai=None, llama_cpp=Path("q4_0.gguf")))]


def test_a_server_without_drafts_takes_turns_with_the_one_that_makes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import serve

    started, asked = list[Any](), dict[str, Any]()

    def running(command: list[str]) -> Any:
        started.append(command)
        return contextlib.nullcontext(f"http://server-{len(started)}")

    async def measured(servers: dict[str, Any], *_: Any) -> dict[str, Any]:
        asked.update(servers)
        return {}

    monkeypatch.setattr(serve, "running", running)
    monkeypatch.setattr(serve, "_measured", measured)
    words = ["serve.py", "bundle", "--policy", "int4", "--clients", "16"]
    monkeypatch.setattr(sys, "argv", [*words, "--without-drafts"])
    serve.main()
    assert [(name, one.url, one.extra) for name, one in asked.items()] == [
        ("dash-serve", "http://server-1", {"policy": "int4"}),
        ("dash-serve, no drafts", "http://server-2", {"policy": "int4", "speculate": False}),
    ]
    assert started[0] == started[1]
