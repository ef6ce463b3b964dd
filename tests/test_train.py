"""Training: a bundle gets a scorer that decides as it was trained, all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from cli_tool import Capture, Tool
from conftest import layer_inputs, save_tiny
from test_environment import recorded

import dash_onnx
from dash_onnx.cli.train import _parser, main
from dash_onnx.core.actions import Action, ActionPath
from dash_onnx.core.atomic import TRAINING, discard, locked
from dash_onnx.core.budget import OTHER_TEXT, presets, shown
from dash_onnx.core.bundle import Bundle, file_facts, replace_manifest
from dash_onnx.core.contract import CARD_NAME, REPORT_NAME
from dash_onnx.core.errors import BundleError, DashError, DeviceError, PolicyError
from dash_onnx.core.facts import BudgetPoint, Costs, ScorerFacts
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import preset_plans
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.exporters.pipeline import build
from dash_onnx.exporters.train import train as train_module
from dash_onnx.exporters.train.checkpoint import Checkpoint
from dash_onnx.exporters.train.environment import State
from dash_onnx.exporters.train.finish import _fitted, _margin, exported_scorer
from dash_onnx.exporters.train.improve import drawing, explore
from dash_onnx.exporters.train.options import TrainingPlan, TrainOptions
from dash_onnx.exporters.train.regress import centre, collect
from dash_onnx.exporters.train.scorer import BundleScorer, Scorer
from dash_onnx.exporters.train.tables import efficient, tables
from dash_onnx.exporters.train.train import learn, train
from dash_onnx.exporters.train.trainer import Trainer
from dash_onnx.exporters.train.transfer import load_scorer
from dash_onnx.exporters.train.values import sampled_values
from dash_onnx.runtime.deciders import ScoredDecider
from dash_onnx.runtime.machine import machine_name
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.ort import create_session, has_device

LAYERS = 4
PROMPT = 16
PLAN = TrainingPlan(
    sequences=8,
    held_out=4,
    length=64,
    prompt_tokens=PROMPT,
    augment=False,
    regression_batches=2,
    improvement_steps=3,
    decision_points=(2, 3),  # segments of one and two layers
    dtype="float32",
    save_every=1,
)
OPTIONS = TrainOptions(plan=PLAN)
ACTIONS = ("full", "int8", "int4", "skip")
COSTS = Costs(
    machine="a test",
    threads=1,
    embed_ms=0.1,
    scorer_ms=0.2,
    heads_ms={"full": 2.0, "int8": 1.0, "int4": 0.5},
    layers_ms=({"full": 4.0, "int8": 2.0, "int4": 1.0, "int2": 0.6, "skip": 0.2},) * LAYERS,
)
FULL_MS = 0.1 + 4 * 4.0 + 2.0
SENTENCE = "the keeper of the lighthouse counts 42 ships that pass in the night\n"
TOOL = Tool("dash-train", main)
TOOL_PARSER = _parser()
COMMAND = "import sys; from dash_onnx.cli.train import main; sys.exit(main())"


def with_plan(**changes: Any) -> TrainOptions:
    return TrainOptions(plan=dataclasses.replace(PLAN, **changes))


def fixed_costs(bundle: Bundle, _: object = None) -> Costs:
    """In place of the profile of this machine."""
    manifest = bundle.manifest
    heads = {head: COSTS.heads_ms[head] for head in manifest.exported_heads}
    layers = tuple({a: ms[a] for a in manifest.actions} for ms in COSTS.layers_ms)
    return dataclasses.replace(COSTS, heads_ms=heads, layers_ms=layers)


def at_costs(folder: Path, costs: Costs | None = None) -> Path:
    bundle = Bundle(folder)
    manifest = dataclasses.replace(bundle.manifest, costs=costs or fixed_costs(bundle))
    replace_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers do little enough that skipping them is worth the time."""
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny", initializer_range=0.05)


@pytest.fixture(scope="module")
def untrained(source: Path, night: Path, export_tiny: Callable[..., Path]) -> Path:
    """Read-only, like `trained`."""
    return at_costs(export_tiny(source, calibration=(night,)))


