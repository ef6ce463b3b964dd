"""The fused folder: the plan that was asked for, whole or not there, and never an old policy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cli_tool import Capture, Tool
from conftest import save_tiny
from scored_bundle import with_scorer
from test_fused import PLAN, PROMPT, Client, multiplier_at

import dash_onnx
from dash_onnx.cli.fuse import main as fuse_main
from dash_onnx.cli.train import main as train_main
from dash_onnx.core.actions import Action
from dash_onnx.core.budget import presets, scorer_facts
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.core.contract import FUSED_FOLDER
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.facts import StaticPoint
from dash_onnx.core.plans import preset_plans
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.exporters.fused import DATA, FACTS, MODEL, FuseOptions, options_of
from dash_onnx.exporters.fused.genai import adapt_tokenizer
from dash_onnx.exporters.pipeline import build
from dash_onnx.exporters.train.options import PLANS, TrainingPlan, TrainOptions
from dash_onnx.runtime.deciders import Decider, FixedPath, ScoredDecider

FUSE, TRAIN = Tool("dash-fuse", fuse_main), Tool("dash-train", train_main)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path / "alone" / "out")))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least training there is."""
    plan = TrainingPlan(
        sequences=8,
        held_out=4,
        length=48,
        prompt_tokens=16,
        regression_batches=1,
        improvement_steps=1,
    )
    monkeypatch.setitem(PLANS, "quick", plan)


def session(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / MODEL)


# What a budget writes


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
def test_a_preset_writes_its_plan(
    trained: bool, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "out"))
    if trained:
        manifest = Bundle(with_scorer(folder)).manifest
        facts = scorer_facts(manifest)
        facts = replace(facts, presets=presets(facts.points, facts.margin))
        replace_manifest(folder, replace(manifest, scorer=facts))
    else:
        points: list[tuple[float, Action, float]]
        points = [(0.5, "int4", 0.1), (0.7, "int8", 0.05), (1.0, "full", 0.01)]
        static = tuple(StaticPoint(at, "int8", kl, (form,) * 4) for at, form, kl in points)
        replace_manifest(folder, replace(Bundle(folder).manifest, static=static))
    model = dash_onnx.load(folder)
    plans = preset_plans(model.manifest)
    assert len({plan.path for plan in plans.values()}) == (2 if trained else 3)
    assert any(plan.path is None for plan in plans.values()) == trained
    for name, plan in plans.items():
        out = tmp_path / name
        assert FUSE.json_of(capsys, folder, out, "--budget", name)["folder"] == str(out)
        client, sequence = Client(out, model.manifest), model.new_sequence()
        assert client.facts["path"] == (plan.path and [*plan.path])
        if plan.path is not None:
            decider: Decider = FixedPath(plan.path, plan.head)
        else:
            assert client.facts["budgets"]["default"] == plan.budget
            decider = ScoredDecider(sequence, plan.head, multiplier_at(model, plan.budget))
        ours = sequence.prefill(np.array(PROMPT), plan.path or PLAN[0], plan.head)
        np.testing.assert_allclose(client(PROMPT)[0][-1], ours, atol=2e-4)
        for token in range(100, 110):
            ours, path = sequence.forward(token, decider)
            theirs, taken = client([token])
            assert taken in ([], [*path])
            np.testing.assert_allclose(theirs[-1], ours, atol=2e-4)


# Damage is told by the client


def test_a_missing_data_file_is_the_clients_own_error(bundle: Path) -> None:
    assert FUSE.run(bundle) == 0
    (bundle / FUSED_FOLDER / DATA).unlink()
    with pytest.raises(Exception, match=DATA):
        session(bundle / FUSED_FOLDER)


