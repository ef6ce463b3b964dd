"""dash-run --show-path: what each token cost, in colours or as plain lines."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_tool import Capture, Tool
from scored_bundle import made_up

from dash_onnx.cli.run import main
from dash_onnx.core.actions import Action
from dash_onnx.core.facts import Costs
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import ScoredPolicy
from dash_onnx.report.terminal import PathView, paint
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.results import Chunk

PROMPT = "the keeper of the lighthouse"
QUICK = ("--raw", "--max-tokens", "6", "--ignore-eos", "--show-path")
TOOL = Tool("dash-run", main)
COLOUR = re.compile(r"\x1b\[48;5;(\d+);38;5;16m(.*?)\x1b\[0m", re.DOTALL)
GREEN, RED = "114", "203"


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """stdout and stderr, as they are during a test, claim to be terminals."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)


def rows(printed: str, count: int = 6) -> list[tuple[str, str]]:
    """Cost and path in each of the last lines; the text above them may hold anything."""
    lines = printed.split("\n")[-count - 1 : -1]
    return [(line.split()[-2], line.split()[-1]) for line in lines]


@pytest.mark.parametrize("terminal", [False, True], ids=["no terminal", "NO_COLOR"])
def test_without_colours_a_table_follows_the_text(
    terminal: bool,
    tiny_bundle: Path,
    tiny_model: Model,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    if terminal:
        pretend_terminal(monkeypatch)
        monkeypatch.setenv("NO_COLOR", "1")
    policy = tiny_model.policy("static:int8,skip,int4,full")
    assert TOOL.run(tiny_bundle, PROMPT, *QUICK, "--policy", "static:int8,skip,int4,full") == 0
    captured = capsys.readouterr()
    expected = tiny_model.generate(PROMPT, policy=policy, max_new_tokens=6, ignore_eos=True)
    assert captured.out.startswith(expected + "\n")
    ms = tiny_model.manifest.costs.token_ms(("int8", "skip", "int4", "full"), policy.head)
    table = rows(captured.out[len(expected) + 1 :])
    assert table == [("prompt", "8F4F")] + [(f"{ms:.2f}", "8.4F")] * 5
    assert "\x1b" not in captured.out + captured.err
    assert captured.err.count("[") == 1  # and no legend


def test_in_a_terminal_tokens_are_coloured_and_a_legend_follows(
    tiny_bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pretend_terminal(monkeypatch)
    assert TOOL.run(tiny_bundle, PROMPT, *QUICK, "--policy", "full") == 0
    captured = capsys.readouterr()
    expected = tiny_model.generate(PROMPT, policy="full", max_new_tokens=6, ignore_eos=True)
    assert COLOUR.sub(r"\2", captured.out) == expected + "\n"
    shades = {shade for shade, _ in COLOUR.findall(captured.out)}
    assert shades == {RED}
    legend = captured.err.splitlines()[0]
    assert "cost per token" in legend and GREEN in legend and RED in legend


def test_a_chat_message_and_an_interactive_chat_show_paths_too(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert TOOL.run(tiny_bundle, PROMPT, *QUICK[1:], "--policy", "int4") == 0
    once = capsys.readouterr().out
    assert [path for _, path in rows(once)[1:]] == ["4444"] * 5
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n/reset\n{PROMPT}\n"))
    assert TOOL.run(tiny_bundle, *QUICK[1:], "--policy", "int4") == 0
    assert capsys.readouterr().out == once * 2


def test_json_and_wrong_policies_are_refused(tiny_bundle: Path, capsys: Capture) -> None:
    assert "--json" in TOOL.refused(capsys, tiny_bundle, PROMPT, "--show-path", "--json")
    assert "swift" in TOOL.refused(capsys, tiny_bundle, PROMPT, *QUICK, "--policy", "swift")


def test_a_colour_never_crosses_a_line_break() -> None:
    painted = paint("a\n\nb", 114)
    assert COLOUR.sub(r"\2", painted) == "a\n\nb"
    assert all("\n" not in part for _, part in COLOUR.findall(painted))
    assert paint("", 114) == "" and paint("\n", 114) == "\n"


def scored(manifest: Manifest, int8_ms: float) -> Manifest:
    """The manifest with a policy table and made-up costs; its scorer does not exist."""
    layer: dict[Action, float] = {"full": 1.0, "int8": int8_ms, "int4": 0.3, "skip": 0.1}
    costs = Costs("a machine", 2, 0.1, 0.05, {"full": 0.5, "int8": 0.5, "int4": 0.4}, (layer,) * 4)
    manifest = replace(manifest, costs=costs)
    return replace(manifest, scorer=made_up(manifest, "scorer.onnx"))


def chunk(action: Action) -> Chunk:
    return Chunk(100, (action,) * 4, 1.0, text="x", prompt_tokens=1, generated_tokens=1)


def test_a_scored_policy_is_coloured_around_its_budget(tiny_model: Model, capsys: Capture) -> None:
    budget = 0.5 * (0.1 + 0.5 + 4 * 1.0)

    def shade(ms: float) -> str:
        manifest = scored(tiny_model.manifest, (ms - 0.1 - 0.05 - 0.5) / 4)
        view = PathView(tiny_model.text, manifest, ScoredPolicy(manifest), colour=True)
        assert view.show(chunk("full")) == "x"  # the prompt's run is no token's cost
        ((found, _),) = COLOUR.findall(view.show(chunk("int8")))
        view.finish()
        assert f"budget of {budget:.2f} ms" in capsys.readouterr().err
        return str(found)

    assert shade(0.5 * budget) == shade(0.86 * budget) == GREEN
    assert shade(budget) == "222"
    assert shade(1.14 * budget) == shade(9 * budget) == RED


def test_the_table_counts_the_scorer(tiny_model: Model, capsys: Capture) -> None:
    manifest = scored(tiny_model.manifest, 0.4)
    view = PathView(tiny_model.text, manifest, ScoredPolicy(manifest), colour=False)
    for _ in range(2):
        assert view.show(chunk("int8")) == "x"
    view.finish()
    assert rows(capsys.readouterr().out, 2)[1] == ("2.25", "8888")
