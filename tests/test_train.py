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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_tool import Capture, Tool
from conftest import save_tiny

import dash_onnx
from dash_onnx.cli.train import main
from dash_onnx.core.bundle import Bundle, file_facts
from dash_onnx.core.contract import REPORT_NAME, scorer_ports
from dash_onnx.core.errors import BundleError, DashError, SourceError
from dash_onnx.core.facts import Costs
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.train import describe, improve, learning, regress
from dash_onnx.exporters.train import text as training_text
from dash_onnx.exporters.train.effort import EFFORTS, Effort
from dash_onnx.exporters.train.environment import State
from dash_onnx.exporters.train.improve import chances
from dash_onnx.exporters.train.options import TrainOptions
from dash_onnx.exporters.train.scorer import BundleScorer, Scorer, greedy
from dash_onnx.exporters.train.train import train
from dash_onnx.runtime.deciders import ScoredDecider
from dash_onnx.runtime.engine import Model
from dash_onnx.runtime.ort import create_session

LAYERS = 4
STEPS = 3
LENGTH = 64
PROMPT = 16
ACTIONS = ("full", "int8", "int4", "skip")
COSTS = Costs(
    machine="a test",
    threads=1,
    embed_ms=0.1,
    scorer_ms=0.2,
    heads_ms={"full": 2.0, "int8": 1.0, "int4": 0.5},
    layers_ms=({"full": 4.0, "int8": 2.0, "int4": 1.0, "skip": 0.2},) * LAYERS,
)
SENTENCE = "the keeper of the lighthouse counts 42 ships that pass in the night\n"
TOOL = Tool("dash-train", main)

Scorers = list[BundleScorer]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[Scorers]:
    """A tiny training at fixed costs; yields the scorers that were exported."""
    exported: Scorers = []
    export_scorer = describe.export_scorer

    def noting(scorer: BundleScorer, *rest: Any) -> str:
        exported.append(scorer)
        return export_scorer(scorer, *rest)

    def costs_of(sessions: Any) -> Costs:
        variants = sessions.manifest.actions
        heads = {head: COSTS.heads_ms[head] for head in sessions.manifest.exported_heads}
        layers = tuple({a: ms[a] for a in variants} for ms in COSTS.layers_ms)
        return dataclasses.replace(COSTS, heads_ms=heads, layers_ms=layers)

    effort = Effort(sequences=8, held_out=4, batches=2, steps=STEPS, tried=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "quick", effort)
        patch.setattr(learning, "PROMPT_TOKENS", PROMPT)
        patch.setattr(
            learning, "decision_points_of", lambda *_: (2, 3)
        )  # segments of one and two layers
        patch.setattr(training_text, "LENGTH", LENGTH)
        patch.setattr(learning, "in_other_forms", lambda ids, *_: ids)  # a random model's are bytes
        patch.setattr(describe, "profile", costs_of)
        patch.setattr(learning, "_fast_dtype", lambda: torch.float32)
        patch.setattr(describe, "export_scorer", noting)
        yield exported


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "night.txt"
    path.write_text(SENTENCE * 80)
    return path


