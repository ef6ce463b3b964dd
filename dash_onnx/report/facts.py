"""What the manifest alone tells: the speed/quality curve."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from dash_onnx.core.actions import PRECISIONS, Action, Path
from dash_onnx.core.budget import scorer_facts
from dash_onnx.core.facts import BudgetPoint, StaticPoint
from dash_onnx.core.manifest import Manifest
from dash_onnx.report.tokens import path_letters


@dataclass(frozen=True)
class CurvePoint:
    """One policy on the speed/quality plane.

    Attributes:
        cost: mean cost of a token as a fraction of the full time.
        kl: mean KL(reference || policy) in nats on held-out tokens.
        head: precision of the LM head.
        shares: of each action among the decisions.
        path: one character per layer where every token takes the same path, else empty.
    """

    cost: float
    kl: float
    head: Action
    shares: dict[Action, float]
    path: str


@dataclass(frozen=True)
class Preset:
    """A named budget, with the KL that the policy table gives for it."""

    name: str
    cost: float
    kl: float


@dataclass(frozen=True)
class Curve:
    """What `dash`, static and uniform policies reach.

    Attributes:
        dash: the policy table, by ascending cost.
        static: the Pareto front of the static assignments, by ascending cost.
        uniform: every layer at one precision, by the precision's name.
        presets: by ascending cost.
    """

    dash: tuple[CurvePoint, ...]
    static: tuple[CurvePoint, ...]
    uniform: dict[Action, CurvePoint]
    presets: tuple[Preset, ...]


def curve(manifest: Manifest) -> Curve:
    """Reads the curve.

    Raises:
        PolicyError: the bundle has no scorer.
    """
    facts = scorer_facts(manifest)
    presets = [
        Preset(name, budget, interpolated_kl(facts.points, budget))
        for name, budget in facts.presets.items()
    ]
    return Curve(
        dash=tuple(CurvePoint(p.budget, p.kl, p.head, p.shares, "") for p in facts.points),
        static=tuple(_of_static(point, manifest) for point in pareto(facts.static)),
        uniform=_uniform(facts.static, manifest),
        presets=tuple(sorted(presets, key=lambda preset: preset.cost)),
    )


def interpolated_kl(points: tuple[BudgetPoint, ...], budget: float) -> float:
    """KL of the policy table at a budget, linear between its rows."""
    for a, b in pairwise(points):
        if a.budget <= budget <= b.budget:
            share = (budget - a.budget) / (b.budget - a.budget)
            return a.kl + share * (b.kl - a.kl)
    return points[0].kl if budget < points[0].budget else points[-1].kl


def pareto(points: Iterable[StaticPoint]) -> list[StaticPoint]:
    """The points that no other beats in both cost and KL, by ascending cost.

    Each path is listed once per LM head; the better head for a cost is what remains.
    """
    front: list[StaticPoint] = []
    for point in sorted(points, key=lambda point: (point.budget, point.kl)):
        if not front or point.kl < front[-1].kl:
            front.append(point)
    return front


def _uniform(points: tuple[StaticPoint, ...], manifest: Manifest) -> dict[Action, CurvePoint]:
    """With the LM head that `--policy int8` and the like use, where the search measured it."""
    found: dict[Action, CurvePoint] = {}
    for action in PRECISIONS:
        same = [point for point in points if set(point.path) == {action}]
        if same:
            usual = [point for point in same if point.head == manifest.heads[action]]
            best = min(usual or same, key=lambda point: point.kl)
            found[action] = _of_static(best, manifest)
    return found


def _of_static(point: StaticPoint, manifest: Manifest) -> CurvePoint:
    return CurvePoint(
        point.budget, point.kl, point.head, _shares(point.path, manifest), path_letters(point.path)
    )


def _shares(path: Path, manifest: Manifest) -> dict[Action, float]:
    return {action: round(path.count(action) / len(path), 4) for action in manifest.actions}
