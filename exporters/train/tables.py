"""The tables of a policy: cost and KL of its multipliers and of static assignments.

Measured on tokens held out of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dash_onnx.core.actions import SKIP
from dash_onnx.core.budget import reference_ms
from dash_onnx.core.facts import BudgetPoint, StaticPoint
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.progress import Loop
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.environment import Environment, State
from dash_onnx.exporters.train.scorer import BundleScorer, cheapest
from dash_onnx.exporters.train.static import LIMIT, Downgrade
from dash_onnx.exporters.train.trainer import Trainer
from dash_onnx.exporters.train.values import sampled_values

_ROWS = 12  # of the policy table where multipliers decide between the cheaper actions


def policy_table(
    trainer: Trainer, scorer: BundleScorer, manifest: Manifest, reference: Tensor, rounding: float
) -> tuple[BudgetPoint, ...]:
    """Runs the policy at every multiplier.

    Args:
        trainer: after its improvement.
        scorer: as exported.
        manifest: of the trained bundle, with its costs.
        reference: input of the LM head on the reference path, `[B, T, D]`.
        rounding: KL in nats of training's reference against the bundle's; it is what a token loses
            that leaves `full`.

    Returns:
        Rows by ascending budget, as far as they are useful: see `efficient`.
    """
    env, costs, full_ms = trainer.env, manifest.costs, reference_ms(manifest)
    layer_costs = torch.tensor(costs.in_units(scorer.actions))
    allowed = layer_costs.clone()
    allowed[0, scorer.actions.index(SKIP)] = math.inf
    points: list[BudgetPoint] = []
    for multiplier in Loop("policy table", _multipliers(trainer)):
        penalty = multiplier * allowed
        parts = [_run(env, scorer, part, penalty) for part in env.parts(trainer.held_out)]
        final, paths = (torch.cat(part) for part in zip(*parts, strict=True))
        losses = env.mean_kl(reference, final, env.model.heads)
        counts = torch.nn.functional.one_hot(paths[:, env.prompt_tokens :], len(scorer.actions))
        counts = counts.float().mean((0, 1))  # [L, A]
        shares = dict(zip(scorer.actions, counts.mean(0).tolist(), strict=True))
        lost = rounding * (1.0 - shares[scorer.actions[0]] if scorer.extra else 1.0)
        layers_ms = float((counts * layer_costs).sum()) * costs.unit_ms
        for head, loss in zip(env.model.heads, losses, strict=True):
            ms = costs.embed_ms + costs.scorer_ms + costs.heads_ms[head] + layers_ms
            points.append(
                BudgetPoint(
                    budget=round(ms / full_ms, 5),
                    multiplier=multiplier,
                    head=head,
                    kl=round(loss + lost, 6),
                    shares={action: round(share, 4) for action, share in shares.items()},
                )
            )
        if min(losses) + lost > LIMIT:
            break
    return efficient(points)


def efficient(points: Sequence[BudgetPoint]) -> tuple[BudgetPoint, ...]:
    """The rows that lose less than every row that is cheaper, by ascending budget.

    Of two that cost the same, to a ten thousandth, the one that loses less. Every multiplier comes
    with every LM head, because between rows of different heads nothing else tells what is lost.
    """
    kept: list[BudgetPoint] = []
    for point in sorted(points, key=lambda point: (point.budget, point.kl)):
        if kept and point.kl >= kept[-1].kl:
            continue
        if kept and point.budget < kept[-1].budget + 1e-4:
            kept.pop()
        kept.append(point)
    return tuple(kept)


def _multipliers(trainer: Trainer) -> list[float]:
    """Of the rows, ascending: some more than training draws, in both directions."""
    low, high = trainer.log_multiplier_range
    logs = np.linspace(low - 1.7, high + 1.2, _ROWS).tolist()
    if trainer.extra:  # still lower, INT8 is left for `full`, layer by layer
        logs = [low - 7.0, low - 4.35, *logs]
    return [math.exp(log) for log in logs]


@torch.no_grad()
def _run(
    env: Environment, scorer: BundleScorer, ids: Tensor, penalty: Tensor
) -> tuple[Tensor, Tensor]:
    """Input of the LM head `[B, T, D]` and decisions `[B, T, L]` under penalties `[L, A]`."""
    chosen = []

    def decide(state: State) -> Tensor:
        chosen.append(cheapest(scorer.values(state), penalty[state.layers]))
        trained = (chosen[-1] - scorer.extra).clamp(min=0)  # INT8 stands for `full`
        return torch.nn.functional.one_hot(trained, len(env.actions)).float()

    return env.run(ids, decide).final, torch.cat(chosen, -1)


def static_table(
    trainer: Trainer, manifest: Manifest, reference: Tensor, rounding: float
) -> tuple[StaticPoint, ...]:
    """Best static assignments by ascending cost, searched on training text; see `policy_table`."""
    env, costs, full_ms = trainer.env, manifest.costs, reference_ms(manifest)
    skip, heads = trainer.actions.index(SKIP), list(env.model.heads)
    precise = [one for one in trainer.downgrades if skip not in one.path]
    # Each skip is a large step; those between precisions are small and many.
    every = max(1, env.layers // 6)
    points: list[StaticPoint] = []
    for one in Loop("static table", [*precise[::every], *_skipping(trainer, precise)]):
        path = tuple(trainer.actions[action] for action in one.path)
        losses = env.mean_kl(reference, env.run_path(trainer.held_out, one.path), heads)
        for head, loss in zip(heads, losses, strict=True):
            share = round(costs.token_ms(path, head) / full_ms, 5)
            points.append(StaticPoint(share, head, round(loss + rounding, 6), path))
    return tuple(sorted(points, key=lambda point: point.budget))


def _skipping(trainer: Trainer, precise: list[Downgrade]) -> list[Downgrade]:
    """The search from the last path without a skip, with the compensation as trained."""
    plan, env = trainer.plan, trainer.env
    ids = trainer.ids[: plan.batch * plan.candidates]
    parts = [sampled_values(env, part, trainer.generator) for part in ids.split(plan.batch)]
    reference = torch.cat([final for *_, final in parts]).float()
    values = torch.cat([sampled[:, env.prompt_tokens :] for _, sampled, _ in parts]).mean((0, 1))
    start = precise[-1].path if precise else None
    return trainer.static_search(ids, reference, values, plan.candidates, start)
