"""Plans: the ways to run every token whose loss was measured, and which of them a preset takes.

A plan is one path for all tokens, whose layers run as one graph where they take the same action, or
the scorer's decisions for each token and layer. Which of the two is better depends on the model,
the machine and the budget: both were measured on the same held-out text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

from dash_onnx.core.actions import DECIDED, Action, ActionPath, path_letters
from dash_onnx.core.budget import (
    MIN_KL,
    OTHER_TEXT,
    PRESETS,
    cheapest_within,
    kl_at,
    multiplier_of,
)
from dash_onnx.core.facts import StaticPoint
from dash_onnx.core.manifest import Manifest

TIE = 0.03
"""Relative difference in time that paired runs do not resolve. Decisions per token have to be
faster by more, as they are the more complex plan; among paths that are as fast, the one that loses
least is taken."""


_MIN_SEQUENCES = 32  # of calibration text: of fewer, none is hidden from GPTQ
_ROUNDED = 1.005  # factor: budgets have four digits


@dataclass(frozen=True)
class Plan:
    """A way to run every token.

    Attributes:
        budget: profiled time of a token, the sum of its parts, as a fraction of the reference's.
        kl: mean KL(reference || plan) in nats on held-out tokens.
        head: precision of the LM head.
        time: time of the token as a whole, as a fraction like `budget`; plans are compared by it.
        path: action of each layer; None where the scorer decides.
    """

    budget: float
    kl: float
    head: Action
    time: float
    path: ActionPath | None = None

    @property
    def text(self) -> str:
        """The plan in the notation of `--policy static:`, or `decided per token`."""
        if self.path is None:
            return "decided per token"
        runs = [(action, len([*same])) for action, same in groupby(self.path)]
        return ",".join(f"{action}*{count}" if count > 1 else action for action, count in runs)


def margin_of(manifest: Manifest) -> float:
    """How much more other text may lose than the text that plans were measured on."""
    if manifest.scorer is not None:
        return manifest.scorer.margin
    calibration = manifest.calibration
    promised = calibration.source != "self-generated" and holds_out(calibration.sequences)
    return 1.0 if promised else OTHER_TEXT


def frontier(manifest: Manifest) -> tuple[Plan, ...]:
    """The plans that no other beats in both time and KL, by ascending time."""
    plans = [*_fixed(manifest)]
    if manifest.scorer is not None:
        plans += [decided(p.budget, manifest) for p in manifest.scorer.points]
    kept: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (_rank(plan), plan.kl)):
        if not kept or plan.kl < kept[-1].kl:
            kept.append(plan)
    return tuple(sorted(kept, key=lambda plan: plan.time))


def holds_out(sequences: int) -> bool:
    """Whether an export hides some of so many calibration sequences from GPTQ."""
    return sequences >= _MIN_SEQUENCES


def measured_on(manifest: Manifest) -> str:
    """The text that the KL of plans was measured on; a training always holds some out."""
    seen = manifest.scorer is None and not holds_out(manifest.calibration.sequences)
    return "calibration text" if seen else "held-out text"


def kl_reference(manifest: Manifest) -> str:
    """The reference of the plans' KL."""
    return "full precision" if manifest.scorer is None else manifest.variants[0]


def preset_plans(manifest: Manifest) -> dict[str, Plan]:
    """By preset, the fastest plan that keeps its promise; else the one that loses least.

    Empty where no plan was measured.
    """
    if not _fixed(manifest) and manifest.scorer is None:
        return {}
    return {name: _within(limit / margin_of(manifest), manifest) for name, limit in PRESETS.items()}


def candidates(manifest: Manifest) -> list[tuple[Plan, list[str]]]:
    """The frontier and the presets' plans, by ascending time, each with the presets that run it."""
    chosen = preset_plans(manifest)
    plans = {*frontier(manifest), *chosen.values()}
    return [
        (plan, [name for name, own in chosen.items() if own == plan])
        for plan in sorted(plans, key=lambda plan: (plan.time, plan.kl))
    ]


