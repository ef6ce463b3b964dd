"""The budgets of a bundle on a machine with other costs."""

from __future__ import annotations

from dataclasses import replace

from dash_onnx.core.budget import decided_groups, pareto, presets, reference_ms
from dash_onnx.core.facts import BudgetPoint, Costs, StaticPoint
from dash_onnx.core.manifest import Manifest


def with_costs(manifest: Manifest, costs: Costs) -> Manifest:
    """A manifest for another machine's costs: budgets and presets follow them.

    Multipliers are in units of a layer, so decisions change only where the ratios of costs do. The
    budget of each row of the policy table scales as its mix of actions does, its KL stays; a row
    that costs more there than one that loses less is dropped.
    """
    scorer = manifest.scorer
    moved = replace(manifest, costs=costs)
    moved = replace(moved, static=_static_costs(moved, manifest.static))
    if scorer is None:
        return moved
    decision_points, none_fixed = scorer.decision_points, (None,) * manifest.model.num_layers

    def mix_ms(point: BudgetPoint, under: Costs) -> float:
        layers_ms = sum(
            share * sum(layer[action] for layer in under.layers_ms)
            for action, share in point.shares.items()
        )
        graphs = len(decided_groups(point.fixed or none_fixed, decision_points))
        return under.mixed_ms(layers_ms, point.head, True, graphs)

    full_ms = reference_ms(moved)
    before = reference_ms(manifest)
    points = []
    for point in scorer.points:
        ms = point.budget * before * mix_ms(point, costs) / mix_ms(point, manifest.costs)
        points.append(replace(point, budget=round(ms / full_ms, 5)))
    kept = tuple(pareto(points))
    return replace(
        moved,
        scorer=replace(
            scorer,
            points=kept,
            presets=presets(kept, scorer.margin),
            static=_static_costs(moved, scorer.static),
        ),
    )


def _static_costs(manifest: Manifest, points: tuple[StaticPoint, ...]) -> tuple[StaticPoint, ...]:
    """Static assignments with the budgets that the manifest's costs give them."""
    full_ms, costs = reference_ms(manifest), manifest.costs
    moved = [
        replace(point, budget=round(costs.token_ms(point.path, point.head) / full_ms, 5))
        for point in points
    ]
    return tuple(sorted(moved, key=lambda point: point.budget))