def at_fixed_costs(folder: Path) -> Path:
    manifest = Manifest.from_text((folder / "dash.json").read_text())
    costs = describe.profile(SimpleNamespace(manifest=manifest))  # type: ignore[arg-type]
    text = dataclasses.replace(manifest, costs=costs).to_text()
    (folder / "dash.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers do little enough that skipping them is worth the time."""
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny", initializer_range=0.05)


@pytest.fixture(scope="module")
def untrained(source: Path, text: Path, export_tiny: Callable[..., Path], quick: Scorers) -> Path:
    return at_fixed_costs(export_tiny(source, calibration=(text,)))


@pytest.fixture
def bundle(untrained: Path, tmp_path: Path) -> Path:
    """An untrained bundle to train, alone in its folder."""
    return Path(shutil.copytree(untrained, tmp_path / "alone" / "out"))


@pytest.fixture(scope="module")
def first(
    untrained: Path, quick: Scorers, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, BundleScorer]:
    """Trained with seed 0 without interruption, and its scorer."""
    folder = Path(shutil.copytree(untrained, tmp_path_factory.mktemp("trained") / "out"))
    train(folder, TrainOptions())
    return folder, quick[-1]


@pytest.fixture(scope="module")
def trained(first: tuple[Path, BundleScorer]) -> Path:
    """Read-only: copy it before changing a file."""
    return first[0]


@pytest.fixture(scope="module")
def model(trained: Path) -> Model:
    return dash_onnx.load(trained)


@pytest.fixture
def again(trained: Path, tmp_path: Path) -> Path:
    """A trained bundle to train again, or to damage."""
    return Path(shutil.copytree(trained, tmp_path / "alone" / "out"))


def files_of(folder: Path) -> dict[str, bytes]:
    """Of the folder around a bundle: whatever lies beside it, too."""
    paths = [path for path in folder.parent.rglob("*") if path.is_file()]
    return {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in paths}


def parameters(scorer: BundleScorer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in scorer.scorer.state_dict().items()}


# What is in the bundle afterwards


def test_the_bundle_gets_one_scorer_and_is_otherwise_as_it_was(
    untrained: Path, trained: Path
) -> None:
    before, after = files_of(untrained), files_of(trained)
    facts = Bundle(trained).manifest.scorer
    assert facts is not None
    content = after.pop(f"out/{facts.file}")
    assert facts.file == f"scorer-{hashlib.sha256(content).hexdigest()[:12]}.onnx"
    del before["out/dash.json"], after["out/dash.json"]
    assert after.keys() == before.keys()  # and no checkpoint is left
    changed = {name for name in after if after[name] != before[name]}
    assert changed and all("/skip.onnx" in name for name in changed)  # the compensation
    assert Bundle(trained).verified(facts.file).is_file()


def test_the_manifest_says_how_the_scorer_came_about(untrained: Path, trained: Path) -> None:
    before, manifest = Bundle(untrained).manifest, Bundle(trained).manifest
    facts = manifest.scorer
    assert facts is not None
    assert facts.actions == ACTIONS
    training = facts.training
    assert (training.effort, training.source, training.seed) == ("quick", "self-generated", 0)
    assert training.held_out_tokens == 3 * LENGTH  # a quarter of the 12 sequences
    assert training.tokens == 9 * LENGTH
    assert len(training.loss) == len(training.kl) == len(training.cost) == STEPS
    assert np.isfinite(training.loss).all()
    assert manifest.costs == COSTS
    assert (
        dataclasses.replace(manifest, scorer=None, files=before.files, costs=before.costs) == before
    )
    for name, facts in manifest.files.items():
        assert facts == file_facts(trained / name)


def test_the_table_ascends_and_its_presets_lie_within(trained: Path) -> None:
    facts = Bundle(trained).manifest.scorer
    assert facts is not None
    budgets = [point.budget for point in facts.points]
    multipliers = [point.multiplier for point in facts.points]
    assert len(budgets) > 3
    assert budgets == sorted(set(budgets))
    assert multipliers == sorted(set(multipliers), reverse=True)
    for point in facts.points:
        assert sum(point.shares.values()) == pytest.approx(1, abs=1e-3)
        assert point.shares["skip"] <= 0.75
        assert point.head in ("int8", "int4")
        mean = sum(COSTS.layers_ms[0][action] * share for action, share in point.shares.items())
        ms = LAYERS * mean + COSTS.heads_ms[point.head] + 0.3
        assert point.budget == pytest.approx(ms / 18.1, abs=1e-3)
    assert set(facts.presets) == {"quality", "balanced", "fast"}
    assert budgets[0] - 1e-4 <= facts.presets["fast"] <= facts.presets["balanced"]
    assert facts.presets["balanced"] <= facts.presets["quality"] <= budgets[-1] + 1e-4


def test_static_assignments_are_costed_and_a_mild_one_is_nearly_lossless(trained: Path) -> None:
    manifest = Bundle(trained).manifest
    assert manifest.scorer is not None
    points = manifest.scorer.static
    assert points and [p.budget for p in points] == sorted(p.budget for p in points)
    for point in points:
        ms = manifest.costs.token_ms(point.path, point.head)
        assert point.budget == pytest.approx(ms / 18.1, abs=1e-4)
        assert point.path[0] != "skip" and point.path[-1] != "skip"
    best = min(points, key=lambda point: point.kl)
    assert best.kl < max(point.kl for point in points) / 4


def test_the_kl_of_a_static_assignment_is_that_of_the_runtime(trained: Path, model: Model) -> None:
    """On the held-out text itself it would be equal; on other text it is of the same size."""
    assert model.manifest.scorer is not None
    ids = np.random.default_rng(0).integers(2, 384, 200)
    reference = torch.from_numpy(model.logits(ids, policy="full")).double().log_softmax(-1)
    found, wanted = [], []
    for point in [p for p in model.manifest.scorer.static if p.head == "int8"]:
        policy = "static:" + ",".join(point.path)
        ours = torch.from_numpy(model.logits(ids, policy=policy)).double().log_softmax(-1)
        found.append(float((reference.exp() * (reference - ours)).sum(-1)[32:].mean()))
        wanted.append(point.kl)
    assert len(found) > 3
    assert np.corrcoef(np.log(found), np.log(wanted))[0, 1] > 0.9


def test_the_scorer_graph_keeps_the_contract(trained: Path) -> None:
    manifest = Bundle(trained).manifest
    assert manifest.scorer is not None
    proto = onnx.load(trained / manifest.scorer.file)
    onnx.checker.check_model(proto)
    assert manifest.scorer.segments(LAYERS) == ((0, 2), (2, 3), (3, 4))
    ports = scorer_ports(manifest.dims, LAYERS, len(ACTIONS))
    for side, wanted in ((proto.graph.input, ports.inputs), (proto.graph.output, ports.outputs)):
        declared = [
            (
                value.name,
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                tuple(d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in side
        ]
        assert declared == [(p.name, p.dtype, p.shape) for p in wanted]


# What the runtime makes of it


def test_a_trained_bundle_generates_with_the_scorer_by_default(model: Model) -> None:
    assert model.policy().name == "dash"
    options = {"max_new_tokens": 12, "ignore_eos": True}
    text = model.generate("the keeper", **options)
    assert text
    assert model.generate("the keeper", policy="dash", **options) == text
    for budget in ("quality", "balanced", "fast"):
        assert model.generate("the keeper", policy="dash", budget=budget, **options)


def scored_paths(model: Model, ids: np.ndarray, multiplier: float) -> list[tuple[str, ...]]:
    sequence = model.new_sequence()
    sequence.prefill(ids[:4], ("full",) * LAYERS, "full")
    decider = ScoredDecider(sequence, "int8", multiplier)
    return [sequence.forward(int(token), decider)[1] for token in ids[4:]]


def multipliers_of(model: Model) -> list[float]:
    assert model.manifest.scorer is not None
    return [point.multiplier for point in model.manifest.scorer.points]


def inputs_along(
    model: Model, ids: np.ndarray, paths: list[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], list[np.ndarray]]]:
    """The input of each layer, `[D]`, when the tokens are decoded on given paths."""
    sequence = model.new_sequence()
    sequence.prefill(ids[:4], ("full",) * LAYERS, "full")
    for token, path in zip(ids[4:], paths, strict=True):
        sequence.advance(1)
        sequence.embed(int(token))
        inputs = []
        for layer, action in enumerate(path):
            inputs.append(sequence.hidden[layer % 2].array[0, 0].copy())
            sequence.run(layer, action)
        yield path, inputs


@pytest.mark.parametrize("extreme", [None, 1e-6, 1e3])
def test_the_runtime_decides_as_the_trained_scorer_and_as_its_graph(
    first: tuple[Path, BundleScorer], model: Model, extreme: float | None
) -> None:
    folder, scorer = first
    assert model.manifest.scorer is not None
    session = create_session(folder / model.manifest.scorer.file, "cpu")
    ids = np.random.default_rng(1).integers(2, 384, 40)
    costs = torch.tensor([[row[action] for action in ACTIONS] for row in COSTS.layers_ms])
    segments = model.manifest.scorer.segments(LAYERS)
    seen: set[tuple[str, ...]] = set()
    compared = 0
    for multiplier in [extreme] if extreme else multipliers_of(model):
        penalty = multiplier * costs
        penalty[0, -1] = 1e30
        paths = scored_paths(model, ids, multiplier)
        seen |= set(paths)
        for path, inputs in inputs_along(model, ids, paths):
            for start, stop in segments:
                hidden = torch.from_numpy(inputs[max(start - 1, 0)])
                feeds = {"hidden": hidden[None].numpy(), "penalty": penalty.numpy()}
                totals, decided = session.run(None, feeds)
                state = State(slice(start, stop), hidden[None, None])
                known = scorer.decide(state, penalty)[0, 0]
                for layer in range(start, stop):
                    row = totals[layer]
                    assert ACTIONS[decided[layer]] == ACTIONS[int(row.argmin())] == path[layer]
                    values = row - penalty[layer].numpy()
                    if layer:
                        assert abs(values[0]) <= 1e-6 * multiplier
                        assert (np.diff(values) >= -1e-5 * abs(row[:-1])).all()
                    ordered = np.sort(row)
                    if ordered[1] - ordered[0] < 1e-5 * ordered[1]:
                        continue  # a tie in other arithmetic
                    assert ACTIONS[int(known[layer - start])] == path[layer]
                    compared += 1
    assert compared > 100
    assert len(seen) > (1 if extreme else 5) or extreme


def test_decisions_differ_between_multipliers_and_between_tokens(model: Model) -> None:
    ids = np.random.default_rng(2).integers(2, 384, 64)
    low, high = min(multipliers_of(model)), max(multipliers_of(model))
    cheap, dear = scored_paths(model, ids, high), scored_paths(model, ids, low)
    cost = {
        multiplier: np.mean([COSTS.token_ms(path, "int8", scored=True) for path in paths])
        for multiplier, paths in (("high", cheap), ("low", dear))
    }
    assert cost["high"] < 0.7 * cost["low"]
    middle = sorted(multipliers_of(model))[len(multipliers_of(model)) // 2]
    assert any(len(set(scored_paths(model, ids, p))) > 1 for p in (low, middle, high))


# The first layer always runs


def test_the_runtime_never_skips_the_first_layer_at_any_price(model: Model) -> None:
    ids = np.random.default_rng(3).integers(2, 384, 24)
    for multiplier in (1e-9, 1.0, 1e6, 1e20):
        assert all(path[0] != "skip" for path in scored_paths(model, ids, multiplier))


@pytest.fixture
def indifferent() -> Scorer:
    """A scorer to which all actions cost nothing."""
    scorer = Scorer(LAYERS, 64, 3, (2, 3))
    with torch.no_grad():
        scorer.expand.zero_()
        scorer.bias.fill_(-100.0)
    return scorer


def allowed_costs() -> torch.Tensor:
    costs = torch.tensor([[2.0, 1.0, 0.2]] * LAYERS)
    costs[0, -1] = math.inf
    return costs


def test_training_never_skips_the_first_layer(indifferent: Scorer) -> None:
    state = State(slice(0, 2), torch.randn(64, 1024, 64))
    p = chances(indifferent, allowed_costs(), state, torch.zeros(64, 1), 0.7).detach()
    torch.testing.assert_close(p.sum(-1), torch.ones(64, 1024, 2))
    assert float(p[:, :, 0, 2].max()) < 1e-30
    taken = greedy(indifferent, allowed_costs(), torch.zeros(64, 1))(state)[..., 2].sum((0, 1))
    assert taken.tolist() == [0, 64 * 1024]  # all actions cost it nothing, so the cheapest


def test_training_draws_every_action_of_the_other_layers(indifferent: Scorer) -> None:
    with torch.no_grad():
        indifferent.bias.fill_(math.log(0.9))  # as dear as the time they save
    state = State(slice(2, 3), torch.randn(4, 1024, 64))
    p = chances(indifferent, allowed_costs(), state, torch.zeros(4, 1), 0.7)
    assert (p.detach().mean((0, 1, 2)) > 0.05).all()
    (p[..., 2].sum()).backward()
    assert indifferent.bias.grad is not None
    assert (indifferent.bias.grad[2] < 0).all()  # dearer steps make a skip rarer


def test_without_noise_training_decides_as_the_runtime_does(indifferent: Scorer) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        indifferent.expand.normal_(0, 0.3, generator=generator)
        indifferent.bias.fill_(-0.5)
    multipliers = torch.linspace(-2, 2, 8)[:, None]
    for layers in (slice(0, 2), slice(2, 3), slice(3, LAYERS)):
        state = State(layers, torch.randn(8, 64, 64, generator=generator))
        cold = chances(indifferent, allowed_costs(), state, multipliers, 1e-6)
        wanted = greedy(indifferent, allowed_costs(), multipliers)(state)
        assert torch.equal(cold.argmax(-1), wanted.argmax(-1))
        assert len(wanted.argmax(-1)[:, :, -1].unique()) > 1


def test_only_the_models_own_text_and_only_what_is_learned_from_it_gets_other_forms(
    untrained: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "in_other_forms", lambda ids, *_: -1 - ids)
    own = learning.Learning(Bundle(untrained), TrainOptions())
    own.texts()
    assert (own.ids < 0).all() and (own.held_out >= 0).all()
    given = learning.Learning(Bundle(untrained), TrainOptions(calibration=(text,)))
    given.texts()
    assert (given.ids >= 0).all()


def test_a_pass_tells_what_other_decisions_would_have_changed(
    untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KL of all tokens, later ones included, which see the K/V of the one that changes."""
    run = learning.Learning(Bundle(untrained), TrainOptions())
    run.texts()
    with torch.no_grad():
        run.scorer.bias.fill_(-2.0)
    random_direction, generator = improve.random_direction, torch.Generator().manual_seed(1)
    monkeypatch.setattr(
        improve, "random_direction", lambda env, final, _: random_direction(env, final, generator)
    )
    drawn: list[improve._Drawing] = []
    drawing = improve._Drawing

    def noting(*arguments: Any) -> improve._Drawing:
        drawn.append(drawing(*arguments))
        return drawn[-1]

    monkeypatch.setattr(improve, "_Drawing", noting)
    told = torch.zeros(())
    for _ in range(60):
        run.generator.manual_seed(3)  # the same decisions each time
        told = told + improve._pass(run, [], 0, 1.0)[0]["changes"] / 60
    weights = torch.cat([one.detach() for one in drawn[-1].weights], 2)  # [B, T, L, A]
    told = told.view(weights.shape[0], -1, *weights.shape[2:])
    assert len(weights.flatten(0, 2).argmax(-1).unique()) == len(run.actions)
    reference = run.reference(0)

    def kl(taken: torch.Tensor) -> torch.Tensor:
        rollout = run.env.run(run.batch(0), lambda state: taken[:, :, state.layers])
        return run.env.kl(reference, rollout.final)[:, PROMPT:].double().sum(-1)

    found, wanted = [], []
    with torch.no_grad():
        before = kl(weights)
        for place in range(40):
            token, layer = PROMPT + place % (weights.shape[1] - PROMPT), 1 + place % (LAYERS - 1)
            for action in range(len(run.actions)):
                other = weights.clone()
                other[:, token, layer] = torch.nn.functional.one_hot(
                    torch.tensor(action), len(run.actions)
                ).float()
                found.append(told[:, token - PROMPT, layer, action])
                wanted.append(kl(other) - before)
    ours, theirs = torch.cat(found).double(), torch.cat(wanted)
    kept = theirs == 0  # what was drawn anyway
    assert torch.allclose(ours[kept], torch.zeros(()).double())
    assert (theirs < 0).any() and (theirs > 0).any()
    assert float(torch.corrcoef(torch.stack([ours[~kept], theirs[~kept]]))[0, 1]) > 0.9
    slope = float((ours * theirs).sum() / theirs.square().sum())
    assert 0.8 < slope < 1.25


def test_values_are_learned_from_the_states_that_they_were_sampled_in(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each segment, the hidden states that its look saw, in the order of its samples."""
    loss, sampled = regress.regression_loss, regress.sampled_values
    seen: dict[int, dict[bytes, torch.Tensor]] = {}
    learned: set[int] = set()

    def watching(env: Any, ids: Any, generator: Any) -> Any:
        states, values, final = sampled(env, ids, generator)
        for state in states[1:]:
            pairs = zip(
                state.hidden.flatten(0, 1), values[:, :, state.layers].flatten(0, 1), strict=True
            )
            known = seen.setdefault(state.layers.start, {})
            known.update({hidden.numpy().tobytes(): value for hidden, value in pairs})
        return states, values, final

    def noting(scorer: Scorer, state: State, samples: torch.Tensor) -> Any:
        learned.update(range(state.layers.start, state.layers.stop))
        for hidden, value in zip(state.hidden, samples, strict=True):
            if state.layers.start:
                assert torch.equal(seen[state.layers.start][hidden.numpy().tobytes()], value)
        return loss(scorer, state, samples)

    monkeypatch.setattr(regress, "sampled_values", watching)
    monkeypatch.setattr(regress, "regression_loss", noting)
    trained_until_export(bundle, TrainOptions())
    assert learned == set(range(LAYERS))


# Seeds


def test_the_same_seed_gives_the_same_scorer_and_tables(bundle: Path, trained: Path) -> None:
    wanted = Bundle(trained).manifest.scorer
    torch.manual_seed(99)  # training must not depend on it
    found = train(bundle, TrainOptions()).scorer
    assert wanted is not None and found is not None
    assert (bundle / found.file).read_bytes() == (trained / wanted.file).read_bytes()
    seconds = wanted.training.seconds
    assert (
        dataclasses.replace(found, training=dataclasses.replace(found.training, seconds=seconds))
        == wanted
    )


def no_graph(scorer: BundleScorer, folder: Path, _: Any) -> str:
    """Instead of `export_scorer`, which takes most of the time of a tiny training."""
    content = b"".join(value.numpy().tobytes() for value in parameters(scorer).values())
    name = f"scorer-{hashlib.sha256(content).hexdigest()[:12]}.onnx"
    (folder / name).write_bytes(content)
    return name


class _StopError(Exception):
    pass


def trained_until_export(bundle: Path, options: TrainOptions) -> dict[str, torch.Tensor]:
    """What would have been exported; the training stays interrupted."""
    found: list[dict[str, torch.Tensor]] = []

    def stop(scorer: BundleScorer, *_: Any) -> str:
        found.append(parameters(scorer))
        raise _StopError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_StopError):
        patch.setattr(describe, "export_scorer", stop)
        train(bundle, options)
    return found[0]


def test_another_seed_gives_another_scorer(bundle: Path, first: tuple[Path, BundleScorer]) -> None:
    other = trained_until_export(bundle, TrainOptions(seed=1))
    assert not torch.equal(other["reduce.weight"], parameters(first[1])["reduce.weight"])


def test_training_leaves_the_random_state_alone(bundle: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trained_until_export(bundle, TrainOptions())
    assert torch.equal(torch.get_rng_state(), before)


# Interruptions


def interrupt_at(where: str, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the midst of a phase, or after so many steps."""

    def raising(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if where.startswith("step "):
        run_batch, limit = improve._pass, int(where.split()[1])
        patch.setattr(
            improve,
            "_pass",
            lambda run, compensation, number, heat: (raising if number == limit else run_batch)(
                run, compensation, number, heat
            ),
        )
    elif where == "values":
        patch.setattr(regress, "_fit", raising)
    else:
        patch.setattr(describe, "profile", raising)


@pytest.mark.parametrize(
    ("where", "every"),
    [("values", 20), ("step 0", 20), ("step 1", 20), ("step 1", 1), ("step 2", 2), ("tables", 20)],
)
def test_an_interrupted_training_goes_on_and_ends_as_an_uninterrupted_one(
    where: str,
    every: int,
    bundle: Path,
    first: tuple[Path, BundleScorer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(improve, "_SAVE_EVERY", every)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(describe, "export_scorer", lambda scorer, folder, dims: "dash.json")
        interrupt_at(where, patch)
        train(bundle, TrainOptions())
    monkeypatch.setattr(learning, "training_ids", None)  # the text is not written again
    found, wanted = trained_until_export(bundle, TrainOptions()), parameters(first[1])
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def test_a_resumed_training_completes_the_bundle_with_the_same_tables_and_history(
    bundle: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(improve, "_SAVE_EVERY", 1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at("step 2", patch)
        train(bundle, TrainOptions())
    monkeypatch.setattr(describe, "export_scorer", no_graph)
    found, wanted = train(bundle, TrainOptions()).scorer, Bundle(trained).manifest.scorer
    assert found is not None and wanted is not None
    assert found.training.loss == pytest.approx(wanted.training.loss, abs=1e-4)
    assert found.points == wanted.points
    assert found.static == wanted.static
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["out"]


def test_another_seed_does_not_go_on_from_an_interrupted_training(bundle: Path) -> None:
    trained_until_export(bundle, TrainOptions(seed=0))
    found = trained_until_export(bundle, TrainOptions(seed=1))
    shutil.rmtree(bundle.parent / ".out.training")
    for name, value in trained_until_export(bundle, TrainOptions(seed=1)).items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("content", [b"", b"damaged" * 100])
def test_a_damaged_checkpoint_is_ignored(
    bundle: Path, first: tuple[Path, BundleScorer], content: bytes
) -> None:
    trained_until_export(bundle, TrainOptions())
    state = bundle.parent / ".out.training" / "state.pt"
    assert state.is_file()
    state.write_bytes(content)
    found, wanted = trained_until_export(bundle, TrainOptions()), parameters(first[1])
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


# All or nothing


@pytest.mark.parametrize(
    ("module", "where"),
    [
        (learning, "training_ids"),
        (regress, "sampled_values"),
        (describe, "export_scorer"),
        (describe, "profile"),
        (describe, "file_facts"),
        (describe, "Model"),
    ],
)
def test_a_training_that_fails_leaves_the_old_bundle(
    module: ModuleType, where: str, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(again)

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(describe, "export_scorer", no_graph)
    monkeypatch.setattr(module, where, failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(again, TrainOptions(seed=1))
    shutil.rmtree(again.parent / ".out.training", ignore_errors=True)  # for the next call
    assert files_of(again) == before


def test_a_table_that_fails_leaves_the_old_bundle(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(again)
    options = {"max_new_tokens": 8, "ignore_eos": True}
    wanted = dash_onnx.load(again).generate("the keeper", **options)

    def failing(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(describe, "export_scorer", no_graph)
    monkeypatch.setattr(describe.table, "measure", failing)
    with pytest.raises(RuntimeError):
        train(again, TrainOptions(seed=1))
    assert dash_onnx.load(again).generate("the keeper", **options) == wanted
    assert (again / "dash.json").read_bytes() == before["out/dash.json"]
    shutil.rmtree(again.parent / ".out.training")
    assert files_of(again) == before


def test_training_again_replaces_the_scorer(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Bundle(again).manifest.scorer
    monkeypatch.setattr(describe, "export_scorer", no_graph)
    new = train(again, TrainOptions(seed=1)).scorer
    assert old is not None and new is not None
    assert old.file != new.file
    assert [path.name for path in again.glob("scorer-*")] == [new.file]
    assert set(Bundle(again).manifest.files) == {
        path.relative_to(again).as_posix()
        for path in again.rglob("*")
        if path.is_file() and path.name != "dash.json"
    }


# A scorer that cannot be used


def scorer_file(bundle: Path) -> Path:
    facts = Bundle(bundle).manifest.scorer
    assert facts is not None
    return bundle / facts.file


def refusal(action: Callable[[], object], *parts: str) -> None:
    with pytest.raises(BundleError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_a_missing_scorer_file_is_named_when_the_bundle_is_opened(again: Path) -> None:
    path = scorer_file(again)
    path.unlink()
    refusal(lambda: dash_onnx.load(again), str(path), "missing")


def test_a_truncated_scorer_file_is_named_when_the_bundle_is_opened(again: Path) -> None:
    path = scorer_file(again)
    path.write_bytes(path.read_bytes()[:-1])
    refusal(lambda: dash_onnx.load(again), str(path), "truncated or edited")


def test_a_damaged_scorer_file_is_named_when_it_first_decides(again: Path) -> None:
    path = scorer_file(again)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    model = dash_onnx.load(again)
    assert model.generate("the keeper", policy="full", max_new_tokens=2, ignore_eos=True)
    for use in (lambda: model.generate("the keeper", policy="dash"), model.preload):
        refusal(use, str(path), "SHA-256")


def test_a_scorer_that_is_another_graph_is_refused(again: Path) -> None:
    path = scorer_file(again)
    data = json.loads((again / "dash.json").read_text())
    data["scorer"]["file"] = "layers/03/skip.onnx"
    del data["files"][path.name]
    path.unlink()
    (again / "dash.json").write_text(json.dumps(data))
    model = dash_onnx.load(again)
    refusal(
        lambda: model.generate("the keeper", policy="dash"), "layers/03/skip.onnx", "train again"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"points": []},
        {"actions": []},
        {"actions": ["full", "int8"]},
        {"presets": {}},
        {"file": "scorer-none.onnx"},
    ],
    ids=str,
)
def test_a_scorer_entry_that_cannot_be_run_is_one_line(again: Path, change: dict[str, Any]) -> None:
    data = json.loads((again / "dash.json").read_text())
    data["scorer"].update(change)
    (again / "dash.json").write_text(json.dumps(data))
    with pytest.raises(DashError) as caught:
        dash_onnx.load(again).generate("the keeper", max_new_tokens=2)
    assert "\n" not in str(caught.value)


# The user's own text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"\x00\xff\xfe" * 500, "not UTF-8 text"),
        ("a.txt", SENTENCE.encode(), "needs at least 512"),
        ("a.jsonl", b'{"prompt": "who?", "response": "the keeper"}\n', "needs at least 512"),
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
    with pytest.raises(SourceError, match=message) as caught:
        train(bundle, TrainOptions(calibration=(path,)))
    assert "\n" not in str(caught.value)
    assert message in TOOL.refused(capsys, bundle, "--calibration", path)
    assert files_of(bundle) == before


def test_text_of_ones_own_is_named_and_changes_the_scorer(
    bundle: Path,
    text: Path,
    first: tuple[Path, BundleScorer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scorers: list[dict[str, torch.Tensor]] = []

    def noting(scorer: BundleScorer, folder: Path, dims: Any) -> str:
        scorers.append(parameters(scorer))
        return no_graph(scorer, folder, dims)

    monkeypatch.setattr(describe, "export_scorer", noting)
    chats = tmp_path / "chats.jsonl"
    record = {"prompt": "who counts the ships?", "response": "the keeper, in the night"}
    chats.write_text((json.dumps(record) + "\n") * 50)
    (bundle / REPORT_NAME).write_text("of the old policy")
    facts = train(bundle, TrainOptions(calibration=(text, chats))).scorer
    assert facts is not None
    assert facts.training.source == "night.txt, chats.jsonl"
    assert not (bundle / REPORT_NAME).exists()
    assert not torch.equal(scorers[0]["bias"], parameters(first[1])["bias"])


# Bundles of other kinds


@pytest.mark.parametrize(
    "layer_ms",
    [(1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 3.0, 4.0), (1.0, 3.0, 2.0, 0.5), (1.0, 3.0, 3.0, 3.0)],
)
def test_a_machine_on_which_cheaper_actions_save_no_time_gets_a_usable_policy(
    layer_ms: tuple[float, ...], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dict(zip(ACTIONS, layer_ms, strict=True))
    odd = dataclasses.replace(COSTS, layers_ms=(row,) * LAYERS)  # type: ignore[arg-type]
    text = dataclasses.replace(Bundle(bundle).manifest, costs=odd).to_text()
    (bundle / "dash.json").write_text(text)
    monkeypatch.setattr(describe, "profile", lambda _: odd)
    monkeypatch.setattr(describe, "export_scorer", no_graph)
    facts = train(bundle, TrainOptions()).scorer
    assert facts is not None
    assert all(math.isfinite(point.kl) for point in facts.points)
    assert dash_onnx.load(bundle).policy().name == "dash"


def test_training_in_half_precision_ends_with_a_finite_scorer(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "_fast_dtype", lambda: torch.bfloat16)
    for name, value in trained_until_export(bundle, TrainOptions()).items():
        assert value.dtype == torch.float32, name
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("variants", [("full", "int4"), ("int4",)], ids="+".join)
def test_a_bundle_of_some_precisions_can_be_trained(
    variants: tuple[Any, ...], source: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = at_fixed_costs(export_tiny(source, calibration=(text,), variants=variants))
    facts = train(bundle, TrainOptions()).scorer
    assert facts is not None
    assert facts.actions == (*variants, "skip")
    assert {point.head for point in facts.static} == set(variants)
    model = dash_onnx.load(bundle)
    ids = np.random.default_rng(3).integers(2, 384, 24)
    sequence = model.new_sequence()
    decider = ScoredDecider(sequence, facts.points[0].head, multipliers_of(model)[0])
    for token in ids:
        _, path = sequence.forward(int(token), decider)
        assert set(path) <= set(facts.actions) and path[0] != "skip"
    assert model.generate("the keeper", policy="dash", max_new_tokens=2, ignore_eos=True)


def test_a_bundle_for_cuda_is_trained_or_refused_in_one_line(
    source: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = export_tiny(source, calibration=(text,), variants=("int8", "int4"), device="cuda")
    at_fixed_costs(bundle)
    before = files_of(bundle)
    try:
        facts = train(bundle, TrainOptions()).scorer
    except DashError as error:
        assert "\n" not in str(error)
        assert files_of(bundle) == before
    else:
        assert facts is not None


# The command


def test_the_command_prints_the_table_and_nothing_on_stderr(bundle: Path) -> None:
    """In a process of its own, with the costs of this machine."""
    code = (
        "import sys\n"
        "from dash_onnx.exporters.train import effort, learning, text\n"
        f"text.LENGTH, learning.PROMPT_TOKENS = {LENGTH}, {PROMPT}\n"
        f"effort.EFFORTS['quick'] = effort.{EFFORTS['quick']}\n"
        "from dash_onnx.cli.train import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the model is too small for more
    )
    assert done.stderr == ""
    assert done.returncode == 0
    manifest = Bundle(bundle).manifest
    facts = manifest.scorer
    assert facts is not None
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["budget", "KL", "head", *ACTIONS]
    for line, point in zip(lines[1:], facts.points, strict=False):
        assert line.split()[:3] == [f"{point.budget:.3f}", f"{point.kl:.4f}", point.head]
    assert "balanced" in done.stdout and "self-generated" in done.stdout
    assert manifest.costs.scorer_ms > 0 and manifest.costs.threads >= 1
    assert set(manifest.costs.heads_ms) == {"full", "int8", "int4"}
    assert all(set(row) == set(ACTIONS) for row in manifest.costs.layers_ms)
    assert all(0 < ms < 100 for row in manifest.costs.layers_ms for ms in row.values())


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert "no bundle" in TOOL.refused(capsys, tmp_path)
