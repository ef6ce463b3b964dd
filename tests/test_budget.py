"""Budgets: from a fraction of the reference's time to a multiplier, and how it is held."""

from __future__ import annotations

import math
import random
import runpy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
from conftest import VARIANTS, refusal_of
from hypothesis import given, settings
from hypothesis import strategies as st

import dash_onnx
from dash_onnx.core.actions import SKIP, Action, ActionPath
from dash_onnx.core.budget import (
    PRESETS,
    kl_at,
    multiplier_of,
    presets,
    reference_ms,
    resolve,
)
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.core.controller import Controller
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.facts import BudgetPoint, Costs, ScorerFacts, StaticPoint, Training
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import (
    Policy,
    RandomPolicy,
    ScoredPolicy,
    base_precision,
    make_policy,
)
from dash_onnx.core.recost import with_costs

# Baselines of the benchmark: `(manifest, order, budget)`.
skipping = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/policies.py"))["skipping"]

LAYERS = 12
LAYER_MS: dict[Action, float] = {"full": 4.0, "int8": 2.0, "int4": 1.0, "skip": 0.25}
ACTIONS: tuple[Action, ...] = ("int8", "int4", "skip")


def point(budget: float, multiplier: float, kl: float = 0.1, head: Action = "int8") -> BudgetPoint:
    shares: dict[Action, float] = {"full": 0.0, "int8": 0.6, "int4": 0.3, "skip": 0.1}
    return BudgetPoint(budget=budget, multiplier=multiplier, head=head, kl=kl, shares=shares)


def scorer_of(points: tuple[BudgetPoint, ...], static: tuple[StaticPoint, ...] = ()) -> ScorerFacts:
    training = Training("quick", "self-generated", 0, 0, 0, 0.0, (), (), ())
    named = {"quality": 0.5, "balanced": 0.35, "fast": 0.25}
    return ScorerFacts("scorer.onnx", ("full", *ACTIONS), (3, 6), points, named, static, training)


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path) -> Manifest:
    """Twelve layers with round costs and no scorer."""
    manifest = Bundle(tiny_bundle).manifest
    layers = [
        replace(manifest.layers[0], cosine=round(0.5 + 0.07 * (7 * i % LAYERS) / LAYERS, 4))
        for i in range(LAYERS)
    ]
    costs = Costs(
        machine="made up",
        threads=1,
        embed_ms=0.1,
        scorer_ms=0.5,
        heads_ms={"full": 3.0, "int8": 1.5, "int4": 1.0},
        layers_ms=tuple(
            {a: ms * (1 + i / 50) for a, ms in LAYER_MS.items()} for i in range(LAYERS)
        ),
    )
    model = replace(manifest.model, num_layers=LAYERS)
    return replace(manifest, model=model, layers=tuple(layers), costs=costs, scorer=None, static=())


@pytest.fixture(scope="module")
def scored(plain: Manifest) -> Manifest:
    points = (
        point(0.2, 0.5, kl=1.0, head="int4"),
        point(0.3, 0.1, kl=0.3, head="int4"),
        point(0.45, 0.02, kl=0.1),
        point(0.7, 0.004, kl=0.02),
    )
    static = (
        StaticPoint(0.3, "int4", 0.4, ("int4",) * LAYERS),
        StaticPoint(0.35, "int8", 0.5, ("int4", *("skip", "int8") * 5, "int8")),
        StaticPoint(0.6, "int8", 0.05, ("int8",) * LAYERS),
    )
    return replace(plain, scorer=scorer_of(points, static))


def scaled(manifest: Manifest, **factors: float) -> Costs:
    """Costs with layers of an action, or everything (`all`), changed by a factor."""
    costs, every = manifest.costs, factors.get("all", 1.0)
    return replace(
        costs,
        embed_ms=costs.embed_ms * every,
        scorer_ms=costs.scorer_ms * every,
        heads_ms={head: ms * every for head, ms in costs.heads_ms.items()},
        layers_ms=tuple(
            {action: ms * every * factors.get(action, 1.0) for action, ms in layer.items()}
            for layer in costs.layers_ms
        ),
    )


