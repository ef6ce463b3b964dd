"""The report: its figures, its page, and the tool."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_tool import Capture, Tool
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.cli.report import main
from dash_onnx.core.actions import Action, path_letters
from dash_onnx.core.budget import PRESETS, pareto, presets, reference_ms, scorer_facts
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.core.facts import StaticPoint
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import preset_plans
from dash_onnx.exporters.train import tables
from dash_onnx.report.analysis import reliability
from dash_onnx.report.curve import curve
from dash_onnx.report.page import number, render
from dash_onnx.report.report import Report, build
from dash_onnx.report.sample import SampleText, given_text, measure
from dash_onnx.report.scale import Scale, decades, padded
from dash_onnx.report.tokens import describe
from dash_onnx.runtime.model import Model

TEXT = "the keeper of the lighthouse counts 12 ships,\n that pass in the night <s>! " * 4
TOOL = Tool("dash-report", main)
run, refused, json_of = TOOL.run, TOOL.refused, TOOL.json_of


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a scorer. Read-only but for reports."""
    return with_scorer(
        Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("scored") / "out"))
    )


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return dash_onnx.load(bundle)


@pytest.fixture(scope="module")
def text(model: Model) -> SampleText:
    return given_text(model, TEXT, 60, "t.txt")


@pytest.fixture(scope="module")
def report(model: Model, text: SampleText) -> Report:
    return build(model, text, ["balanced", "0.4"])


@pytest.fixture
def ships(tmp_path: Path) -> Path:
    path = tmp_path / "ships.txt"
    path.write_text(TEXT)
    return path