def test_a_truncated_data_file_is_the_clients_own_error(bundle: Path) -> None:
    assert FUSE.run(bundle) == 0
    data = bundle / FUSED_FOLDER / DATA
    with data.open("rb+") as file:
        file.truncate(data.stat().st_size // 2)
    with pytest.raises(Exception, match=r"out of bounds|exceed|invalid|size"):
        session(bundle / FUSED_FOLDER)


# All or nothing


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_killed_dash_fuse_leaves_no_folder(bundle: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "fused"
    kill = f"lambda *_: os.kill(os.getpid(), signal.{name})"
    code = (
        "import os, signal, sys, onnx\n"
        f"onnx.checker.check_model = {kill}\n"  # the graph and its data are written by then
        "from dash_onnx.cli.fuse import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(bundle), str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == (130 if name == "SIGTERM" else -9), result.stderr
    assert not out.exists()
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".fused")]
    assert len(left) == (0 if name == "SIGTERM" else 1)  # nobody can tidy up after SIGKILL
    assert FUSE.run(bundle, out) == 0  # but the next one does
    assert [path.name for path in tmp_path.iterdir() if "fused" in path.name] == ["fused"]


# Training


def test_training_renews_the_fused_folder_as_it_was_asked_for(
    bundle: Path, night: Path, quick: None, capsys: Capture
) -> None:
    # Without the policy it would be the fastest plan of this machine, which may be a path.
    assert FUSE.run(bundle, "--for", "web", "--policy", "dash", "--budget", "fast") == 0
    before = (bundle / FUSED_FOLDER / MODEL).read_bytes()
    assert TRAIN.run(bundle, "--calibration", night) == 0
    facts = json.loads((bundle / FUSED_FOLDER / FACTS).read_text())
    wanted = {"client": "web", "policy": "dash", "budget": "fast", "prefill": None}
    assert facts["options"] == wanted
    scorer = Bundle(bundle).manifest.scorer
    assert scorer is not None
    assert facts["budgets"]["presets"] == scorer.presets
    assert facts["budgets"]["default"] == scorer.presets["fast"]
    assert (bundle / FUSED_FOLDER / MODEL).read_bytes() != before


def test_training_the_folder_that_one_stands_in_renews_the_graph(
    bundle: Path, night: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert FUSE.run(bundle, "--policy", "dash") == 0
    before = (bundle / FUSED_FOLDER / MODEL).read_bytes()
    monkeypatch.chdir(bundle)
    assert TRAIN.run(".", "--calibration", night) == 0
    assert (bundle / FUSED_FOLDER / MODEL).read_bytes() != before


def test_texts_are_found_from_the_folder_that_an_export_replaces(
    tiny_folder: Path, bundle: Path, night: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = (os.path.relpath(night, bundle),)
    monkeypatch.chdir(bundle)
    options = ExportOptions(overwrite=True, calibration=texts)
    training = TrainOptions(effort="quick", calibration=texts)
    manifest = build(str(tiny_folder), Path(), options, check="none", training=training).manifest
    assert manifest.scorer is not None and Bundle(bundle).manifest.scorer is not None


def test_options_from_python_are_those_that_are_read_again(bundle: Path) -> None:
    dash_onnx.fuse(bundle, policy="dash", budget=0.35)  # type: ignore[arg-type]
    assert options_of(bundle / FUSED_FOLDER) == FuseOptions(policy="dash", budget="0.35")
    with pytest.raises(UnsupportedError, match="choose genai"):
        dash_onnx.fuse(bundle, overwrite=True, client="nodejs")


def test_a_path_from_a_file_stays_that_path(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "path.txt"
    file.write_text("int8,int4,skip,int8")
    FUSE.json_of(capsys, bundle, "--policy", f"static:@{file}")
    file.unlink()
    options = options_of(bundle / FUSED_FOLDER)
    assert options == FuseOptions(policy="static:int8,int4,skip,int8")


def test_a_file_that_onnx_refuses_to_read_is_one_line(
    bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    os.link(bundle / "layers/01/int8.onnx.data", tmp_path / "second name")
    assert "hard link" in FUSE.refused(capsys, bundle, "--policy", "int8")


def test_products_of_one_shape_share_what_a_web_graph_adds(
    tmp_path: Path, night: Path, capsys: Capture
) -> None:
    source = save_tiny(tmp_path / "model", num_hidden_layers=1, intermediate_size=64)
    export(str(source), tmp_path / "out", ExportOptions(variants=("int8",), calibration=(night,)))
    FUSE.json_of(capsys, tmp_path / "out", "--for", "web", "--policy", "int8")
    graph = onnx.load(tmp_path / "out" / FUSED_FOLDER / MODEL, load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer]
    assert len(names) == len({*names})


def test_a_fused_folder_that_cannot_be_renewed_is_removed_and_named(
    bundle: Path, night: Path, quick: None, capsys: Capture
) -> None:
    assert FUSE.run(bundle, "--budget", "0.25") == 0
    facts = bundle / FUSED_FOLDER / FACTS
    facts.write_text(facts.read_text().replace('"0.25"', '"0.0001"'))  # no new policy holds it
    capsys.readouterr()
    assert TRAIN.run(bundle, "--calibration", night) == 0
    assert "held the old policy: removed; budget 0.0001 is outside" in capsys.readouterr().err
    assert not (bundle / FUSED_FOLDER).exists()


def test_unreadable_facts_are_told_before_training(bundle: Path, capsys: Capture) -> None:
    assert FUSE.run(bundle) == 0
    (bundle / FUSED_FOLDER / FACTS).write_text("{}")
    capsys.readouterr()
    assert "and run dash-fuse again" in TRAIN.refused(capsys, bundle)


@pytest.mark.parametrize("sentencepiece", [True, False])
def test_a_sentencepiece_tokenizer_gets_the_class_that_genai_needs(
    sentencepiece: bool, tmp_path: Path
) -> None:
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    other = {"type": "Prepend", "prepend": "\u2581"}
    normalizers = [other, replaced] if sentencepiece else [other]
    added = [("</s>", True), ("\u2581\u2581", False), ("\u2581a", False), ("\u2581", False)]
    tokenizer = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "model": {"vocab": {"</s>": 0, "\u2581\u2581": 1, "\u2581a": 2}},
        "added_tokens": [{"content": text, "special": special} for text, special in added],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "A", "bos_token": "<s>"}')
    adapt_tokenizer(tmp_path)
    found = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    kept = [added[0], *added[2:]] if sentencepiece else added
    assert [(token["content"], token["special"]) for token in found] == kept
    facts = json.loads((tmp_path / "tokenizer_config.json").read_text())
    wanted = "GemmaTokenizer" if sentencepiece else "A"
    assert facts == {"tokenizer_class": wanted, "bos_token": "<s>"}