def test_a_machine_of_another_speed_leaves_budgets_as_they_are(scored: Manifest) -> None:
    moved = with_costs(scored, scaled(scored, all=3.0))
    assert scored.scorer is not None and moved.scorer is not None
    for before, after in zip(scored.scorer.points, moved.scorer.points, strict=True):
        assert after.budget == pytest.approx(before.budget, abs=1e-5)
        assert (after.multiplier, after.kl, after.head) == (
            before.multiplier,
            before.kl,
            before.head,
        )
    assert reference_ms(moved) == pytest.approx(3 * reference_ms(scored))


def test_a_machine_that_skips_for_less_meets_smaller_budgets(scored: Manifest) -> None:
    costs = scaled(scored, skip=0.1)
    moved = with_costs(scored, costs)
    assert scored.scorer is not None and moved.scorer is not None
    for before, after in zip(scored.scorer.points, moved.scorer.points, strict=True):
        assert 0.8 * before.budget < after.budget < before.budget
    for point in moved.scorer.static:
        wanted = costs.token_ms(point.path, point.head) / reference_ms(moved)
        assert point.budget == pytest.approx(wanted, abs=1e-5)
    assert moved.scorer.presets == presets(moved.scorer.points, moved.scorer.margin)


def test_rows_that_cost_more_and_lose_more_on_a_machine_go(scored: Manifest) -> None:
    """As where it multiplies few bits slowly."""
    costs = replace(scored.costs, heads_ms={**scored.costs.heads_ms, "int4": 50.0})
    moved = with_costs(scored, costs)
    assert moved.scorer is not None
    assert [row.kl for row in moved.scorer.points] == [0.1, 0.02]


def test_costs_without_a_policy_are_just_replaced(plain: Manifest) -> None:
    costs = scaled(plain, int8=2.0)
    assert with_costs(plain, costs) == replace(plain, costs=costs)


def one_line(call: Callable[[], object]) -> str:
    return refusal_of(PolicyError, call)


def mean_ms(manifest: Manifest, policy: Policy, tokens: int) -> float:
    paths = islice(policy.paths(), tokens)
    return sum(manifest.costs.token_ms(path, policy.head) for path in paths) / tokens


# What a budget means


def test_the_full_time_is_that_of_the_highest_precision_with_its_own_head(plain: Manifest) -> None:
    wanted = 0.1 + 3.0 + sum(4.0 * (1 + i / 50) for i in range(LAYERS))
    assert reference_ms(plain) == pytest.approx(wanted)
    assert reference_ms(replace(plain, variants=("int4",), heads={"int4": "int4"})) == (
        pytest.approx(0.1 + 1.0 + sum(1 + i / 50 for i in range(LAYERS)))
    )


@pytest.mark.parametrize(
    ("budget", "value"),
    [
        (0.3, 0.3),
        (1, 1.0),
        ("0.3", 0.3),
        (" 0.25 ", 0.25),
        ("3e-1", 0.3),
        ("fast", 0.25),
        ("quality", 0.5),
        (None, 0.35),
    ],
)
def test_a_budget_is_a_number_a_preset_or_the_balanced_one(
    scored: Manifest, budget: float | str | None, value: float
) -> None:
    assert resolve(budget, scored) == value


@pytest.mark.parametrize(
    "budget", [0, 0.0, -0.3, 1.0001, 30, math.nan, math.inf, "nan", "-inf", "1e999", "0", "-1"]
)
def test_a_number_outside_0_to_1_is_refused(scored: Manifest, budget: float | str) -> None:
    assert "outside 0..1" in one_line(lambda: resolve(budget, scored))


@pytest.mark.parametrize("budget", ["", " ", "cheap", "Fast", "30%", "0,3", "fast ", "0x1"])
def test_an_unknown_preset_is_refused_and_the_known_ones_are_told(
    scored: Manifest, budget: str
) -> None:
    message = one_line(lambda: resolve(budget, scored))
    assert repr(budget) in message
    assert all(name in message for name in PRESETS)


@pytest.mark.parametrize("budget", ["fast", "balanced", "cheap"])
def test_a_preset_without_a_scorer_is_refused(plain: Manifest, budget: str) -> None:
    message = one_line(lambda: resolve(budget, plain))
    assert budget in message and "no policy is trained yet" in message


def test_a_number_needs_no_scorer(plain: Manifest) -> None:
    assert resolve(0.4, plain) == 0.4