@pytest.fixture(scope="module")
def trained(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with seed 0 without interruption."""
    folder = Path(shutil.copytree(untrained, tmp_path_factory.mktemp("trained") / "out"))
    train(folder, OPTIONS, profile=fixed_costs)
    return folder


@pytest.fixture(scope="module")
def trainer(untrained: Path) -> Trainer:
    """What the same training had learned before it exported anything."""
    return learned(untrained)


@pytest.fixture(scope="module")
def model(trained: Path) -> Model:
    return dash_onnx.load(trained)


@pytest.fixture
def bundle(untrained: Path, tmp_path: Path) -> Path:
    """An untrained bundle to train, alone in its folder."""
    return Path(shutil.copytree(untrained, tmp_path / "alone" / "out"))


@pytest.fixture
def again(trained: Path, tmp_path: Path) -> Path:
    """A trained bundle to train again, or to damage."""
    return Path(shutil.copytree(trained, tmp_path / "alone" / "out"))


class InMemory(Checkpoint):
    """Leaves nothing beside the bundle."""

    def __init__(self, *_: object):
        self.state = {}

    def save(self, **values: Any) -> None:
        self.state.update(values)


def prepared(folder: Path, options: TrainOptions = OPTIONS) -> Trainer:
    trainer = Trainer(Bundle(folder), options, checkpoint=InMemory)
    trainer.prepare_text()
    return trainer


def learned(folder: Path, options: TrainOptions = OPTIONS) -> Trainer:
    trainer = prepared(folder, options)
    learn(trainer)
    return trainer


def same_scorer(one: Trainer, other: Trainer) -> bool:
    pair = one.scorer.state_dict(), other.scorer.state_dict()
    return all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0] | pair[1])


def files_of(folder: Path) -> dict[str, bytes]:
    """Of the folder around a bundle, whatever lies beside it too, but for a checkpoint."""
    paths = [path.relative_to(folder.parent) for path in folder.parent.rglob("*") if path.is_file()]
    kept = [path for path in paths if path.parts[0] != ".out.training"]
    return {path.as_posix(): (folder.parent / path).read_bytes() for path in kept}


def scorer_of(folder: Path) -> ScorerFacts:
    facts = Bundle(folder).manifest.scorer
    assert facts is not None
    return facts


# What is in the bundle afterwards


def test_the_bundle_gets_one_scorer_and_is_otherwise_as_it_was(
    untrained: Path, trained: Path
) -> None:
    before, after = files_of(untrained), files_of(trained)
    file = scorer_of(trained).file
    content = after.pop(f"out/{file}")
    assert file == f"scorer-{hashlib.sha256(content).hexdigest()[:12]}.onnx"
    assert str(Path(__file__).parent.parent).encode() not in content  # no paths of this machine
    for name in ("out/dash.json", f"out/{CARD_NAME}"):
        del before[name], after[name]
    assert after.keys() == before.keys()  # and no checkpoint is left
    changed = {name for name in after if after[name] != before[name]}
    assert changed and all("/skip.onnx" in name for name in changed)  # the compensation
    assert sorted(path.name for path in trained.parent.iterdir()) == ["out"]


def test_the_manifest_says_how_the_scorer_came_about(untrained: Path, trained: Path) -> None:
    before, manifest = Bundle(untrained).manifest, Bundle(trained).manifest
    facts, training = scorer_of(trained), scorer_of(trained).training
    assert facts.actions == ACTIONS and facts.decision_points == (2, 3)
    assert (training.effort, training.source, training.seed) == ("quick", "self-generated", 0)
    assert facts.margin == OTHER_TEXT > 1
    assert facts.presets == presets(facts.points, OTHER_TEXT)
    # A quarter of the 12 sequences; tokens of the prompt part are not measured.
    assert training.held_out_tokens == 3 * (PLAN.length - PROMPT)
    assert training.tokens == 9 * PLAN.length
    assert len(training.loss) == len(training.kl) == len(training.cost) == PLAN.improvement_steps
    assert np.isfinite(training.loss).all()
    assert manifest.costs == fixed_costs(Bundle(trained))
    unchanged = {"scorer": None, "files": before.files, "costs": before.costs}
    assert dataclasses.replace(manifest, **unchanged) == before
    assert manifest.files == {name: file_facts(trained / name) for name in manifest.files}


def test_the_table_ascends_and_its_presets_lie_within(trained: Path) -> None:
    facts = scorer_of(trained)
    budgets = [point.budget for point in facts.points]
    lost = [point.kl for point in facts.points]
    assert len(budgets) > 3
    assert budgets == sorted(set(budgets))
    assert lost == sorted(set(lost), reverse=True)
    for head in ("int8", "int4"):
        multipliers = [point.multiplier for point in facts.points if point.head == head]
        assert multipliers == sorted(set(multipliers), reverse=True)
    for point in facts.points:
        assert sum(point.shares.values()) == pytest.approx(1, abs=1e-3)
        assert point.shares["skip"] <= 0.75
        assert point.head in ("int8", "int4")
        mean = sum(COSTS.layers_ms[0][action] * share for action, share in point.shares.items())
        ms = LAYERS * mean + COSTS.heads_ms[point.head] + 0.3
        assert point.budget == pytest.approx(ms / FULL_MS, abs=1e-3)
    assert set(facts.presets) == {"quality", "balanced", "fast"}
    assert budgets[0] - 1e-4 <= facts.presets["fast"] <= facts.presets["balanced"]
    assert facts.presets["balanced"] <= facts.presets["quality"] <= budgets[-1] + 1e-4


def test_static_assignments_are_costed_and_a_mild_one_is_nearly_lossless(trained: Path) -> None:
    points = scorer_of(trained).static
    assert points and [p.budget for p in points] == sorted(p.budget for p in points)
    for point in points:
        ms = COSTS.token_ms(point.path, point.head)
        assert point.budget == pytest.approx(ms / FULL_MS, abs=1e-4)
        assert point.path[0] != "skip"
    assert min(point.kl for point in points) < max(point.kl for point in points) / 4
    for action in ("int8", "int4"):
        assert any(set(point.path) == {action} for point in points)
    (full,) = (point for point in points if set(point.path) == {"full"})  # the reference itself
    assert (full.budget, full.kl) == (1.0, 0.0)


def test_the_kl_of_a_static_assignment_is_that_of_the_runtime(trained: Path, model: Model) -> None:
    """On the held-out text itself it would be equal; on other text it is of the same size."""
    ids = np.random.default_rng(0).integers(2, 384, 200)
    reference = torch.from_numpy(model.logits(ids, policy="full")).double().log_softmax(-1)
    found, wanted = [], []
    for point in [p for p in scorer_of(trained).static if p.head == "int8"]:
        logits = model.logits(ids, policy="static:" + ",".join(point.path))
        ours = torch.from_numpy(logits).double().log_softmax(-1)
        found.append(float((reference.exp() * (reference - ours)).sum(-1)[32:].mean()))
        wanted.append(point.kl)
    assert len(found) > 3
    assert np.corrcoef(np.log(found), np.log(wanted))[0, 1] > 0.9


# What the runtime makes of it


def test_a_trained_bundle_generates_with_its_plans_and_with_the_scorer(model: Model) -> None:
    plan = preset_plans(model.manifest)["balanced"]
    assert model.policy().uniform == plan.path
    options = {"max_new_tokens": 12, "ignore_eos": True}
    assert model.generate("the keeper", **options)
    for budget in ("quality", "balanced", "fast"):
        assert model.generate("the keeper", policy="dash", budget=budget, **options)


def scored_paths(
    model: Model, ids: np.ndarray, multiplier: float, head: Any = "int8"
) -> list[ActionPath]:
    sequence, best = model.new_sequence(), model.manifest.variants[0]
    sequence.prefill(ids[:4], (best,) * LAYERS, head)
    decider = ScoredDecider(sequence, head, multiplier)
    return [sequence.forward(int(token), decider)[1] for token in ids[4:]]


def compared_paths(
    folder: Path, model: Model, scorer: BundleScorer, multiplier: float
) -> set[ActionPath]:
    """Paths that the runtime takes, once each decision is the scorer's and its graph's."""
    facts = scorer_of(folder)
    session = create_session(folder / facts.file, "cpu")
    ids = np.random.default_rng(1).integers(2, 384, 40)
    penalty = multiplier * torch.tensor(model.manifest.costs.in_units(ACTIONS))
    penalty[0, -1] = 1e30
    paths = scored_paths(model, ids, multiplier)
    taken = np.array([[ACTIONS.index(action) for action in path] for path in paths])
    inputs = torch.from_numpy(layer_inputs(model, ids, paths, 4))  # [T, L, D]
    for start, stop in facts.segments(LAYERS):
        hidden = inputs[:, max(start - 1, 0)]
        feeds = [{"hidden": row[None].numpy(), "penalty": penalty.numpy()} for row in hidden]
        totals = np.stack([session.run(None, feed)[0] for feed in feeds])[:, start:stop]
        assert (totals.argmin(-1) == taken[:, start:stop]).all()
        values = scorer.values(State(slice(start, stop), hidden[None]))[0].detach()
        assert (values.diff(dim=-1) >= 0).all()
        np.testing.assert_allclose(totals, values + penalty[start:stop], rtol=1e-5)
    return set(paths)


def test_the_runtime_decides_as_the_trained_scorer_and_as_its_graph(
    trained: Path, trainer: Trainer, model: Model
) -> None:
    scorer, _ = exported_scorer(trainer)
    compare = partial(compared_paths, trained, model, scorer)
    multipliers = [point.multiplier for point in scorer_of(trained).points]
    seen = [compare(one) for one in np.geomspace(min(multipliers), max(multipliers), 24)]
    assert len(set.union(*seen)) > 5
    assert any(len(paths) > 1 for paths in seen)  # tokens differ
    assert compare(1e-9) == {("full",) * LAYERS}
    for multiplier in (1e3, 1e20):
        assert compare(multiplier) == {("int4", "skip", "skip", "skip")}  # the first always runs


# What it learns from


def test_only_the_models_own_text_and_only_what_is_learned_from_it_is_augmented(
    untrained: Path, night: Path
) -> None:
    for files in ((), (night,)):
        plain, changed = (
            prepared(untrained, dataclasses.replace(with_plan(augment=augment), calibration=files))
            for augment in (False, True)
        )
        assert torch.equal(plain.held_out, changed.held_out)
        assert torch.equal(plain.ids, changed.ids) == bool(files)


def test_samples_lie_beside_the_states_of_their_tokens(untrained: Path) -> None:
    trainer = prepared(untrained)
    hidden, samples = collect(trainer, PLAN.regression_batches)
    generator, seen = torch.Generator().manual_seed(OPTIONS.seed), slice(PROMPT // 8, None)
    batches = map(trainer.batch, range(PLAN.regression_batches))
    passes = [sampled_values(trainer.env, ids, generator) for ids in batches]
    assert torch.equal(samples, torch.cat([drawn[:, seen].flatten(0, 1) for _, drawn, _ in passes]))
    for number, part in enumerate(hidden.values(), 1):
        wanted = [states[number].hidden[:, seen].flatten(0, 1) for states, *_ in passes]
        assert torch.equal(part, torch.cat(wanted))


def test_a_pass_credits_actions_with_what_they_would_have_changed(untrained: Path) -> None:
    """The KL of all tokens, later ones included, which see the K/V of the one that changes."""
    trainer = prepared(untrained)
    env, count, ids = trainer.env, len(trainer.actions), trainer.batch(0)
    one_hot = torch.nn.functional.one_hot
    with torch.no_grad():
        trainer.scorer.bias.fill_(-2.0)
    log_multipliers = trainer.log_multipliers(len(ids))
    taken = torch.cat(env.run(ids, drawing(trainer, log_multipliers, 1.0)).decisions, 2)
    assert len(taken.argmax(-1).unique()) == count
    credit = torch.zeros(())
    for _ in range(60):  # Fisher samples of the same decisions
        experience, *_ = explore(trainer, 0, log_multipliers, recorded(taken))
        credit = credit + experience["credit"].view(len(ids), -1, LAYERS, count) / 60

    def kl(decisions: torch.Tensor) -> torch.Tensor:
        final = env.run(ids, recorded(decisions)).final
        return env.kl(trainer.reference(0), final)[:, PROMPT:].double().sum(-1)

    found, wanted = [], []
    with torch.no_grad():
        before = kl(taken)
        for place in range(40):
            token, layer = PROMPT + place % (ids.shape[1] - PROMPT), 1 + place % (LAYERS - 1)
            for action in range(count):
                other = taken.clone()
                other[:, token, layer] = one_hot(torch.tensor(action), count).float()
                found.append(credit[:, token - PROMPT, layer, action])
                wanted.append(kl(other) - before)
    ours, theirs = torch.cat(found).double(), torch.cat(wanted)
    kept = theirs == 0  # what was drawn anyway
    assert torch.allclose(ours[kept], torch.zeros(()).double())
    assert (theirs < 0).any() and (theirs > 0).any()
    assert float(torch.corrcoef(torch.stack([ours[~kept], theirs[~kept]]))[0, 1]) > 0.85
    assert 0.8 < float((ours * theirs).sum() / theirs.square().sum()) < 1.25


# Seeds and interruptions


def interrupted(*_: object) -> Costs:
    raise KeyboardInterrupt


def test_the_same_seed_gives_the_same_bundle_although_it_was_interrupted(
    bundle: Path, trained: Path
) -> None:
    torch.manual_seed(99)  # training must not depend on it, and must leave it alone
    state, before = torch.get_rng_state(), files_of(bundle)
    with pytest.raises(KeyboardInterrupt):
        train(bundle, OPTIONS, profile=interrupted)
    assert files_of(bundle) == before
    train(bundle, OPTIONS, profile=fixed_costs)
    assert torch.equal(torch.get_rng_state(), state)
    found, wanted = scorer_of(bundle), scorer_of(trained)
    training = dataclasses.replace(found.training, seconds=wanted.training.seconds)
    assert dataclasses.replace(found, training=training) == wanted
    ours, theirs = files_of(bundle), files_of(trained)
    del ours["out/dash.json"], theirs["out/dash.json"]
    assert ours == theirs
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["out"]


def stopping(saves: int) -> type[Checkpoint]:
    """A checkpoint that is interrupted when it should save once more than so often."""

    class Stopping(Checkpoint):
        left = saves

        def save(self, **values: Any) -> None:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            super().save(**values)

    return Stopping


@pytest.mark.parametrize("saves", range(2 + PLAN.improvement_steps))  # text, regression, steps
def test_an_interrupted_training_goes_on_and_learns_the_same(
    saves: int, bundle: Path, trainer: Trainer
) -> None:
    before = files_of(bundle)
    with pytest.raises(KeyboardInterrupt):
        learn(Trainer(Bundle(bundle), OPTIONS, checkpoint=stopping(saves)))
    assert files_of(bundle) == before
    resumed = Trainer(Bundle(bundle), OPTIONS)
    state = resumed.checkpoint.state
    assert ("ids" in state, "scorer" in state) == (saves > 0, saves > 1)
    assert state.get("step", 0) == max(saves - 2, 0)
    learn(resumed)
    assert same_scorer(resumed, trainer)
    assert resumed.history == trainer.history


def test_a_resumed_training_counts_the_time_of_all_its_runs(bundle: Path) -> None:
    Trainer(Bundle(bundle), OPTIONS).prepare_text()
    path = bundle.parent / ".out.training" / "state.pt"
    state = torch.load(path)
    assert 0 < state["seconds"] < 600
    torch.save({**state, "seconds": 5000.0}, path)
    with pytest.raises(KeyboardInterrupt):
        train(bundle, OPTIONS, profile=interrupted)
    assert 5000 < torch.load(path)["seconds"] < 5600
    train(bundle, OPTIONS, profile=fixed_costs)
    assert 5000 < scorer_of(bundle).training.seconds < 5600


class Due(Checkpoint):
    """Is interrupted when it has saved in the middle of the regression."""

    due = True

    def save(self, **values: Any) -> None:
        super().save(**values)
        if "collected" in values:
            raise KeyboardInterrupt


def test_an_interrupted_regression_goes_on_and_learns_the_same(
    bundle: Path, trainer: Trainer
) -> None:
    with pytest.raises(KeyboardInterrupt):
        learn(Trainer(Bundle(bundle), OPTIONS, checkpoint=Due))
    resumed = Trainer(Bundle(bundle), OPTIONS)
    assert resumed.checkpoint.state["collected"]["first"] == 1
    learn(resumed)
    assert same_scorer(resumed, trainer) and resumed.history == trainer.history
    assert "collected" not in resumed.checkpoint.state


# How often to decide


def test_the_scorer_decides_as_often_as_asked_for(untrained: Path) -> None:
    options = TOOL_PARSER.parse_args(["out", "--decisions", "every"]).decisions
    trainer = Trainer(Bundle(untrained), dataclasses.replace(OPTIONS, decisions=options))
    assert trainer.scorer.decision_points == (1, 2, 3)
    assert TOOL_PARSER.parse_args(["out", "--decisions", "2"]).decisions == 2


OTHERS = {
    "seed": dataclasses.replace(OPTIONS, seed=1),
    "text": dataclasses.replace(OPTIONS, calibration=(Path(__file__),)),
    "length": with_plan(length=48),
    "decision points": with_plan(decision_points=1),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_training_does_not_go_on_from_an_interrupted_one(other: str, bundle: Path) -> None:
    Trainer(Bundle(bundle), OPTIONS).prepare_text()
    assert Trainer(Bundle(bundle), OPTIONS).checkpoint.state
    assert not Trainer(Bundle(bundle), OTHERS[other]).checkpoint.state


@pytest.mark.parametrize("content", [b"", b"damaged" * 100])
def test_a_damaged_checkpoint_is_ignored(bundle: Path, content: bytes) -> None:
    Trainer(Bundle(bundle), OPTIONS).prepare_text()
    (bundle.parent / ".out.training" / "state.pt").write_bytes(content)
    assert not Trainer(Bundle(bundle), OPTIONS).checkpoint.state


def test_another_seed_gives_another_scorer(untrained: Path, trainer: Trainer) -> None:
    other = learned(untrained, dataclasses.replace(OPTIONS, seed=1))
    assert not torch.equal(other.scorer.reduce.weight, trainer.scorer.reduce.weight)


# All or nothing


def test_a_bundle_is_trained_by_one_process_at_a_time(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(_: Trainer) -> None:
        with pytest.raises(BundleError, match="another process is training"):
            train(bundle, OPTIONS)
        with pytest.raises(BundleError, match="another process is training"):
            discard(bundle, TRAINING)
        raise KeyboardInterrupt

    monkeypatch.setattr("dash_onnx.exporters.train.train.learn", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        train(bundle, OPTIONS)
    assert os.listdir(bundle.parent) == ["out"]


def test_a_profile_that_ends_just_before_a_training_is_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dataclasses.replace(COSTS, machine="another machine")
    taken: list[str] = []

    def after_a_profile(folder: Path, name: str) -> AbstractContextManager[Path]:
        manifest = Bundle(folder).manifest
        replace_manifest(folder, dataclasses.replace(manifest, costs=found))
        return locked(folder, name)

    monkeypatch.setattr("dash_onnx.exporters.train.train.locked", after_a_profile)
    monkeypatch.setattr(
        "dash_onnx.exporters.train.train.learn",
        lambda trainer: taken.append(trainer.bundle.manifest.costs.machine),
    )
    monkeypatch.setattr(
        "dash_onnx.exporters.train.train.finish", lambda trainer, *_: trainer.bundle.manifest
    )
    assert train(bundle, OPTIONS).costs == found
    assert taken == ["another machine"]


def test_a_disk_without_room_for_the_result_is_told_before_the_training(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    full = shutil.disk_usage(bundle)._replace(free=1000)
    monkeypatch.setattr("dash_onnx.exporters.train.train.shutil.disk_usage", lambda _: full)
    monkeypatch.setattr("dash_onnx.exporters.train.train.Trainer", None)
    assert "GB of disk beside" in TOOL.refused(capsys, bundle)
    assert os.listdir(bundle.parent) == ["out"]


@pytest.mark.parametrize("at", ["learn", "finish"])
def test_a_bundle_that_an_export_replaces_meanwhile_stays_as_it_is(
    at: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(trainer: Trainer, *_: object) -> Manifest:
        manifest = trainer.bundle.manifest
        replace_manifest(bundle, dataclasses.replace(manifest, costs=COSTS))
        return manifest

    for phase in ("learn", "finish"):
        done = meanwhile if phase == at else lambda trainer, *_: trainer.bundle.manifest
        monkeypatch.setattr(f"dash_onnx.exporters.train.train.{phase}", done)
    with pytest.raises(BundleError, match="was replaced meanwhile: train it again"):
        train(bundle, OPTIONS)
    assert Bundle(bundle).manifest.costs == COSTS


def test_another_device_draws_other_numbers_and_does_not_go_on(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = trainer._fingerprint()
    assert here == trainer._fingerprint()
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    assert trainer._fingerprint() != here


def test_a_model_of_one_layer_is_exported_and_has_no_policy(
    tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = save_tiny(tmp_path / "model", num_hidden_layers=1), tmp_path / "out"
    built = build(str(source), out, ExportOptions(), check="none", training=TrainOptions())
    assert built.manifest.scorer is None
    assert "a model of one layer has nothing to decide" in caplog.text
    assert dash_onnx.load(out, policy="int4").generate("the keeper", max_new_tokens=4)
    assert "one layer has nothing to decide" in TOOL.refused(capsys, out)


def headless(bundle: Bundle, _: object) -> Costs:
    """Costs that no table can be made with."""
    return dataclasses.replace(fixed_costs(bundle), heads_ms={})


def test_a_training_that_fails_at_its_end_leaves_the_old_bundle(again: Path) -> None:
    before = files_of(again)
    with pytest.raises(KeyError):
        train(again, dataclasses.replace(OPTIONS, seed=1), profile=headless)
    assert files_of(again) == before
    assert dash_onnx.load(again).generate("the keeper", max_new_tokens=8, ignore_eos=True)


def test_training_again_on_text_of_ones_own_replaces_the_scorer(
    again: Path, night: Path, tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    record = {"prompt": "who counts the ships?", "response": "the keeper, in the night"}
    chats.write_text((json.dumps(record) + "\n") * 50)
    (again / REPORT_NAME).write_text("of the old policy")
    old = scorer_of(again)
    options = dataclasses.replace(OPTIONS, calibration=(night, chats))
    new = train(again, options, profile=fixed_costs).scorer
    assert new is not None and new.training.source == "night.txt, chats.jsonl"
    assert Bundle(again).manifest.calibration.source == "night.txt"
    assert new.margin == OTHER_TEXT  # INT4 was fitted to a part of this text
    assert new.file != old.file
    assert [path.name for path in again.glob("scorer-*")] == [new.file]
    files = {path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file()}
    assert files == {"dash.json", CARD_NAME, *Bundle(again).manifest.files}  # and no report is left
    chats.write_text((json.dumps(record) + "\n") * 150)
    options = dataclasses.replace(OPTIONS, calibration=(chats.rename(tmp_path / "other.jsonl"),))
    other = train(again, options, profile=fixed_costs).scorer
    assert other is not None and other.margin == 1.0  # the presets hold for text like this


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"\x00\xff\xfe" * 500, "not UTF-8 text"),
        ("a.txt", SENTENCE.encode(), "needs at least 2048"),
        ("a.jsonl", b'{"prompt": "who?", "response": "the keeper"}\n', "needs at least 2048"),
        ("a.jsonl", b'{"prompt": "who?"}\n', "a.jsonl:1 needs"),
        ("none.txt", None, "cannot read"),
    ],
)
def test_unusable_text_is_one_line_and_leaves_nothing(
    name: str, content: bytes | None, message: str, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    path, before = tmp_path / name, files_of(bundle)
    if content is not None:
        path.write_bytes(content)
    assert message in TOOL.refused(capsys, bundle, "--calibration", path)
    assert files_of(bundle) == before
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("NIGHT@0.5", "NIGHT"), "give every text a weight"),
        (("hub:nowhere",), "neither a folder nor the id of a dataset"),
        (("FOLDER",), "holds no text"),
    ],
)
def test_a_source_of_text_that_cannot_be_is_one_line_and_leaves_nothing(
    texts: tuple[str, ...], message: str, bundle: Path, night: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "none").mkdir()
    before, folder = files_of(bundle), str(tmp_path / "none")
    given = [text.replace("NIGHT", str(night)).replace("FOLDER", folder) for text in texts]
    assert message in TOOL.refused(capsys, bundle, "--calibration", *given)
    assert files_of(bundle) == before
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["out"]


# A scorer that cannot be used


def test_a_damaged_scorer_is_named_when_it_first_decides(again: Path) -> None:
    path = again / scorer_of(again).file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    model = dash_onnx.load(again)
    assert model.generate("the keeper", policy="full", max_new_tokens=2, ignore_eos=True)
    for use in (lambda: model.generate("the keeper", policy="dash"), model.preload):
        with pytest.raises(BundleError, match="SHA-256") as caught:
            use()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": []}, None),
        ({"actions": []}, None),
        ({"actions": ["full", "int8"]}, None),
        ({"presets": {}}, None),
        ({"file": "scorer-none.onnx"}, "scorer-none.onnx"),
        ({"file": "layers/03/skip.onnx"}, "train again"),
    ],
    ids=str,
)
def test_a_scorer_entry_that_cannot_be_run_is_one_line(
    again: Path, change: dict[str, Any], message: str | None
) -> None:
    data = json.loads((again / "dash.json").read_text())
    data["scorer"].update(change)
    (again / "dash.json").write_text(json.dumps(data))
    with pytest.raises(DashError, match=message) as caught:
        dash_onnx.load(again).generate("the keeper", max_new_tokens=2)
    assert "\n" not in str(caught.value)


# Bundles and machines of other kinds


@pytest.mark.parametrize(
    "layer_ms",
    [(1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 3.0, 4.0), (1.0, 3.0, 2.0, 0.5), (1.0, 3.0, 3.0, 3.0)],
)
def test_a_machine_on_which_cheaper_actions_save_no_time_gets_a_usable_policy(
    layer_ms: tuple[float, ...], bundle: Path
) -> None:
    row: Any = dict(zip(ACTIONS, layer_ms, strict=True))
    at_costs(bundle, dataclasses.replace(COSTS, layers_ms=(row,) * LAYERS))
    trainer = learned(bundle)
    scorer, rounding = exported_scorer(trainer)
    points, _ = tables(trainer, scorer, Bundle(bundle).manifest, rounding)
    assert points and all(math.isfinite(point.kl) for point in points)


def test_files_that_onnx_refuses_to_read_are_told_in_one_line(
    untrained: Path, tmp_path: Path
) -> None:
    linked = Path(shutil.copytree(untrained, tmp_path / "linked"))
    os.link(linked / "layers/00/int8.onnx.data", tmp_path / "second name")
    with pytest.raises(BundleError, match=r"cannot read .*hard link"):
        Trainer(Bundle(linked), OPTIONS)


def test_rows_of_the_table_lose_less_than_every_mixture_of_others() -> None:
    rows = [(0.5, 0.9, "int4"), (0.51, 0.89, "int8"), (0.6, 0.4, "int8"), (0.7, 0.4, "int4")]
    rows += [(0.8, 0.1, "int4"), (0.8, 0.09, "int8"), (0.9, 0.2, "int8"), (1.0, 0.01, "int8")]
    points = [BudgetPoint(budget, 0.1, head, kl, {}) for budget, kl, head in rows]  # type: ignore[arg-type]
    found = [(point.budget, point.kl, point.head) for point in efficient(points[::-1])]
    assert found == [rows[0], rows[2], rows[5], rows[7]]


def test_a_row_of_the_table_is_measured_with_its_fixed_layers(
    untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every layer takes its commonest action, the row loses what that path does."""
    trainer = learned(untrained)
    (scorer, rounding), manifest = exported_scorer(trainer), Bundle(untrained).manifest
    for point in tables(trainer, scorer, manifest, rounding)[0]:
        assert point.fixed[0] is not None  # the scorer sees nothing before it
        for action in {*point.fixed} - {None}:
            assert point.shares[action] >= 0.99 * point.fixed.count(action) / LAYERS  # type: ignore[index]
    monkeypatch.setattr("dash_onnx.exporters.train.tables.FIXED", 0.0)
    points, _ = tables(trainer, scorer, manifest, rounding)
    env, ids = trainer.env, trainer.held_out
    for point in points:
        path = [ACTIONS.index(action) for action in point.fixed if action is not None]
        final = env.run_path(ids, [max(index - 1, 0) for index in path])
        ((kl,),) = env.mean_kl(env.reference(ids), [final], [point.head])
        kl += rounding * (1 - path.count(0) / (LAYERS + 1))
        assert point.kl == pytest.approx(kl, abs=1e-5)
        assert point.shares == {a: path.count(i) / LAYERS for i, a in enumerate(ACTIONS)}


def test_training_in_half_precision_ends_with_a_finite_scorer(untrained: Path) -> None:
    for name, value in learned(untrained, with_plan(dtype="bfloat16")).scorer.state_dict().items():
        assert value.dtype == torch.float32, name
        assert torch.isfinite(value).all(), name


def test_the_compensation_is_trained(untrained: Path, trainer: Trainer) -> None:
    before = prepared(untrained).model.compensation()
    # The first layer is never skipped.
    assert not any(map(torch.equal, trainer.compensation[1:], before[1:]))


@pytest.mark.parametrize(
    "variants", [("full", "int4"), ("int4",), ("int8", "int4", "int2")], ids="+".join
)
def test_a_bundle_of_some_precisions_can_be_trained(
    variants: tuple[Any, ...], source: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = at_costs(export_tiny(source, calibration=(night,), variants=variants))
    facts = train(bundle, OPTIONS, profile=fixed_costs).scorer
    assert facts is not None
    assert facts.actions == (*variants, "skip")
    assert {point.head for point in facts.static} == {"full", "int8", "int4"} & {*variants}
    model = dash_onnx.load(bundle)
    ids = np.random.default_rng(3).integers(2, 384, 24)
    point = facts.points[0]
    for path in scored_paths(model, ids, point.multiplier, point.head):
        assert set(path) <= set(facts.actions) and path[0] != "skip"
    assert model.generate("the keeper", policy="dash", max_new_tokens=2, ignore_eos=True)


@pytest.mark.skipif(has_device("cuda"), reason="this machine can train it")
def test_a_bundle_for_a_device_that_is_not_there_is_refused(bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    target = dataclasses.replace(manifest.target, device="cuda")
    replace_manifest(bundle, dataclasses.replace(manifest, target=target))
    before = files_of(bundle)
    with pytest.raises(DeviceError, match="cuda") as caught:
        train(bundle, OPTIONS)
    assert "\n" not in str(caught.value)
    assert files_of(bundle) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
def test_a_gpu_that_torch_does_not_find_is_one_line(bundle: Path, capsys: Capture) -> None:
    before = files_of(bundle)
    error = TOOL.refused(capsys, bundle, "--train-device", "cuda")
    assert "PyTorch finds no GPU here; use --train-device cpu" in error
    assert files_of(bundle) == before


@pytest.mark.gpu
def test_a_gpu_trains_a_bundle_for_the_cpu(bundle: Path, tmp_path: Path) -> None:
    """As on the CPU in FP32: what is drawn differs, what is regressed hardly does."""
    shutil.copytree(bundle, tmp_path / "cpu")
    on_gpu = train(bundle, dataclasses.replace(OPTIONS, device="cuda"))
    on_cpu = train(tmp_path / "cpu", OPTIONS)
    assert on_gpu.scorer is not None and on_cpu.scorer is not None
    found, wanted = (facts.scorer.static[-1].kl for facts in (on_gpu, on_cpu))
    assert found == pytest.approx(wanted, rel=0.05)


# The command, which trains what ships


def test_the_command_trains_as_shipped_and_prints_the_table(
    source: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    """In a process of its own, with the costs of this machine and nothing changed."""
    level = ExportOptions().accuracy_level
    bundle = export_tiny(source, calibration=(night,), accuracy_level=level, max_length=64)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(bundle)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the model is too small for more
    )
    assert done.returncode == 0, done.stderr
    log = done.stderr.splitlines()
    assert log[0].startswith("dash-train: 10 phases, about ")
    phases = ("training text", "values", "static search", "scorer", "policy", "costs")
    for name in (*phases, "policy table", "static table", "table losses"):
        starts = log.index(next(x for x in log if x.startswith(f"dash-train: {name}: starts")))
        assert any(" in " in x and "expected" in x for x in log[starts:] if f" {name}: " in x), name
    costs, facts, plan = Bundle(bundle).manifest.costs, scorer_of(bundle), TrainingPlan()
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["budget", "KL", "head", *ACTIONS]
    for line, point in zip(lines[1:], facts.points, strict=False):
        budget = shown(point.budget, up=point is not facts.points[-1])
        assert line.split()[:3] == [budget, f"{point.kl:.4f}", point.head]
    assert "balanced" in done.stdout and "self-generated" in done.stdout
    assert facts.decision_points == (1,)
    assert facts.training.tokens == plan.sequences * 64  # the model's context
    assert costs.scorer_ms > 0 and costs.threads >= 1
    assert set(costs.heads_ms) == {"full", "int8", "int4"}
    assert all(set(row) == set(ACTIONS) for row in costs.layers_ms)
    assert all(0 < ms < 100 for row in costs.layers_ms for ms in row.values())
    assert dash_onnx.load(bundle).generate("the keeper", max_new_tokens=8, ignore_eos=True)


def test_a_scorer_is_read_back_from_its_graph(trained: Path, trainer: Trainer) -> None:
    found = Scorer(LAYERS, trainer.scorer.reduce.in_features, len(trainer.actions), (2, 3))
    load_scorer(found, trainer.actions, Bundle(trained))
    hidden = torch.randn(1, 5, found.reduce.in_features)
    for layers in trainer.env.segments:
        state = State(layers, hidden)
        torch.testing.assert_close(found.values(state), trainer.scorer.values(state))


@pytest.mark.parametrize(
    ("calibrated", "names", "margin"),
    [
        ("self-generated", [], OTHER_TEXT),
        ("self-generated", ["-"], 1.0),
        ("a.txt", ["b.txt"], 1.0),
        ("b.txt, a.txt@1f", ["a.txt"], OTHER_TEXT),
        ("a.txt", ["-"], OTHER_TEXT),  # which may be the same text
        ("-", ["a.txt"], OTHER_TEXT),
    ],
)
def test_limits_have_a_margin_where_int4_may_know_the_text(
    calibrated: str, names: list[str], margin: float
) -> None:
    assert _margin(names, [calibrated]) == margin
    assert _margin(names, ["self-generated", calibrated]) == margin


@pytest.mark.parametrize(
    ("changes", "margin", "fitted"),
    [
        ({}, 1.0, []),  # the same tokens are held out again
        ({}, OTHER_TEXT, ["a.txt"]),
        ({"tokens": 1}, 1.0, ["a.txt"]),
        ({"seed": 1}, 1.0, ["a.txt"]),
        ({"source": "b.txt"}, 1.0, ["a.txt"]),
    ],
)
def test_another_training_may_have_learned_from_the_held_out_text(
    changes: dict[str, Any], margin: float, fitted: list[str], trained: Path
) -> None:
    manifest, facts = Bundle(trained).manifest, scorer_of(trained)
    training = dataclasses.replace(facts.training, source="a.txt")
    earlier = dataclasses.replace(facts, training=training, margin=margin)
    bundle = Bundle(trained, dataclasses.replace(manifest, scorer=earlier))
    trainer: Any = SimpleNamespace(bundle=bundle, options=TrainOptions())
    found = _fitted(trainer, dataclasses.replace(training, **changes))
    assert found == [manifest.calibration.source, *fitted]


def test_a_training_from_a_bundle_takes_its_decision_points(trained: Path) -> None:
    facts = Bundle(trained).manifest.model
    with pytest.raises(PolicyError, match="leave one of the two out"):
        TrainOptions(start=trained, decisions=2).plan_for(facts)


def test_a_training_with_times_of_another_machine_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(*_: object) -> NoReturn:
        raise InterruptedError

    monkeypatch.setattr(train_module, "Trainer", stop)
    manifest = Bundle(bundle).manifest
    for machine in (machine_name(), "a phone"):
        costs = dataclasses.replace(manifest.costs, machine=machine)
        replace_manifest(bundle, dataclasses.replace(manifest, costs=costs))
        with pytest.raises(InterruptedError):
            train(bundle, OPTIONS, profile=fixed_costs)
    (told,) = caplog.messages
    assert "a phone: run dash-profile first" in told


def test_a_training_starts_from_another_bundle_and_takes_less(bundle: Path, trained: Path) -> None:
    plan = dataclasses.replace(PLAN, decision_points=1, improvement_steps=20)
    options = TrainOptions(start=trained, plan=plan)
    train(bundle, options, profile=fixed_costs)
    facts, before = scorer_of(bundle), scorer_of(trained)
    assert facts.decision_points == before.decision_points == (2, 3)
    assert len(facts.training.loss) == 2  # steps
    assert facts.file != before.file
    first = [point.kl for point in facts.points]
    assert first == sorted(first, reverse=True)


def test_the_mean_of_a_scorer_from_elsewhere_is_that_of_the_samples(
    untrained: Path, trained: Path
) -> None:
    trainer = prepared(untrained, dataclasses.replace(OPTIONS, start=trained))
    hidden, samples = collect(trainer, PLAN.regression_batches)
    centre(trainer.scorer, trainer.env.segments, [*hidden.values()], samples.mean(0))
    wanted = samples.mean(0).diff(dim=-1).clamp(min=1e-6)
    for layers, part in zip(trainer.env.segments[1:], hidden.values(), strict=True):
        told = trainer.scorer.log_increments(State(layers, part.float())).exp().mean(0)
        torch.testing.assert_close(told, wanted[layers], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("layers", "actions"), [(LAYERS + 1, ("int8", "int4", "skip")), (LAYERS, ("int8", "skip"))]
)
def test_a_scorer_for_other_decisions_is_no_start(
    layers: int, actions: tuple[Action, ...], trained: Path
) -> None:
    scorer = Scorer(layers, 64, len(actions), (2, 3))
    with pytest.raises(DashError, match="cannot start this one: it decides for 4 layers"):
        load_scorer(scorer, actions, Bundle(trained))


def test_what_cannot_start_a_training_is_one_line(
    bundle: Path, untrained: Path, trained: Path, capsys: Capture
) -> None:
    assert "has no policy to start from" in TOOL.refused(capsys, bundle, "--from", untrained)
    words = TOOL.refused(capsys, bundle, "--from", trained, "--decisions", "2")
    assert "leave --decisions out" in words


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert "no bundle" in TOOL.refused(capsys, tmp_path)
