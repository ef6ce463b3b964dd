"""The speed/quality curve, from the manifest alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dash_onnx.core.actions import PRECISIONS, Action, path_letters
from dash_onnx.core.budget import pareto, scorer_facts
from dash_onnx.core.facts import StaticPoint
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import alternatives, decided, fixed_plan, preset_plans


@dataclass(frozen=True)
class CurvePoint:
    """One policy on the speed/quality plane.

    Attributes:
        cost: mean cost of a token as a fraction of the reference's time.
        kl: mean KL(reference || policy) in nats on held-out tokens.
        head: precision of the LM head.
        shares: share of each action among the decisions.
        path: one character per layer if every token takes the same path, else empty.
    """

    cost: float
    kl: float
    head: Action
    shares: dict[Action, float]
    path: str


@dataclass(frozen=True)
class Preset:
    """A named budget.

    Attributes:
        name: name of the preset.
        cost: cost of its plan, as in `CurvePoint`.
        kl: KL of its plan, as in `CurvePoint`.
        plan: see `Plan.text`.
    """

    name: str
    cost: float
    kl: float
    plan: str


@dataclass(frozen=True)
class Curve:
    """Results of the `dash`, static and uniform policies.

    Attributes:
        dash: the policy table, by ascending cost; empty without a scorer.
        static: the Pareto front of the static assignments, by ascending cost.
        uniform: every layer at one precision, by the precision's name.
        presets: by ascending cost.
        verdict: what each preset runs, and why.
    """

    dash: tuple[CurvePoint, ...]
    static: tuple[CurvePoint, ...]
    uniform: dict[Action, CurvePoint]
    presets: tuple[Preset, ...]
    verdict: str


def curve(manifest: Manifest) -> Curve:
    """Reads the curve; without a scorer it has only paths shared by all tokens.

    Raises:
        PolicyError: no plan was measured.
    """
    if not preset_plans(manifest):
        scorer_facts(manifest)  # raises: there is none
    facts = manifest.scorer
    # Compared as in `dash-info`: by the time of whole tokens, if measured.
    points, paths = (facts.points, facts.static) if facts else ((), manifest.static)
    points = tuple(replace(p, budget=decided(p.budget, manifest).time) for p in points)
    static = [replace(p, budget=fixed_plan(p, manifest).time) for p in paths]

    def fixed(point: StaticPoint) -> CurvePoint:
        shares = {a: round(point.path.count(a) / len(point.path), 4) for a in manifest.actions}
        return CurvePoint(point.budget, point.kl, point.head, shares, path_letters(point.path))

    uniform = {}
    for action in PRECISIONS:
        same = [point for point in static if set(point.path) == {action}]
        # With the LM head that `--policy int8` and others use, if the search measured it.
        usual = [point for point in same if point.head == manifest.heads[action]]
        if same:
            uniform[action] = fixed(min(usual or same, key=lambda point: point.kl))
    presets = (Preset(name, p.time, p.kl, p.text) for name, p in preset_plans(manifest).items())
    return Curve(
        dash=tuple(CurvePoint(p.budget, p.kl, p.head, p.shares, "") for p in points),
        static=tuple(map(fixed, pareto(static))),
        uniform=uniform,
        presets=tuple(sorted(presets, key=lambda preset: preset.cost)),
        verdict=verdict(manifest),
    )


def verdict(manifest: Manifest) -> str:
    """What each preset runs, a line each, and what deciding per token gains over one path."""
    told = []
    for name, plan in preset_plans(manifest).items():
        decided, fixed = alternatives(plan.kl, manifest)
        if plan.path is None:
            gain = f", {fixed.time / plan.time:.2f} times as fast as one path" if fixed else ""
            told.append(f"{name} decides per token{gain}")
        else:
            lost = (
                f"; decisions per token would be {plan.time / decided.time:.2f} times as fast"
                if decided
                else ""
            )
            told.append(f"{name} runs {plan.text} for all tokens{lost}")
    return "\n".join(told)