@pytest.mark.parametrize("policy", ["static", "random"])
def test_a_preset_of_a_bundle_with_plans_but_no_scorer_is_refused(
    tiny_bundle: Path, policy: str
) -> None:
    manifest = Bundle(tiny_bundle).manifest
    assert manifest.static
    message = one_line(lambda: make_policy(policy, manifest, "fast"))
    assert "no policy is trained yet" in message and "quality" not in message


def test_no_budget_without_a_scorer_is_refused_with_the_remedy(plain: Manifest) -> None:
    assert "dash-train" in one_line(lambda: resolve(None, plain))


# The table


@pytest.mark.parametrize("budget", [0.1999, 0.701, 0.01, 1.0])
def test_a_budget_outside_the_table_is_refused_and_its_ends_are_told(
    scored: Manifest, budget: float
) -> None:
    message = one_line(lambda: make_policy("dash", scored, budget))
    assert "0.200" in message and "0.700" in message


def test_the_rows_of_the_table_are_met_exactly_and_rows_between_are_interpolated(
    scored: Manifest,
) -> None:
    assert scored.scorer is not None
    points = scored.scorer.points
    for row in points:
        multiplier, head = multiplier_of(row.budget, points)
        assert multiplier == pytest.approx(row.multiplier)
        assert head == row.head
    multiplier, _ = multiplier_of(0.25, points)
    assert multiplier == pytest.approx(math.sqrt(0.5 * 0.1))  # halfway in the logarithm
    assert multiplier_of(0.31, points)[1] == "int4"
    assert multiplier_of(0.44, points)[1] == "int8"


@st.composite
def tables(draw: st.DrawFn) -> tuple[BudgetPoint, ...]:
    count = draw(st.integers(2, 14))
    steps = st.lists(st.integers(12, 9000), min_size=count, max_size=count)
    budgets, multipliers = draw(steps), draw(steps)
    losses = draw(st.lists(st.floats(0, 3), min_size=count, max_size=count))
    at, log_multiplier, rows = 0, 0.0, []
    for budget, multiplier, kl in zip(
        budgets, multipliers, sorted(losses, reverse=True), strict=True
    ):
        at += budget
        log_multiplier -= multiplier / 1000
        rows.append(point(round(at / 1e5, 5), math.exp(log_multiplier), round(kl, 6)))
    return tuple(rows)