class Page(HTMLParser):
    """What a page holds: tags with attributes, and its visible text; unbalanced tags fail."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# Tokens


def test_tokens_are_told_apart_by_what_they_are(model: Model) -> None:
    tokenizer = model.text.tokenizer
    text = "the keeper12, x\n<s>of"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokens = describe(model.text, ids)
    assert "".join(token.text for token in tokens) == text
    kinds = {token.text: token.kind for token in tokens}
    assert kinds["the"] == "word start"
    assert kinds["1"] == kinds["2"] == "digit"
    assert kinds[","] == "punctuation"
    assert kinds["\n"] == "whitespace"
    assert kinds["<s>"] == "special"
    assert tokens[-1].kind in ("word start", "word continuation")


def test_a_word_goes_on_only_after_a_letter(model: Model) -> None:
    a, b, comma = (model.text.encode(c, add_special_tokens=False)[0] for c in "ab,")
    kinds = [token.kind for token in describe(model.text, [a, b, comma, b, 0, a])]
    start, further = "word start", "word continuation"
    assert kinds == [start, further, "punctuation", start, "special", start]


# The curve


def test_the_curve_keeps_only_static_points_that_nothing_beats(model: Model) -> None:
    facts = scorer_facts(model.manifest)
    front = pareto(facts.static)
    for point in facts.static:
        beaten = [p for p in facts.static if p.budget <= point.budget and p.kl < point.kl]
        assert (point in front) == (not beaten)
    found = curve(model.manifest)
    assert [point.kl for point in found.static] == [point.kl for point in front]
    assert [point.cost for point in found.dash] == [0.2, 0.5, 0.99]


def test_the_curve_has_the_times_that_plans_are_compared_by(model: Model) -> None:
    whole = {"full": 1.0, "int8": 0.9, "int4": 0.8, "decided": 1.2}
    manifest = replace(model.manifest, costs=replace(model.manifest.costs, whole=whole))
    parts, found = curve(model.manifest), curve(manifest)
    assert found.uniform["int4"].cost == pytest.approx(0.8 * parts.uniform["int4"].cost)
    assert [point.cost for point in found.dash] == pytest.approx([0.24, 0.6, 1.188])
    plans = preset_plans(manifest)
    assert {preset.name: preset.cost for preset in found.presets} == {
        name: plan.time for name, plan in plans.items()
    }
    costs = [point.cost for point in found.static]
    assert costs == sorted(costs)


def test_uniform_precisions_come_with_the_head_that_their_policy_uses(model: Model) -> None:
    uniform = curve(model.manifest).uniform
    assert [point.path for point in uniform.values()] == ["8888", "4444"]
    for action, point in uniform.items():
        assert point.head == model.manifest.heads[action]
        assert point.shares[action] == 1.0


LAYERS = 12  # enough for a search of which a table keeps every second step


def static_table(manifest: Manifest, paths: list[tuple[Action, ...]]) -> Manifest:
    """The manifest with as many layers, and these static assignments; INT8 loses least."""
    facts = scorer_facts(manifest)
    static = tuple(
        StaticPoint(0.2 + 0.02 * path.count("int8"), "int8", 0.01 + 0.02 * path.count("int4"), path)
        for path in paths
    )
    return replace(
        manifest,
        model=replace(manifest.model, num_layers=LAYERS),
        scorer=replace(facts, static=static),
    )


def test_the_verdict_compares_with_int4_of_the_table_that_training_measured(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    actions = ("int8", "int4", "skip")
    steps = [tuple(int(layer < done) for layer in range(LAYERS)) for done in range(1, LAYERS + 1)]
    monkeypatch.setattr(tables, "_skipping", lambda trainer, precise: [])
    trainer: Any = SimpleNamespace(
        actions=actions,
        env=SimpleNamespace(layers=LAYERS),
        downgrades=[SimpleNamespace(path=path) for path in steps],
    )
    paths = [tuple(actions[index] for index in path) for path in tables._static_paths(trainer)]
    assert len(paths) == len(set(paths)) and ("int8",) * LAYERS in paths
    found = curve(static_table(model.manifest, paths))
    assert set(found.uniform) == {"int8", "int4"}


def test_the_verdict_says_what_each_preset_runs_and_what_the_other_way_would_take(
    model: Model,
) -> None:
    paths = [("int8",) * LAYERS, ("int4",) * LAYERS]
    manifest = static_table(model.manifest, paths)
    facts = scorer_facts(manifest)
    points = tuple(replace(facts.points[0], budget=b, kl=kl) for b, kl in ((0.4, 0.2), (0.8, 0.01)))
    budgets = dict(zip(paths, (0.9, 0.5), strict=True))
    losses = dict(zip(paths, (0.005, 0.05), strict=True))
    static = tuple(
        replace(point, budget=budgets[point.path], kl=losses[point.path]) for point in facts.static
    )
    told = curve(
        replace(manifest, scorer=replace(facts, points=points, static=static, margin=1.0))
    ).verdict
    first, second, third = told.split("\n")
    assert first.startswith("quality decides per token, ") and "times as fast as one path" in first
    assert second.startswith(
        f"balanced runs int4*{LAYERS} for all tokens; decisions per token would be "
    )
    assert third.startswith("fast decides per token")


def test_a_preset_is_shown_with_the_kl_of_its_plan(model: Model, report: Report) -> None:
    facts = scorer_facts(model.manifest)
    trained = replace(facts, presets=presets(facts.points, facts.margin), static=())
    found = curve(replace(model.manifest, scorer=trained))
    assert [preset.name for preset in found.presets] == ["fast", "balanced", "quality"]
    for preset in found.presets:
        assert preset.kl == pytest.approx(PRESETS[preset.name], rel=0.002)
        assert preset.plan == "decided per token"
    html = render(replace(report, curve=found))
    for kl in PRESETS.values():
        assert f"KL {kl:g} ·" in Page(html).text
    assert html.count(">decided per token</td>") == 3


def test_what_takes_longer_than_the_reference_stands_apart_in_the_picture(report: Report) -> None:
    row, costs = report.curve.dash[-1], (0.5, 1.0, 1.02, 1.05)
    found = replace(report.curve, dash=tuple(replace(row, cost=cost, kl=0.5) for cost in costs))
    page = Page(render(replace(report, curve=found)))
    circles = [attrs for name, attrs in page.tags if name == "circle"]
    places = [attrs["cx"] for attrs in circles if attrs["class"] == "s-dash"]
    assert len({*places[: len(costs)]}) == len(costs)


# The sample


def test_a_run_tells_what_teacher_forcing_tells(
    model: Model, text: SampleText, report: Report
) -> None:
    found, policy = report.sample.runs[0], model.policy("dash", "balanced")
    costs, full = model.manifest.costs, reference_ms(model.manifest)
    rows, actions = [], scorer_facts(model.manifest).actions
    scored = model.score(text.ids, prompt_tokens=8, policy=policy, predictions=True)
    for at, token in enumerate(scored):
        rows.append(token.logits.copy())
        assert found.paths[at] == path_letters(token.path)
        alone = len(token.path)
        spent = costs.token_ms(token.path, policy.head, scored=True, graphs=alone) / full
        assert found.cost[at] == pytest.approx(spent, abs=1e-4)
        assert token.predicted_kl is not None
        predicted = sum(token.predicted_kl[i, actions.index(a)] for i, a in enumerate(token.path))
        assert found.predicted[at] == pytest.approx(predicted, abs=1e-6)
    assert len(rows) == len(found.predicted) == len(found.kl) == len(report.sample.tokens)
    assert len(set("".join(found.paths))) > 1
    reference = torch.from_numpy(model.logits(text.ids, policy="full")[8:])
    p = reference.double().log_softmax(-1)
    q = torch.from_numpy(np.stack(rows)).double().log_softmax(-1)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-6)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_the_baselines_are_static_within_each_budget_and_uniform(report: Report) -> None:
    names = [(b.name, b.budget) for b in report.sample.baselines]
    assert names[-2:] == [("int8", 0.0), ("int4", 0.0)]
    assert {name for name, _ in names[:-2]} <= {"static"}
    for baseline in report.sample.baselines:
        assert baseline.predicted == ()
        assert not baseline.budget or max(baseline.cost) <= baseline.budget + 1e-4


def test_shares_and_classes_add_up(report: Report) -> None:
    for run_, analysis in zip(report.sample.runs, report.analyses, strict=True):
        for layer, shares in enumerate(analysis.layers):
            assert sum(shares.values()) == pytest.approx(1.0)
            column = [path[layer] for path in run_.paths]
            assert shares["skip"] == pytest.approx(column.count(".") / len(column))
        assert analysis.layers[0]["skip"] == 0
        total = sum(facts.tokens for facts in analysis.kinds)
        assert total == len(report.sample.tokens)
        cost = sum(facts.tokens * facts.cost for facts in analysis.kinds) / total
        assert cost == pytest.approx(np.mean(run_.cost))
        skipped = sum(facts.tokens * facts.skipped for facts in analysis.kinds) / total
        assert skipped == pytest.approx("".join(run_.paths).count(".") / (4 * total))


def test_reliability_bins_by_prediction() -> None:
    predicted = [float(i) for i in range(40)]
    facts = reliability(predicted, [2 * value for value in predicted])
    assert [b.tokens for b in facts.bins] == [4] * 10
    assert [b.realised for b in facts.bins] == [2 * b.predicted for b in facts.bins]
    assert facts.bins[0].predicted == pytest.approx(1.5)
    assert all(b.low <= b.realised <= b.high for b in facts.bins)
    assert facts.rank_correlation == pytest.approx(1.0)
    assert reliability(predicted, predicted[::-1]).rank_correlation == pytest.approx(-1.0)
    assert reliability([1.0] * 40, predicted).rank_correlation == 0.0
    assert len(reliability([1.0, 2.0], [1.0, 2.0]).bins) == 2


# Drawing


def test_a_scale_maps_and_stops_at_its_ends() -> None:
    log = Scale(0.01, 1.0, 100, 0, log=True)
    assert log(0.1) == pytest.approx(50)
    assert (log(0.0), log(9.0)) == (100, 0)
    assert log.ticks() == pytest.approx([0.01, 0.1, 1.0])
    assert Scale(0.18, 1.0, 0, 1, log=True).ticks() == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.7, 1.0])
    assert Scale(0.13, 0.97, 0, 1).ticks() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert Scale(3.0, 3.0, 5, 9)(3.0) == 5  # no division by an empty range
    assert decades([0.0, 0.002, 0.5]) == pytest.approx((0.001, 1.0))
    assert decades([0.0]) == (1.0, 10.0)
    assert padded([2.0, 3.0]) == pytest.approx((1.92, 3.08))
    assert padded([]) == (-1.0, 1.0)
    assert [number(v) for v in (0, 1e-4, 0.0123456, 12.34)] == ["0", "1e-4", "0.0123", "12.3"]


def test_the_page_is_one_well_formed_document_that_loads_nothing(report: Report) -> None:
    html = render(report)
    page = Page(html)
    loading = {"script", "link", "img", "iframe", "object", "use", "image"}
    assert not loading & {name for name, _ in page.tags}
    assert not {"src", "href", "srcset"} & {key for _, attrs in page.tags for key in attrs}
    assert not [word for word in ("url(", "@import", "http") if word in html]
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert "nan" not in "".join(v or "" for _, attrs in page.tags for v in attrs.values()).lower()


def test_the_page_shows_every_part(report: Report) -> None:
    page = Page(render(report))
    for part in ("Speed against quality", "Which tokens are cheap", "Training", "Provenance"):
        assert part in page.text
    for fact in report.provenance.values():
        assert fact in page.text
    assert "a <b> & c" in page.text  # as text, not as a tag
    circles = [attrs for name, attrs in page.tags if name == "circle"]
    assert sum(attrs["class"] == "preset" for attrs in circles) == 3
    tabs = [attrs for name, attrs in page.tags if name == "input"]
    assert len(tabs) == 2 and sum("checked" in attrs for attrs in tabs) == 1
    columns = [attrs for name, attrs in page.tags if attrs.get("class") == "over"]
    assert len(columns) == 2 * len(report.sample.tokens)


# The tool


def test_a_report_does_not_load_the_exporters_packages(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "from dash_onnx.cli.report import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [str(bundle), "--html", str(tmp_path / "r.html"), "--max-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert all(line.startswith("dash-report: ") for line in done.stderr.splitlines())


def test_the_report_lies_in_the_bundle_and_may_be_made_again(
    bundle: Path, ships: Path, capsys: Capture
) -> None:
    before = sorted(os.listdir(bundle))
    for _ in range(2):
        assert run(bundle, "--text", ships, "--max-tokens", 20, "--budget", "fast") == 0
        assert capsys.readouterr().out == f"{bundle / 'report.html'}\n"
    assert sorted(os.listdir(bundle)) == sorted([*before, "report.html"])
    assert "ships.txt" in Page((bundle / "report.html").read_text("utf-8")).text
    assert "report.html" not in Bundle(bundle).manifest.files
    (bundle / "report.html").unlink()


def test_without_a_text_the_model_writes_one(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    html = tmp_path / "r.html"
    assert run(bundle, "--html", html, "--max-tokens", 12) == 0
    page = Page(html.read_text("utf-8"))
    assert "self-generated" in page.text
    assert len([1 for name, _ in page.tags if name == "input"]) == 3  # every preset
    assert os.listdir(tmp_path) == ["r.html"]


def test_json_is_the_data(bundle: Path, ships: Path, capsys: Capture) -> None:
    data = json_of(
        capsys,
        bundle,
        "--text",
        ships,
        "--max-tokens",
        20,
        "--budget",
        "0.45",
        "--budget",
        "quality",
    )
    assert [run_["name"] for run_ in data["sample"]["runs"]] == ["dash:0.45", "dash:quality"]
    assert len(data["analyses"]) == 2
    assert len(data["sample"]["tokens"]) == 20
    assert not (bundle / "report.html").exists()
    assert all(math.isfinite(kl) for kl in data["sample"]["runs"][0]["kl"])


def test_a_bundle_without_a_scorer_shows_its_paths(
    tiny_bundle: Path, ships: Path, tmp_path: Path, capsys: Capture
) -> None:
    html = tmp_path / "r.html"
    assert run(tiny_bundle, "--html", html) == 0
    page = Page(html.read_text("utf-8"))
    plan = preset_plans(Bundle(tiny_bundle).manifest)["balanced"]
    assert "Speed against quality" in page.text
    assert f"balanced runs {plan.text} for all tokens" in page.text
    for absent in ("Training", "token by token", "dash: decided", "trained"):
        assert absent not in page.text
    circles = [attrs["class"] for name, attrs in page.tags if name == "circle"]
    static = Bundle(tiny_bundle).manifest.static
    assert circles.count("preset") == 3 and len(circles) == 3 + len(pareto(static))
    capsys.readouterr()
    found = json_of(capsys, tiny_bundle)
    assert found["sample"] is found["training"] is None and found["curve"]["dash"] == []
    assert {*found["curve"]["uniform"]} == {point.path[0] for point in static}
    for given in (("--text", ships), ("--budget", "fast")):
        assert "no policy yet" in refused(capsys, tiny_bundle, *given)


def test_a_bundle_without_any_plan_has_no_report(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "out"))
    replace_manifest(folder, replace(Bundle(folder).manifest, static=()))
    assert "no policy yet" in refused(capsys, folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--budget", "swift"), "nor a preset"),
        (("--budget", "0.05"), "outside what this bundle can do"),
        (("--text", "missing.txt"), "cannot read"),
        (("--html", "no/such/folder/r.html"), "no folder"),
        (("--html", "."), "is a folder"),
        (("--json", "--html", "r.html"), "--html is not written with --json"),
        (("--max-tokens", "0"), "at least 1"),
    ],
)
def test_misuse_is_told_in_one_line(
    arguments: tuple[str, ...], told: str, bundle: Path, capsys: Capture
) -> None:
    assert told in refused(capsys, bundle, *arguments)


@pytest.mark.parametrize("kind", ["fifo", "link", "dangling link", "device"])
def test_only_a_regular_file_is_replaced(
    kind: str, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = Path("/dev/full") if kind == "device" else tmp_path / "r.html"
    (tmp_path / "page.html").write_text("somebody's page")
    if kind == "fifo":
        os.mkfifo(target)
    elif kind != "device":
        target.symlink_to("page.html" if kind == "link" else "nothing")
    before = target.lstat()
    assert "exists and is not a regular file" in refused(capsys, bundle, "--html", target)
    assert (target.lstat().st_mode, target.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert (tmp_path / "page.html").read_text() == "somebody's page"


def test_a_text_that_is_too_short_is_refused(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the")
    assert "needs at least 16" in refused(capsys, bundle, "--text", text)


def test_a_text_of_characters_in_several_tokens_is_quoted_whole(model: Model) -> None:
    text = "the keeper \U0001f642 \u5b57 counts " * 20
    sample = measure(model, given_text(model, text, 60, "a text"), ["balanced"])
    assert any("\ufffd" in token.text for token in sample.tokens)
    assert "\U0001f642 \u5b57" in sample.text


def test_a_short_sample_of_a_long_text_is_a_sample(bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("the keeper counts the ships " * 20)
    assert run(bundle, "--html", tmp_path / "r.html", "--text", text, "--max-tokens", 5) == 0


def test_an_earlier_report_survives_an_interrupt(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    html = tmp_path / "r.html"
    html.write_text("earlier")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    assert run(bundle, "--html", html, "--max-tokens", 8) == 130
    assert capsys.readouterr().out == ""
    assert os.listdir(tmp_path) == ["r.html"]
    assert html.read_text() == "earlier"
