"""Budgets: from the share of the reference's time that a user allows to a multiplier of time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypeVar

from dash_onnx.core.actions import ACTIONS, Action, LayerGroup, groups_of
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.facts import BudgetPoint, ScorerFacts, StaticPoint
from dash_onnx.core.manifest import Manifest

Point = TypeVar("Point", BudgetPoint, StaticPoint)
Budget: TypeAlias = float | str
"""A fraction of the reference's time per token, or the name of a preset."""

PRESETS = {"quality": 0.02, "balanced": 0.1, "fast": 0.25}
"""Named budgets: the cheapest whose KL on human-written text is at most this many nats."""

OTHER_TEXT = 1.5
"""Ratio of the KL on human-written text to that on the model's own text: decision 0099."""

DEFAULT_PRESET = "balanced"

MIN_KL = 1e-4
"""In nats; what is less has no logarithm worth interpolating."""


def reference_ms(manifest: Manifest) -> float:
    """Profiled milliseconds of a token with every layer at the highest exported precision."""
    best = manifest.variants[0]
    return manifest.costs.token_ms((best,) * manifest.model.num_layers, manifest.heads[best])


def scorer_facts(manifest: Manifest) -> ScorerFacts:
    """The facts of the trained scorer.

    Raises:
        PolicyError: the bundle has none.
    """
    if manifest.scorer is None:
        raise PolicyError("this bundle has no policy yet: train one with dash-train")
    return manifest.scorer


def resolve(budget: Budget | None, manifest: Manifest) -> float:
    """A budget as a fraction.

    Args:
        budget: a number, a preset's name, or None for the default preset.
        manifest: manifest of a bundle; presets need a trained scorer.

    Raises:
        PolicyError: neither a fraction nor a preset, or outside what the bundle can do.
    """
    presets = manifest.scorer.presets if manifest.scorer else {}
    unknown = not isinstance(budget, str) or budget not in PRESETS
    measured = presets or (PRESETS if manifest.static and unknown else {})
    if budget is None or (isinstance(budget, str) and budget in presets):
        name = DEFAULT_PRESET if budget is None else budget
        return scorer_facts(manifest).presets[str(name)]
    try:
        value = float(budget)
    except (ValueError, TypeError, OverflowError):
        known = ", ".join(measured) or "none: no policy is trained yet"
        raise PolicyError(
            f"budget {budget!r} is neither a fraction, such as 0.8, nor a preset ({known})"
        ) from None
    if not math.isfinite(value) or not 0 < value <= 1:
        raise PolicyError(f"budget {value:g} is outside 0..1 (a fraction of the reference's time)")
    return value


def multiplier_of(budget: float, points: tuple[BudgetPoint, ...]) -> tuple[float, Action]:
    """Interpolates the policy table.

    Args:
        budget: a fraction.
        points: by ascending budget.

    Returns:
        Nats per `Costs.unit_ms`, and the precision of the LM head.

    Raises:
        PolicyError: the budget is outside the table.
    """
    low, high = points[0].budget, points[-1].budget
    if not low <= budget <= high:
        raise PolicyError(
            f"budget {budget:g} is outside what this bundle can do: {shown(low)} to "
            f"{shown(high, up=False)} of the time at the highest exported precision"
        )
    a, b = neighbours(budget, points)
    if a is b:
        return a.multiplier, a.head
    share = (budget - a.budget) / (b.budget - a.budget)
    if a.head != b.head:  # the two multipliers need not be in order; the controller does the rest
        nearer = a if share < 0.5 else b
        return nearer.multiplier, nearer.head
    multiplier = math.exp((1 - share) * math.log(a.multiplier) + share * math.log(b.multiplier))
    return multiplier, a.head


def shown(budget: float, *, up: bool = True) -> str:
    """A budget in three digits that, given as a budget, is enough for it; or that it is enough for.

    Args:
        budget: a fraction.
        up: whether to round it up.
    """
    thousandths = round(budget * 1e3, 6)
    return f"{(math.ceil if up else math.floor)(thousandths) / 1e3:.3f}"


def kl_at(budget: float, points: tuple[BudgetPoint, ...]) -> float:
    """KL in nats that the policy table gives for a budget, which may lie outside of it.

    Between two rows the log of the KL is linear in the budget; beyond the table it is that of the
    nearest row.
    """
    budget = min(max(budget, points[0].budget), points[-1].budget)
    a, b = neighbours(budget, points)
    if budget in (a.budget, b.budget):  # the KL of a row itself may be 0
        return a.kl if budget == a.budget else b.kl
    share = (budget - a.budget) / (b.budget - a.budget)
    return math.exp((1 - share) * _log_kl(a) + share * _log_kl(b))


def _log_kl(point: BudgetPoint) -> float:
    return math.log(max(point.kl, MIN_KL))


def used_actions(budget: float, points: tuple[BudgetPoint, ...]) -> tuple[Action, ...]:
    """Actions that the policy takes at a budget inside the table, highest precision first."""
    rows = neighbours(budget, points)
    return tuple(action for action in ACTIONS if any(row.shares.get(action, 0) > 0 for row in rows))


def fixed_at(budget: float, manifest: Manifest) -> tuple[Action | None, ...]:
    """By layer, the action that all tokens take at a budget inside the table; None: decided."""
    a, b = neighbours(budget, scorer_facts(manifest).points)
    same = (x if x == y else None for x, y in zip(a.fixed, b.fixed, strict=False))
    return tuple(same) or (None,) * manifest.model.num_layers


def decided_groups(
    fixed: tuple[Action | None, ...], decision_points: Sequence[int]
) -> tuple[LayerGroup, ...]:
    """The layers in runs fixed to the same action; one whose input the scorer reads is alone."""
    return groups_of(fixed, {point - 1 for point in decision_points})


def neighbours(budget: float, points: tuple[BudgetPoint, ...]) -> tuple[BudgetPoint, BudgetPoint]:
    """The rows of the table on both sides of a budget."""
    right = bisect_left([point.budget for point in points], budget)
    right = min(max(right, 1), len(points) - 1)
    return points[max(right - 1, 0)], points[right]


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both cost and KL, by ascending cost.

    Each path is listed once per LM head; the better head for a cost is what remains.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.budget, point.kl)):
        if not front or point.kl < front[-1].kl:
            front.append(point)
    return front


def presets(points: tuple[BudgetPoint, ...], margin: float) -> dict[str, float]:
    """Budgets of the presets: where `kl_at` times a margin is the KL that each of them promises."""
    return {name: cheapest_within(limit / margin, points) for name, limit in PRESETS.items()}


def cheapest_within(limit: float, points: tuple[BudgetPoint, ...]) -> float:
    """The least budget of the table at which `kl_at` is at most `limit` nats; else the largest."""
    below = [point for point in points if point.kl <= limit]
    if not below:
        return points[-1].budget
    best = min(below, key=lambda point: point.budget)
    index, budget = points.index(best), best.budget
    if index > 0 and points[index - 1].kl > limit:
        worse = points[index - 1]
        share = (math.log(limit) - _log_kl(best)) / (_log_kl(worse) - _log_kl(best))
        budget += share * (worse.budget - best.budget)
    return min(max(round(budget, 4), points[0].budget), points[-1].budget)
