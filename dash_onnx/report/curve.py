"""The speed/quality curve: what the manifest alone tells."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from dash_onnx.core.actions import PRECISIONS, SKIP, Action, path_letters
from dash_onnx.core.budget import cheapest_within, kl_at, scorer_facts
from dash_onnx.core.facts import BudgetPoint, StaticPoint
from dash_onnx.core.manifest import Manifest

_WORTH, _LESS = 0.03, 0.15  # of speed, and of KL: what is less is noise
_ALIKE = 0.75  # of the layers: tables of older trainings lack the precision alone
_LEAST_KL = 1e-3  # nats: a precision that loses less than this leaves nothing to gain


@dataclass(frozen=True)
class CurvePoint:
    """One policy on the speed/quality plane.

    Attributes:
        cost: mean cost of a token as a fraction of the reference's time.
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
    """A named budget, with the KL in nats that the policy table gives for it."""

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
        verdict: in two sentences, what the policy gains over the precision that one would ship, and
            over the best static assignments.
    """

    dash: tuple[CurvePoint, ...]
    static: tuple[CurvePoint, ...]
    uniform: dict[Action, CurvePoint]
    presets: tuple[Preset, ...]
    verdict: str


def curve(manifest: Manifest) -> Curve:
    """Reads the curve.

    Raises:
        PolicyError: the bundle has no scorer.
    """
    facts = scorer_facts(manifest)

    def fixed(point: StaticPoint) -> CurvePoint:
        shares = {a: round(point.path.count(a) / len(point.path), 4) for a in manifest.actions}
        return CurvePoint(point.budget, point.kl, point.head, shares, path_letters(point.path))

    uniform = {}
    for action in PRECISIONS:
        same = [point for point in facts.static if set(point.path) == {action}]
        # With the LM head that `--policy int8` and the like use, where the search measured it.
        usual = [point for point in same if point.head == manifest.heads[action]]
        if same:
            uniform[action] = fixed(min(usual or same, key=lambda point: point.kl))
    presets = (Preset(name, b, kl_at(b, facts.points)) for name, b in facts.presets.items())
    return Curve(
        dash=tuple(CurvePoint(p.budget, p.kl, p.head, p.shares, "") for p in facts.points),
        static=tuple(map(fixed, pareto(facts.static))),
        uniform=uniform,
        presets=tuple(sorted(presets, key=lambda preset: preset.cost)),
        verdict=_verdict(manifest, facts.points, facts.static)
        + _beside_static(facts.points, pareto(facts.static)),
    )


def _verdict(
    manifest: Manifest, points: tuple[BudgetPoint, ...], static: tuple[StaticPoint, ...]
) -> str:
    """Compares with what one would ship instead: at the same KL, then at the same cost."""
    plain = "int4" if "int4" in manifest.variants else manifest.variants[-1]
    one = max(
        (point for point in static if SKIP not in point.path),
        key=lambda p: (p.path.count(plain), p.head == manifest.heads[plain], -p.kl),
        default=None,
    )
    alike = one.path.count(plain) if one else 0
    layers = manifest.model.num_layers
    if one is None or alike < _ALIKE * layers:
        return f"{plain.upper()} alone was not measured: train again to compare the policy with it."
    name = f"{'every layer' if alike == layers else f'{alike} of {layers} layers'} in "
    name += plain.upper() if plain != "full" else plain
    if one.kl > _LEAST_KL and points[0].budget <= one.budget:
        faster = one.budget / cheapest_within(one.kl, points)
        if faster >= 1 + _WORTH:
            return f"At the quality of {name}, the policy is {faster:.2f} times as fast."
        if points[0].budget <= one.budget <= points[-1].budget:
            kl = kl_at(one.budget, points)
            if kl <= one.kl * (1 - _LESS):
                return (
                    f"In the time of {name}, the policy loses {kl:.3f} nats instead of "
                    f"{one.kl:.3f}."
                )
    return (
        f"The policy is hardly worth it here: {name} is as good in the same time, takes less "
        f"memory and is simpler (--policy {plain})."
    )


def _beside_static(points: tuple[BudgetPoint, ...], front: list[StaticPoint]) -> str:
    """Compares the losses at the costs of the static assignments that both reach."""
    ratios = [
        kl_at(one.budget, points) / one.kl
        for one in front
        if one.kl > _LEAST_KL and points[0].budget <= one.budget <= points[-1].budget
    ]
    if not ratios:
        return ""
    ratio = statistics.geometric_mean(ratios)
    if ratio > 1 - _LESS:
        return (
            f" At equal cost it loses {ratio:.2f} times as much as the best assignment that is the "
            "same for every token (--policy static)."
        )
    return f" At equal cost it loses {1 - ratio:.0%} less than the best static assignments."


def pareto(points: Iterable[StaticPoint]) -> list[StaticPoint]:
    """The points that no other beats in both cost and KL, by ascending cost.

    Each path is listed once per LM head; the better head for a cost is what remains.
    """
    front: list[StaticPoint] = []
    for point in sorted(points, key=lambda point: (point.budget, point.kl)):
        if not front or point.kl < front[-1].kl:
            front.append(point)
    return front