def _within(limit: float, manifest: Manifest) -> Plan:
    """The fastest plan that loses at most some nats; of paths as fast, the one that loses least."""
    decisions, path = alternatives(limit, manifest)
    if path is None or (decisions is not None and _rank(decisions) < path.time):
        return decisions or min(frontier(manifest), key=lambda plan: plan.kl)
    as_fast = [plan for plan in _fixed(manifest) if plan.time <= path.time * (1 + TIE)]
    return min(as_fast, key=lambda plan: (plan.kl, plan.time))


def alternatives(limit: float, manifest: Manifest) -> tuple[Plan | None, Plan | None]:
    """The fastest plan that is decided per token, and the fastest path for all tokens.

    Args:
        limit: the most that they may lose, in nats.

    Returns:
        None where there is none.
    """
    limit = max(limit, MIN_KL)
    scorer, found = manifest.scorer, None
    if scorer is not None:
        plan = decided(cheapest_within(limit, scorer.points), manifest)
        found = plan if plan.kl <= limit * _ROUNDED else None
    fixed = [plan for plan in _fixed(manifest) if plan.kl <= limit]
    return found, min(fixed, key=lambda plan: plan.time, default=None)


def plan_below(budget: float, manifest: Manifest) -> Plan | None:
    """The plan that loses least of those that take at most a fraction of the reference's time."""
    plans = [plan for plan in _fixed(manifest) if plan.budget <= budget + 1e-9]
    if manifest.scorer is not None and budget >= manifest.scorer.points[0].budget:
        plans.append(decided(min(budget, manifest.scorer.points[-1].budget), manifest))
    return min(plans, key=lambda plan: (plan.kl, _rank(plan)), default=None)


def least_budget(manifest: Manifest) -> float:
    """The lowest budget for which there is a plan."""
    points = [] if manifest.scorer is None else [manifest.scorer.points[0].budget]
    return min([*points, *(plan.budget for plan in _fixed(manifest))])


def decided(budget: float, manifest: Manifest) -> Plan:
    """The plan of the scorer's decisions at a budget within its table."""
    assert manifest.scorer is not None
    points = manifest.scorer.points
    _, head = multiplier_of(budget, points)
    return _timed(Plan(budget, kl_at(budget, points), head, budget), manifest)


def _fixed(manifest: Manifest) -> list[Plan]:
    points = manifest.static if manifest.scorer is None else manifest.scorer.static
    return [fixed_plan(point, manifest) for point in points]


def fixed_plan(point: StaticPoint, manifest: Manifest) -> Plan:
    """A static assignment as a plan."""
    return _timed(Plan(point.budget, point.kl, point.head, point.budget, point.path), manifest)


def _timed(plan: Plan, manifest: Manifest) -> Plan:
    return replace(plan, time=plan.budget * whole_ratio(plan, manifest))


def whole_key(plan: Plan, manifest: Manifest) -> str:
    """The name of a plan in `Costs.whole`."""
    if plan.path is None:
        return f"{DECIDED} {plan.head} {plan.budget:.2f}"  # which decides how actions mix
    (first, *_), kinds = plan.path, {*plan.path}
    usual = len(kinds) == 1 and plan.head == manifest.heads[first]
    return first if usual else f"{path_letters(plan.path)} {plan.head}"


def whole_ratio(plan: Plan, manifest: Manifest) -> float:
    """By what factor a plan's tokens take longer than their parts, relative to the reference's.

    For a plan that was not timed, it is the ratio of decisions that were, or the mean over its
    layers, weighted by their time.
    """
    costs = manifest.costs
    whole = costs.whole
    if not whole:
        return 1.0
    if (key := whole_key(plan, manifest)) in whole:
        return whole[key]
    if plan.path is None:
        return whole.get(DECIDED, 1.0)
    layers = [ms[action] for ms, action in zip(costs.layers_ms, plan.path, strict=True)]
    ratios = (whole.get(action, 1.0) for action in plan.path)
    return sum(ms * ratio for ms, ratio in zip(layers, ratios, strict=True)) / sum(layers)


def _rank(plan: Plan) -> float:
    """The time that a plan is compared by."""
    return plan.time if plan.path is not None else plan.time * (1 + TIE)
