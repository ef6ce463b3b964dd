"""Plans: which way of running every token a budget takes, and layers that run as one graph."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dash_onnx
from dash_onnx.core.actions import Action, each_alone, groups_of
from dash_onnx.core.budget import OTHER_TEXT, PRESETS, reference_ms
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.core.errors import DeviceError, PolicyError
from dash_onnx.core.facts import BudgetPoint, StaticPoint
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import Plan, frontier, margin_of, plan_below, preset_plans
from dash_onnx.core.policy import ScoredPolicy, StaticPolicy, make_policy
from dash_onnx.core.recost import with_costs
from dash_onnx.runtime import profile_whole, sessions
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.profile_whole import plan_times
from dash_onnx.runtime.results import Chunk
from dash_onnx.runtime.rows import Rows
from dash_onnx.runtime.sequence import SequenceState

LAYERS = 4
INT4: tuple[Action, ...] = ("int4",) * LAYERS
INT8: tuple[Action, ...] = ("int8",) * LAYERS
MIXED: tuple[Action, ...] = ("int8", "int4", "int4", "skip")
PROMPT = "the keeper counts the ships"


@pytest.fixture(scope="module")
def scored(scored_folder: Path) -> Manifest:
    return Bundle(scored_folder).manifest


def tables(manifest: Manifest, decided: dict[float, float], fixed: dict[float, float]) -> Manifest:
    """A manifest with KL by budget, of the scorer's decisions and of one path (INT4)."""
    assert manifest.scorer is not None
    share = manifest.scorer.points[0].shares
    points = tuple(
        BudgetPoint(budget, 1 / (1 + 100 * budget), "int8", kl, share)
        for budget, kl in sorted(decided.items())
    )
    static = tuple(StaticPoint(budget, "int4", kl, INT4) for budget, kl in sorted(fixed.items()))
    return replace(
        manifest, scorer=replace(manifest.scorer, points=points, static=static, margin=1.0)
    )


@pytest.mark.parametrize(
    ("fixed", "decides"),
    [(0.5, False), (0.51, False), (0.53, True), (0.7, True)],
)
def test_a_preset_takes_the_faster_way_and_of_equal_ones_the_simpler(
    scored: Manifest, fixed: float, decides: bool
) -> None:
    manifest = tables(scored, {0.2: 1.0, 0.5: 0.1, 0.9: 0.01}, {fixed: 0.09})
    plan = preset_plans(manifest)["balanced"]
    assert (plan.path is None) == decides
    assert plan.budget == pytest.approx(0.5 if decides else fixed, abs=1e-3)
    policy = make_policy("", manifest)
    assert isinstance(policy, ScoredPolicy if decides else StaticPolicy)


@pytest.mark.parametrize(
    ("whole", "decides"),
    [
        ({}, True),
        ({"int4": 0.97}, True),
        ({"int4": 0.9}, False),
        ({"int4": 0.9, "decided": 0.85}, True),
        ({"decided": 1.1}, False),
        ({"decided": 1.1, "decided int8 0.50": 1.0}, True),
        ({"decided": 1.1, "decided int8 0.40": 1.0}, False),
    ],
)
def test_presets_follow_the_time_of_whole_tokens(
    scored: Manifest, whole: dict[str, float], decides: bool
) -> None:
    manifest = tables(scored, {0.2: 1.0, 0.5: 0.1, 0.9: 0.01}, {0.54: 0.09})
    moved = replace(manifest, costs=replace(manifest.costs, whole=whole))
    plan = preset_plans(moved)["balanced"]
    assert (plan.path is None) == decides
    names = ["decided int8 0.50", "decided"] if decides else ["int4"]
    ratio = next((whole[name] for name in names if name in whole), 1.0)
    assert plan.time == pytest.approx(plan.budget * ratio)


