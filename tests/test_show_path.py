"""dash-run --show-path: what each token cost, in colours or as plain lines."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_tool import Capture, Tool

from dash_onnx.cli.run import main
from dash_onnx.core.facts import BudgetPoint, ScorerFacts, Training
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import ScoredPolicy
from dash_onnx.report.terminal import PathView, paint
from dash_onnx.runtime.engine import Model
from dash_onnx.runtime.generate import Chunk

PROMPT = "the keeper of the lighthouse"
QUICK = ("--max-new-tokens", "6", "--ignore-eos", "--show-path")
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


def test_without_a_terminal_a_table_follows_the_text(
    tiny_bundle: Path, tiny_model: Model, capsys: Capture
) -> None:
    assert TOOL.run(tiny_bundle, PROMPT, *QUICK, "--policy", "static:int8,skip,int4,full") == 0
    captured = capsys.readouterr()
    expected = tiny_model.generate(
        PROMPT, policy="static:int8,skip,int4,full", max_new_tokens=6, ignore_eos=True
    )
    assert captured.out.startswith(expected + "\n")
    manifest = tiny_model.manifest
    policy = tiny_model.policy("static:int8,skip,int4,full")
    ms = manifest.costs.token_ms(("int8", "skip", "int4", "full"), policy.head)
    table = rows(captured.out[len(expected) + 1 :])
    assert table == [("prompt", "FFFF")] + [(f"{ms:.2f}", "8.4F")] * 5
    assert "\x1b" not in captured.out + captured.err
    assert captured.err.count("\n") == 1


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


def test_no_color_is_respected(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pretend_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    assert TOOL.run(tiny_bundle, PROMPT, *QUICK) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert rows(captured.out)[-1][1] == "FFFF"


def test_a_chat_message_and_an_interactive_chat_show_paths_too(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert TOOL.run(tiny_bundle, "--chat", PROMPT, *QUICK, "--policy", "int4") == 0
    once = capsys.readouterr().out
    assert [path for _, path in rows(once)[1:]] == ["4444"] * 5
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n/reset\n{PROMPT}\n"))
    assert TOOL.run(tiny_bundle, *QUICK, "--policy", "int4") == 0
    assert capsys.readouterr().out == once * 2


def test_json_is_refused(tiny_bundle: Path, capsys: Capture) -> None:
    message = TOOL.refused(capsys, tiny_bundle, PROMPT, "--show-path", "--json")
    assert "--json" in message


def test_a_wrong_policy_is_still_told_in_one_line(tiny_bundle: Path, capsys: Capture) -> None:
    TOOL.refused(capsys, tiny_bundle, PROMPT, "--show-path", "--policy", "swift")


def test_a_colour_never_crosses_a_line_break() -> None:
    painted = paint("a\n\nb", 114)
    assert COLOUR.sub(r"\2", painted) == "a\n\nb"
    assert all("\n" not in part for _, part in COLOUR.findall(painted))
    assert paint("", 114) == "" and paint("\n", 114) == "\n"


def scored(manifest: Manifest) -> Manifest:
    """The manifest with a policy table; its scorer does not exist."""
    shares = {"full": 0.0, "int8": 0.5, "int4": 0.5, "skip": 0.0}
    points = tuple(
        BudgetPoint(budget, multiplier, "int8", kl, shares)  # type: ignore[arg-type]
        for budget, multiplier, kl in ((0.2, 1.0, 0.5), (0.9, 1e-3, 0.0))
    )
    training = Training("quick", "s", 1, 1, 0, 1.0, (), (), ())
    facts = ScorerFacts("s.onnx", manifest.actions, 1, points, {"balanced": 0.5}, (), training)
    return replace(manifest, scorer=facts, costs=replace(manifest.costs, scorer_ms=1.0))


def chunk(path: tuple[str, ...]) -> Chunk:
    return Chunk("x", 100, path, 1.0, 1, 1)  # type: ignore[arg-type]


def test_a_scored_policy_is_coloured_around_its_budget(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    manifest = scored(tiny_model.manifest)
    view = PathView(tiny_model.text, manifest, ScoredPolicy(manifest), colour=True)
    budget = 0.5 * manifest.costs.token_ms(("full",) * 4, manifest.heads["full"])

    def shade(ms: float) -> str:
        costs = SimpleNamespace(token_ms=lambda path, head, scored: ms if scored else -1.0)
        monkeypatch.setattr(view, "_costs", costs)
        ((found, _),) = COLOUR.findall(view.show(chunk(("int8",) * 4)))
        return found

    assert view.show(chunk(("full",) * 4)) == "x"  # the prompt's run is no token's cost
    assert shade(0.5 * budget) == shade(0.86 * budget) == GREEN
    assert shade(budget) == "222"
    assert shade(1.14 * budget) == shade(9 * budget) == RED
    view.finish()
    assert f"budget of {budget:.2f} ms" in capsys.readouterr().err


def test_the_table_counts_the_scorer(tiny_model: Model, capsys: Capture) -> None:
    manifest = scored(tiny_model.manifest)
    policy = ScoredPolicy(manifest)
    view = PathView(tiny_model.text, manifest, policy, colour=False)
    for _ in range(2):
        assert view.show(chunk(("int8",) * 4)) == "x"
    view.finish()
    ms = manifest.costs.token_ms(("int8",) * 4, policy.head, scored=True)
    assert rows(capsys.readouterr().out, 2)[1] == (f"{ms:.2f}", "8888")