@given(tables(), st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_a_smaller_budget_never_has_a_lower_multiplier(
    points: tuple[BudgetPoint, ...], shares: list[float]
) -> None:
    low, high = points[0].budget, points[-1].budget
    budgets = [min(low + share * (high - low), high) for share in sorted(shares)]
    multipliers = [multiplier_of(budget, points)[0] for budget in budgets]
    assert all(a >= b * (1 - 1e-9) for a, b in pairwise(multipliers))
    assert points[-1].multiplier * (1 - 1e-9) <= min(multipliers)
    assert max(multipliers) <= points[0].multiplier * (1 + 1e-9)


@pytest.mark.parametrize(
    ("low", "high"), [((0.30004, 0.15), (0.70006, 0.01)), ((0.3, 0.15), (0.7, 0.03))]
)
def test_a_preset_at_an_end_of_the_table_is_inside_it(
    low: tuple[float, float], high: tuple[float, float]
) -> None:
    """An end that is not a round number; no row as good as the preset `quality` asks for."""
    points = tuple(
        point(budget, multiplier, kl)
        for multiplier, (budget, kl) in zip(
            (0.1, 0.01, 0.001), (low, (0.5, 0.05), high), strict=True
        )
    )
    for budget in presets(points, 1.0).values():
        multiplier_of(budget, points)


def test_a_preset_between_two_rows_is_where_the_log_of_the_kl_says() -> None:
    points = (point(0.3, 0.1, 0.4), point(0.5, 0.01, 0.025), point(0.9, 0.001, 0.0))
    # 0.1 is half way from 0.4 to 0.025; from 0 to 0.025 the log begins at 1e-4.
    assert presets(points, 1.0)["balanced"] == pytest.approx(0.4)
    low, limit, high = map(math.log, (1e-4, PRESETS["quality"], 0.025))
    expected = 0.9 - (limit - low) / (high - low) * 0.4
    assert presets(points, 1.0)["quality"] == pytest.approx(expected, abs=1e-4)


def test_the_kl_of_a_budget_is_that_of_the_table_and_of_a_preset_what_it_promises() -> None:
    points = (point(0.3, 0.1, 0.4), point(0.5, 0.01, 0.025), point(0.9, 0.001, 0.0))
    assert [kl_at(row.budget, points) for row in points] == [row.kl for row in points]
    assert (kl_at(0.1, points), kl_at(1.0, points)) == (0.4, 0.0)
    assert kl_at(0.4, points) == pytest.approx(0.1)  # halfway in the logarithm
    for name, budget in presets(points, 1.0).items():
        assert kl_at(budget, points) == pytest.approx(PRESETS[name], rel=0.001)


def test_with_a_margin_a_preset_loses_less_than_it_promises() -> None:
    points = (point(0.3, 0.1, 0.4), point(0.5, 0.01, 0.025), point(0.9, 0.001, 0.0))
    plain, careful = presets(points, 1.0), presets(points, 1.25)
    for name, budget in careful.items():
        assert budget > plain[name]
        assert kl_at(budget, points) == pytest.approx(PRESETS[name] / 1.25, rel=0.001)


@given(tables())
def test_every_preset_lies_inside_the_table_and_a_better_one_costs_no_less(
    points: tuple[BudgetPoint, ...],
) -> None:
    named = presets(points, 1.0)
    assert set(named) == set(PRESETS)
    for budget in named.values():
        multiplier_of(budget, points)
    by_quality = [named[name] for name in sorted(PRESETS, key=lambda name: PRESETS[name])]
    assert by_quality == sorted(by_quality, reverse=True)


def test_a_table_of_one_row_is_usable_or_refused_in_one_line(scored: Manifest) -> None:
    points = (point(0.4, 0.1),)
    manifest = replace(scored, scorer=scorer_of(points))
    policy = make_policy("dash", manifest, 0.4)
    assert isinstance(policy, ScoredPolicy)
    assert policy.multiplier == pytest.approx(0.1)
    one_line(lambda: make_policy("dash", manifest, 0.41))


# The policies that take one


@pytest.mark.parametrize("policy", ["dash", "static", "random:1"])
def test_a_policy_knows_the_budget_that_it_was_given(scored: Manifest, policy: str) -> None:
    assert make_policy(policy, scored, 0.6).budget == 0.6
    assert make_policy("int4", scored).budget is None


def test_a_scorer_makes_dash_the_default(scored: Manifest, plain: Manifest) -> None:
    policy = make_policy("", scored)
    assert isinstance(policy, ScoredPolicy)
    assert (policy.name, policy.budget, policy.uniform) == ("dash", 0.35, None)
    assert make_policy("", plain).name == "full"
    assert make_policy("", scored, "fast").name == "dash:fast"
    assert make_policy("dash", scored, 0.5).name == "dash:0.5"


@pytest.mark.parametrize(("policy", "budget"), [("dash", None), ("dash", 0.4), ("", 0.4)])
def test_dash_without_a_scorer_is_refused_with_the_remedy(
    plain: Manifest, policy: str, budget: float | None
) -> None:
    assert "dash-train" in one_line(lambda: make_policy(policy, plain, budget))


@pytest.mark.parametrize("policy", ["full", "int8", "static:int4*12"])
def test_a_policy_that_takes_no_budget_says_which_ones_do(scored: Manifest, policy: str) -> None:
    message = one_line(lambda: make_policy(policy, scored, 0.4))
    assert policy in message
    assert all(name in message for name in ("dash", "static", "random"))
    given_object = make_policy(policy, scored)
    one_line(lambda: make_policy(given_object, scored, "fast"))


def test_a_policy_that_needs_a_budget_asks_for_it(scored: Manifest) -> None:
    assert "needs a budget" in one_line(lambda: make_policy("static", scored))


def test_static_is_the_best_assignment_within_the_budget(scored: Manifest) -> None:
    assert scored.scorer is not None
    cheap, _, dear = scored.scorer.static
    for budget, wanted in ((0.3, cheap), (0.4, cheap), (0.6, dear), (1.0, dear)):
        policy = make_policy("static", scored, budget)
        assert (policy.name, policy.uniform, policy.head) == ("static", wanted.path, wanted.head)
    assert "0.300" in one_line(lambda: make_policy("static", scored, 0.29))


def test_static_without_any_assignment_is_refused(scored: Manifest, plain: Manifest) -> None:
    assert scored.scorer is not None
    bare = replace(scored, scorer=replace(scored.scorer, static=()))
    one_line(lambda: make_policy("static", bare, 0.5))
    assert "dash-train" in one_line(lambda: make_policy("static", plain, 0.5))


def made(policy: str, manifest: Manifest, budget: float) -> Policy:
    found = make_policy(policy, manifest, budget) if policy == "random" else None
    return skipping(manifest, policy, budget) if found is None else found


@pytest.mark.parametrize("order", ["even", "cosine"])
@given(budget=st.floats(0.12, 1))
def test_a_skipping_path_meets_the_budget_with_as_few_skips_as_possible(
    plain: Manifest, order: str, budget: float
) -> None:
    policy = skipping(plain, order, budget)
    path = policy.uniform
    limit = budget * reference_ms(plain)
    assert plain.costs.token_ms(path, plain.heads[SKIP]) <= limit * (1 + 1e-6)
    base = base_precision(plain, budget)
    assert set(path) <= {base, SKIP}
    assert path[0] == path[-1] == base
    skipped = [layer for layer, action in enumerate(path) if action == SKIP]
    saved = [costs[base] - costs[SKIP] for costs in plain.costs.layers_ms]
    if skipped:
        cost = plain.costs.token_ms(path, plain.heads[SKIP])
        assert cost + len(skipped) * max(saved) - (len(skipped) - 1) * min(saved) > limit
    gaps = [b - a for a, b in pairwise(skipped)]
    if order == "even":
        assert not gaps or max(gaps) - min(gaps) <= 1
    else:
        kept = [plain.layers[i].cosine for i in range(1, LAYERS - 1) if i not in skipped]
        assert all(plain.layers[i].cosine >= max(kept, default=0) for i in skipped)
    assert (policy.name, policy.budget) == (order, budget)
    assert policy.cost_ms(path, plain.costs) <= limit * (1 + 1e-6)


@given(st.floats(0.01, 1))
def test_the_base_is_the_cheapest_precision_that_costs_at_least_the_budget(
    plain: Manifest, budget: float
) -> None:
    limit = budget * reference_ms(plain)
    cost = {p: plain.costs.token_ms((p,) * LAYERS, plain.heads[SKIP]) for p in VARIANTS}
    enough = [p for p in VARIANTS if cost[p] >= limit]
    assert base_precision(plain, budget) == (
        min(enough, key=cost.__getitem__) if enough else "full"
    )


@pytest.mark.parametrize("policy", ["even", "cosine", "random"])
def test_a_budget_below_every_skip_is_refused(plain: Manifest, policy: str) -> None:
    assert "0.05" in one_line(lambda: made(policy, plain, 0.05))


@pytest.mark.parametrize("budget", [0.15, 0.2, 0.26, 0.3, 0.45, 0.6, 0.9])
def test_random_paths_within_a_budget_cost_it_on_average(plain: Manifest, budget: float) -> None:
    policy = make_policy("random:3", plain, budget)
    assert isinstance(policy, RandomPolicy)
    paths = list(islice(policy.paths(), 600))
    base = base_precision(plain, budget)
    assert {action for path in paths for action in path} <= {base, SKIP}
    assert all(path[0] == path[-1] == base for path in paths)
    assert mean_ms(plain, policy, 600) / reference_ms(plain) == pytest.approx(budget, rel=0.03)
    assert list(islice(policy.paths(), 600)) == paths


def test_random_without_a_budget_draws_from_every_action(plain: Manifest) -> None:
    policy = make_policy("random", plain)
    assert isinstance(policy, RandomPolicy)
    paths = islice(policy.paths(), 50)
    assert {action for path in paths for action in path} == {*VARIANTS, SKIP}


@pytest.mark.parametrize("policy", ["random", "even", "cosine"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("budget", [0.1, 1.0])
def test_a_model_without_inner_layers_is_run_or_refused_in_one_line(
    plain: Manifest, policy: str, layers: int, budget: float
) -> None:
    small = replace(
        plain,
        model=replace(plain.model, num_layers=layers),
        layers=plain.layers[:layers],
        costs=replace(plain.costs, layers_ms=plain.costs.layers_ms[:layers]),
    )
    try:
        found = made(policy, small, budget)
    except PolicyError as error:
        assert "\n" not in str(error)
    else:
        assert SKIP not in next(found.paths())


@pytest.mark.parametrize("policy", ["random", "even", "cosine"])
def test_skips_that_save_nothing_are_no_crash(plain: Manifest, policy: str) -> None:
    rows = tuple({**row, SKIP: row["int4"]} for row in plain.costs.layers_ms)
    manifest = replace(plain, costs=replace(plain.costs, layers_ms=rows))
    try:
        made(policy, manifest, 0.1)
    except PolicyError as error:
        assert "\n" not in str(error)


# The controller


def decided(
    manifest: Manifest, rng: random.Random, multiplier: float, scale: float = 1.0
) -> ActionPath:
    """A simulated scorer: the values of a token differ, as those of a real one do."""
    token = rng.lognormvariate(0, 0.7)
    path: list[Action] = []
    for layer in range(LAYERS):
        step = token * rng.lognormvariate(-4.5, 0.8) * scale
        values = {"int8": 0.0, "int4": step, "skip": 6 * step}
        if not layer:
            del values["skip"]
        row = manifest.costs.layers_ms[layer]
        path.append(min(values, key=lambda a: values[a] + multiplier * row[a]))
    return tuple(path)


@pytest.fixture(scope="module")
def simulated(plain: Manifest) -> Manifest:
    """The policy table of the simulated scorer."""
    rows = []
    full = reference_ms(plain)
    for multiplier in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1):
        rng = random.Random(1)
        paths = [decided(plain, rng, multiplier) for _ in range(300)]
        mean = sum(plain.costs.token_ms(path, "int8", scored=True) for path in paths) / 300
        rows.append(point(mean / full, multiplier))
    return replace(plain, scorer=scorer_of(tuple(sorted(rows, key=lambda row: row.budget))))


def budgets_inside(manifest: Manifest) -> Iterator[float]:
    assert manifest.scorer is not None
    low, high = manifest.scorer.points[0].budget, manifest.scorer.points[-1].budget
    for share in (0.15, 0.4, 0.7, 0.9):
        yield low + share * (high - low)


def steered(manifest: Manifest, budget: float, seed: int, scale: float, tokens: int) -> float:
    """Mean cost, as a fraction of the reference's time, of a generation under the controller."""
    policy = ScoredPolicy(manifest, budget)
    controller = policy.controller()
    rng = random.Random(seed)
    spent = 0.0
    for _ in range(tokens):
        path = decided(manifest, rng, controller.multiplier, scale)
        controller.spent(path)
        spent += manifest.costs.token_ms(path, policy.head, scored=True)
    return spent / tokens / reference_ms(manifest)


@pytest.mark.parametrize("scale", [1.0, 3.0, 1 / 3], ids=["as measured", "harder", "easier"])
def test_the_controller_brings_the_mean_cost_to_the_budget(
    simulated: Manifest, scale: float
) -> None:
    for seed, budget in enumerate(budgets_inside(simulated)):
        assert steered(simulated, budget, seed, scale, 400) == pytest.approx(budget, rel=0.05)


@pytest.mark.parametrize("scale", [3.0, 1 / 3], ids=["harder", "easier"])
def test_what_the_first_tokens_overspent_or_saved_is_made_up_for(
    simulated: Manifest, scale: float
) -> None:
    budget = list(budgets_inside(simulated))[1]
    found = [steered(simulated, budget, seed, scale, 400) for seed in range(16)]
    assert sum(found) / len(found) == pytest.approx(budget, rel=0.003)


def test_a_budget_that_no_multiplier_reaches_is_not_made_up_for_later(simulated: Manifest) -> None:
    assert simulated.scorer is not None
    points = simulated.scorer.points
    controller = Controller(simulated, 0.3, points[3].multiplier, "int8", LAYERS)
    highest = 0.0
    for _ in range(1000):  # far too dear, whatever the multiplier
        controller.spent(("full",) * LAYERS)
        highest = max(highest, controller.multiplier)
    for _ in range(100):  # then far too cheap
        controller.spent(("int4", *("skip",) * (LAYERS - 1)))
    assert controller.multiplier < highest / 2


def test_without_the_controller_harder_text_would_miss_the_budget(simulated: Manifest) -> None:
    budget = list(budgets_inside(simulated))[1]
    multiplier = ScoredPolicy(simulated, budget).multiplier
    rng = random.Random(0)
    paths = [decided(simulated, rng, multiplier, 3.0) for _ in range(400)]
    costs = [simulated.costs.token_ms(path, "int8", scored=True) for path in paths]
    assert sum(costs) / 400 / reference_ms(simulated) > 1.05 * budget


def test_the_controller_starts_at_the_multiplier_of_the_table(simulated: Manifest) -> None:
    budget = next(budgets_inside(simulated))
    policy = ScoredPolicy(simulated, budget)
    assert policy.controller().multiplier == policy.multiplier
    controller = policy.controller()
    controller.spent(("int8",) * LAYERS)
    assert controller.multiplier > policy.multiplier  # too dear: time gets more precious
    assert policy.controller().multiplier == policy.multiplier  # each generation has its own


def test_the_multiplier_moves_further_where_the_cost_hardly_answers(plain: Manifest) -> None:
    multipliers = []
    for dearer in (0.6, 0.306):
        points = (point(0.3, 0.1), point(dearer, 0.02))
        manifest = replace(plain, scorer=scorer_of(points))
        controller = Controller(manifest, 0.303, 0.06, "int8", LAYERS)
        for _ in range(3):
            controller.spent(("int8",) * LAYERS)
        multipliers.append(controller.multiplier)
    steep, flat = multipliers
    assert 0.06 < 1.2 * steep < flat


@settings(max_examples=25)
@given(st.sampled_from(["full", "skip"]), st.integers(50, 2000))
def test_the_multiplier_stays_bounded_whatever_happens(
    simulated: Manifest, action: Action, tokens: int
) -> None:
    assert simulated.scorer is not None
    points = simulated.scorer.points
    controller = Controller(simulated, 0.3, points[3].multiplier, "int8", LAYERS)
    for _ in range(tokens):
        controller.spent((action,) * LAYERS)
    low, high = points[-1].multiplier, points[0].multiplier
    assert low / 20 < controller.multiplier < high * 20


# The loaded model


def test_the_budget_of_a_model_is_refused_when_it_is_loaded(tiny_bundle: Path) -> None:
    one_line(lambda: dash_onnx.load(tiny_bundle, policy="random", budget="fast"))
    one_line(lambda: dash_onnx.load(tiny_bundle, policy="random", budget=1e-6))
    one_line(lambda: dash_onnx.load(tiny_bundle, policy="full", budget=0.5))
    told = one_line(lambda: dash_onnx.load(tiny_bundle, budget=1e-6))
    assert "outside what this bundle can do" in told


@pytest.fixture(scope="module")
def priced(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with costs as those of a real model."""
    folder = tmp_path_factory.mktemp("priced") / "out"
    shutil.copytree(tiny_bundle, folder)
    manifest = Bundle(folder).manifest
    rows = (LAYER_MS,) * manifest.model.num_layers
    costs = replace(manifest.costs, embed_ms=0.1, layers_ms=rows)
    costs = replace(costs, heads_ms={"full": 3.0, "int8": 1.5, "int4": 1.0})
    replace_manifest(folder, replace(manifest, costs=costs))
    return folder


def test_a_model_keeps_the_policy_and_budget_it_was_loaded_with(priced: Path) -> None:
    model = dash_onnx.load(priced, policy="random:1", budget=0.75)
    assert (model.policy().name, model.policy().budget) == ("random:1", 0.75)
    wanted = [*islice(model.policy().paths(), 3)]
    assert {action for path in wanted for action in path} == {"full", "skip"}
    assert model.policy("int8").name == "int8"
    steps = list(model.generate_step([5, 6, 7], max_new_tokens=4, ignore_eos=True))
    assert [step.path for step in steps][1:] == wanted
    options = {"policy": "random", "budget": 0.4, "max_new_tokens": 4, "ignore_eos": True}
    steps = list(model.generate_step([5, 6, 7], **options))
    assert {action for step in steps[1:] for action in step.path} == {"int8", "skip"}


def test_another_budget_for_one_generation_keeps_the_policy(priced: Path) -> None:
    model = dash_onnx.load(priced, policy="random:1", budget=0.6)
    assert model.policy(budget=0.4).name == "random:1"