def test_plans_are_timed_until_those_that_presets_run_have_been(
    scored: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LM head in INT8 is said to be the faster one, and is not."""
    seen: list[Plan] = []

    class Timed:
        def __init__(self, *_: object):
            pass

        def ratio(self, plan: Plan, multiplier: float | None) -> float:
            seen.append(plan)
            assert multiplier is None
            return 1.3 if plan.path == INT4 else 1.0

    monkeypatch.setattr(profile_whole, "_Timed", Timed)
    manifest = tables(scored, {0.2: 1.0, 0.7: 0.1, 0.9: 0.01}, {0.5: 0.09})
    assert manifest.scorer is not None
    points = (StaticPoint(0.45, "int8", 0.09, INT4), *manifest.scorer.static)
    manifest = replace(manifest, scorer=replace(manifest.scorer, static=points))
    bundle: Any = SimpleNamespace(manifest=manifest)
    assert plan_times(bundle, "cpu") == manifest.costs and not seen  # no whole tokens at all
    whole = {"full": 1.0, "int4": 1.0, "decided": 1.0}
    bundle.manifest = replace(manifest, costs=replace(manifest.costs, whole=whole))
    assert preset_plans(bundle.manifest)["balanced"].head == "int8"
    moved = replace(manifest, costs=plan_times(bundle, "cpu"))
    decided = {f"decided int8 {budget}": 1.0 for budget in ("0.50", "0.70", "0.84")}
    assert moved.costs.whole == {**whole, "4444 int8": 1.3, **decided}
    assert preset_plans(moved)["balanced"].head == "int4"
    assert len(seen) == 4
    assert Manifest.from_text(moved.to_text()) == moved


def test_presets_keep_their_promise_with_the_margin_or_lose_least(scored: Manifest) -> None:
    assert scored.scorer is not None
    for margin in (1.0, 1.5, 3.0):
        manifest = replace(scored, scorer=replace(scored.scorer, margin=margin))
        least = min(plan.kl for plan in frontier(manifest))
        for name, plan in preset_plans(manifest).items():
            promised = PRESETS[name] / margin_of(manifest)
            assert plan.kl <= max(promised * 1.01, least)


def test_no_preset_is_dominated_by_a_row_of_its_own_table(scored: Manifest) -> None:
    manifest = tables(scored, {0.2: 1.0, 0.5: 0.1, 0.9: 0.01}, {0.3: 0.3, 0.45: 0.12, 0.8: 0.015})
    for plan in preset_plans(manifest).values():
        for other in frontier(manifest):
            assert other.budget > plan.budget * 0.97 or other.kl >= plan.kl


def test_of_paths_as_fast_a_preset_takes_the_one_that_loses_least(scored: Manifest) -> None:
    fixed = {0.5: 0.2, 0.51: 0.05, 0.52: 0.06, 0.6: 0.01}
    plan = preset_plans(tables(scored, {0.2: 1.0, 0.8: 0.9, 0.9: 0.01}, fixed))["fast"]
    assert (plan.budget, plan.kl) == (0.51, 0.05)


def test_a_number_takes_what_loses_least_within_it(scored: Manifest) -> None:
    manifest = tables(scored, {0.3: 0.5, 0.9: 0.01}, {0.2: 0.6, 0.5: 0.02})
    for budget, path in ((0.25, INT4), (0.35, None), (0.6, INT4), (0.95, None)):
        plan = plan_below(budget, manifest)
        assert plan is not None and plan.path == path and plan.budget <= budget
    assert make_policy("", manifest, 0.6).uniform == INT4
    assert make_policy("dash", manifest, 0.6).uniform is None
    with pytest.raises(PolicyError, match=r"outside what this bundle can do: from 0\.2"):
        make_policy("", manifest, 0.1)


@pytest.mark.parametrize("budget", [0.35, 0.6, 0.95])
def test_a_number_is_the_same_budget_as_text(scored: Manifest, budget: float) -> None:
    """As the command line has it; the table of decisions ends at 0.9."""
    manifest = tables(scored, {0.3: 0.5, 0.9: 0.01}, {0.2: 0.6, 0.5: 0.02})
    ours, theirs = (make_policy("", manifest, given) for given in (budget, str(budget)))
    assert (ours.budget, ours.uniform, ours.head) == (theirs.budget, theirs.uniform, theirs.head)


def test_the_ends_that_a_message_tells_are_taken(scored: Manifest) -> None:
    manifest = tables(scored, {0.20034: 0.5, 0.69966: 0.01}, {0.10044: 0.6})
    for policy, budget in (("dash", 0.1), ("dash", 0.8), ("", 0.05), ("static", 0.05)):
        with pytest.raises(PolicyError) as refused:
            make_policy(policy, manifest, budget)
        ends = re.findall(r"\b0\.\d{3}\b", str(refused.value))
        assert len(ends) == (2 if policy == "dash" else 1)
        for end in ends:
            assert make_policy(policy, manifest, end)


def test_another_machine_changes_the_plan(scored: Manifest) -> None:
    """Where skipping saves nothing, decisions per token cost more than one path."""
    assert scored.scorer is not None
    manifest = tables(scored, {0.2: 1.0, 0.5: 0.1, 0.9: 0.01}, {0.55: 0.09})
    assert preset_plans(manifest)["balanced"].path is None
    costs = manifest.costs
    dear = tuple({**ms, "skip": ms["int8"]} for ms in costs.layers_ms)
    moved = with_costs(manifest, replace(costs, layers_ms=dear, scorer_ms=1.0))
    assert preset_plans(moved)["balanced"].path == INT4


def test_a_bundle_without_a_policy_has_plans(tiny_bundle: Path) -> None:
    manifest = Bundle(tiny_bundle).manifest
    assert manifest.scorer is None
    heads = manifest.exported_heads
    wanted = {
        (precision, head)
        for precision in manifest.variants
        for head in heads[heads.index(manifest.heads[precision]) :][:2]
    }
    found = {(point.path[0], point.head): point for point in manifest.static}
    assert set(found) == wanted and ("full", "int8") in found
    assert found["full", "int8"].kl > found["full", "full"].kl  # the head alone rounds
    measured = {a: found[a, manifest.heads[a]] for a in manifest.variants}
    assert measured["full"].kl < 1e-3 <= 10 * measured["int4"].kl
    assert measured["full"].budget == pytest.approx(1.0)
    model = dash_onnx.load(tiny_bundle)
    plan = preset_plans(manifest)["balanced"]
    assert plan.path is not None and model.policy().uniform == plan.path
    assert model.policy(budget="quality").kl == preset_plans(manifest)["quality"].kl


# Layers as one graph


@pytest.fixture(scope="module")
def model(scored_folder: Path) -> Iterator[Model]:
    with dash_onnx.load(scored_folder, memory="low") as model:
        yield model


@pytest.mark.parametrize("path", [INT4, INT8, MIXED, ("int4", "skip", "skip", "int4")])
def test_joined_layers_compute_what_they_compute_one_by_one(
    scored_folder: Path, path: tuple[Action, ...]
) -> None:
    found = []
    for groups in (groups_of(path), each_alone(LAYERS)):
        with dash_onnx.load(scored_folder, memory="low") as model:
            ids, decider = model.text.encode(PROMPT), FixedPath(path, "int8", groups)
            sequence = SequenceState(model._sessions, len(ids))
            rows = [sequence.prefill(ids, path, "int8", groups=groups).copy()]
            for token in (5, 9, 300, 7):  # the cache moves
                rows.append(sequence.forward(token, decider)[0].copy())
            assert sequence.kv.moves == 2
            found.append((np.stack(rows), model._sessions.loaded_bytes, len(decider.groups)))
    (one, some_bytes, graphs), (other, all_bytes, alone) = found
    np.testing.assert_array_equal(one, other)
    assert some_bytes == all_bytes
    assert graphs == len(groups_of(path)) < alone == LAYERS


def test_no_layer_is_loaded_twice_by_one_policy(scored_folder: Path) -> None:
    for policy in ("int4", "int8", "static:int8,int4*2,skip", "dash"):
        with dash_onnx.load(scored_folder, policy=policy) as model:
            expected = model.bytes_to_load()
            model.preload(model.policy())
            assert model.loaded_bytes == expected and model.bytes_to_load() == 0
            before = model.loaded_bytes
            model.generate(PROMPT, max_new_tokens=4)
            assert model.loaded_bytes == before


def test_layers_that_are_loaded_alone_stay_alone(scored_folder: Path) -> None:
    with dash_onnx.load(scored_folder, memory="low") as model:
        model.preload()
        before = model.loaded_bytes
        joined = model.generate(PROMPT, policy="int4", max_new_tokens=6, temperature=0)
        assert model.loaded_bytes == before
    with dash_onnx.load(scored_folder, memory="low") as model:
        other = model.generate(PROMPT, policy="int4", max_new_tokens=6, temperature=0)
    assert joined == other


def test_rows_of_a_batch_share_the_joined_graph(model: Model) -> None:
    prompts = [PROMPT, "a ship", "the light of the tower and"]
    alone = [
        model.generate(p, policy="int8", max_new_tokens=8, temperature=0, ignore_eos=True)
        for p in prompts
    ]
    options = dash_onnx.GenerationOptions(
        policy="int8", max_new_tokens=8, temperature=0.0, ignore_eos=True
    )
    assert [str(one) for one in model.batch(prompts, options=options)] == alone
    assert len(model._sessions._joined) == 1


@pytest.mark.parametrize("others", [["static:int8,int4*2,skip"], ["static:int8*3,int4", "dash"]])
def test_answers_of_plans_with_other_segments_load_nothing_while_they_run(
    scored_folder: Path, others: list[str]
) -> None:
    """Whoever sits between whom: what `bytes_to_load` said before is what they take."""
    policies = ["int4", *others, "int4", "int4", *others]
    with dash_onnx.load(scored_folder, memory="low") as model:
        for policy in dict.fromkeys(policies):
            needed = model.bytes_to_load(model.policy(policy))
            before = model.loaded_bytes
            model.preload(policy)
            assert model.loaded_bytes == before + needed
        scheduler, told = model.new_scheduler(len(policies)), [list[Chunk]() for _ in policies]
        for policy, pieces in zip(policies, told, strict=True):
            options = GenerationOptions(
                policy=policy, max_new_tokens=12, temperature=0.0, ignore_eos=True
            )
            scheduler.submit(model.request(PROMPT, lambda p, to=pieces: to.append(p), options))
        while scheduler.step():
            pass
        assert model.loaded_bytes == before + needed
        for policy, pieces in zip(policies, told, strict=True):
            alone = model.stream(
                PROMPT, policy=policy, max_new_tokens=12, temperature=0, ignore_eos=True
            )
            assert [(p.token, p.path) for p in pieces] == [(p.token, p.path) for p in alone]


def test_several_tokens_of_plans_with_other_segments_have_the_logits_of_each_alone(
    scored_folder: Path,
) -> None:
    paths, tokens = (INT4, MIXED, INT4, INT4), ([7, 8, 9], [5], [11, 12], [13, 14, 15])
    with dash_onnx.load(scored_folder, memory="low") as model:
        deciders = [FixedPath(path, "int8") for path in paths]
        rows = Rows.new(model._sessions, 4)
        assert rows.ragged
        for row, path in zip(rows.states, paths, strict=True):
            row.prefill(model.text.encode(PROMPT), path, "int8")
        before = model.loaded_bytes
        logits, taken = rows.forward([*range(4)], tokens, deciders)
        assert taken == [*paths] and model.loaded_bytes == before
        for ids, path, own in zip(tokens, paths, logits, strict=True):
            alone = model.new_sequence()
            alone.prefill(model.text.encode(PROMPT), path, "int8")
            wanted, _ = alone.forward(np.array(ids), FixedPath(path, "int8"), every=True)
            np.testing.assert_allclose(own, wanted, atol=2e-4)


@pytest.fixture(scope="module")
def changing(scored_folder: Path) -> Path:
    """`fast` runs INT4, `quality` is decided per token."""
    manifest = tables(Bundle(scored_folder).manifest, {0.2: 1.0, 0.5: 0.1, 0.9: 0.01}, {0.3: 0.2})
    folder = scored_folder.parent / "changing"
    shutil.copytree(scored_folder, folder)
    replace_manifest(folder, manifest)
    return folder


def test_the_plan_may_change_in_the_middle_of_an_answer(changing: Path) -> None:
    with dash_onnx.load(changing) as model:
        stream = model.stream(PROMPT, budget="fast", max_new_tokens=8, ignore_eos=True)
        paths = [next(stream).path for _ in range(3)]
        stream.set_budget("quality")
        later = [chunk.path for chunk in stream]
    assert paths[1:] == [INT4, INT4]
    assert len(later) == 5 and any(path != INT4 for path in later)


def test_a_plan_that_cannot_draft_is_refused_where_drafts_are_asked_for(changing: Path) -> None:
    with dash_onnx.load(changing) as model:
        stream = model.stream(
            PROMPT, budget="fast", speculate=True, max_new_tokens=8, ignore_eos=True
        )
        next(stream)
        with pytest.raises(PolicyError, match="one path for every token") as error:
            stream.set_budget("quality")
        assert "\n" not in str(error.value)
        assert [chunk.path for chunk in stream] == [INT4] * 7


def test_a_layer_is_in_memory_at_most_once_alone_and_once_joined(scored_folder: Path) -> None:
    with dash_onnx.load(scored_folder, memory="low") as model:
        model.preload()
        every = model.loaded_bytes
    policies = ("static:int8,int4*2,skip", "int4", "static:int8*3,int4", "int8", "dash", "int4")
    with dash_onnx.load(scored_folder, memory="low") as model:
        for policy in policies:
            held, more = model.loaded_bytes, model.bytes_to_load(model.policy(policy))
            model.preload(policy)
            assert model.loaded_bytes == held + more
        model.preload()
        assert every < model.loaded_bytes <= 2 * every


def test_a_plan_that_memory_has_no_room_for_is_refused_in_the_middle_of_an_answer(
    scored_folder: Path, changing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dash_onnx.load(scored_folder, policy="dash", memory="low") as model:
        model.preload(model.policy())
        stream = model.stream(PROMPT, budget="fast", max_new_tokens=8, ignore_eos=True)
        next(stream)
        before = model.loaded_bytes
        with monkeypatch.context() as full:
            full.setattr(sessions, "available_bytes", lambda: 0)
            stream.set_budget("quality")  # needs nothing else
        assert len([*stream]) == 7 and model.loaded_bytes == before
    with dash_onnx.load(changing, budget="fast", memory="low") as model:
        model.preload(model.policy())
        before = model.loaded_bytes
        stream = model.stream(PROMPT, max_new_tokens=8, ignore_eos=True)
        next(stream)
        monkeypatch.setattr(sessions, "available_bytes", lambda: 0)
        with pytest.raises(DeviceError, match=r"need 0\.0 GB, and 0\.0 GB of memory are free"):
            stream.set_budget("quality")
        assert [chunk.path for chunk in stream] == [INT4] * 7
        assert model.loaded_bytes == before


def test_the_controller_takes_no_action_that_was_not_counted(scored_folder: Path) -> None:
    """However much more the multiplier would allow, only what the table's rows take is loaded."""
    manifest = Bundle(scored_folder).manifest
    assert manifest.scorer is not None
    points = tuple(
        replace(point, multiplier=1e-6, shares={"int4": 0.7, "skip": 0.3})
        for point in manifest.scorer.points
    )
    folder = scored_folder.parent / "counted"
    shutil.copytree(scored_folder, folder, dirs_exist_ok=True)
    replace_manifest(folder, replace(manifest, scorer=replace(manifest.scorer, points=points)))
    with dash_onnx.load(folder, policy="dash", memory="low") as model:
        model.preload(model.policy())
        before = model.loaded_bytes
        chunks = [*model.stream(PROMPT, max_new_tokens=12, ignore_eos=True)]
        assert model.loaded_bytes == before
    assert {action for chunk in chunks for action in chunk.path} == {"int4"}


def test_one_graph_takes_less_time_in_the_costs(scored: Manifest) -> None:
    costs = replace(scored.costs, join_ms=0.02)
    alone = costs.token_ms(INT4, "int4", graphs=len(INT4))
    assert costs.token_ms(INT4, "int4") == pytest.approx(alone - 3 * 0.02)
    assert costs.token_ms(MIXED, "int4") == pytest.approx(
        costs.token_ms(MIXED, "int4", graphs=len(MIXED)) - 0.02
    )
    assert costs.token_ms(INT4, "int4", scored=True, graphs=len(INT4)) > alone
    cheaper = replace(scored, costs=costs)
    assert reference_ms(cheaper) < reference_ms(scored)


@pytest.mark.parametrize(("sequences", "margin"), [(31, OTHER_TEXT), (32, 1.0)])
def test_losses_on_text_that_gptq_has_seen_have_the_margin_of_other_text(
    sequences: int, margin: float, tiny_bundle: Path
) -> None:
    manifest = Bundle(tiny_bundle).manifest
    facts = replace(manifest.calibration, source="night.txt", sequences=sequences)
    assert margin_of(replace(manifest, calibration=facts)) == margin
