"""The tables of a policy: cost and KL for its multipliers and for static assignments.

Measured on tokens held out of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.core.budget import decided_groups, reference_ms
from dash_onnx.core.facts import BudgetPoint, StaticPoint
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.progress import Loop
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.environment import State
from dash_onnx.exporters.train.scorer import BundleScorer
from dash_onnx.exporters.train.static import LIMIT, Downgrade
from dash_onnx.exporters.train.trainer import Trainer
from dash_onnx.exporters.train.values import sampled_values

FIXED = 0.995
"""Share of a layer's decisions above which its most common action is taken by all tokens."""

ROWS = 12
"""Rows of the policy table, not counting those where INT8 is left for `full`."""


def tables(
    trainer: Trainer, scorer: BundleScorer, manifest: Manifest, rounding: float
) -> tuple[tuple[BudgetPoint, ...], tuple[StaticPoint, ...]]:
    """Runs the policy at every multiplier, and the best static assignments.

    All layers run first, and then the LM heads, so that the reference's logits are computed once.

    Args:
        trainer: trainer after its improvement.
        scorer: the scorer as exported.
        manifest: manifest of the trained bundle, with its costs.
        rounding: KL in nats of training's reference against the bundle's: the loss of a token that
            leaves `full`.

    Returns:
        Useful rows of the policy by ascending budget, see `efficient`; static assignments by
        ascending cost, searched on training text.
    """
    env, ids, heads = trainer.env, trainer.held_out, list(trainer.env.model.heads)
    multipliers, finals, counts, fixed = _multipliers(trainer), [], [], []
    for multiplier in Loop("policy table", multipliers):
        final, shares = _run(trainer, scorer, manifest, multiplier)
        fixed.append(fixed_in(shares, scorer.actions))
        if any(action and own.max() < 1 for action, own in zip(fixed[-1], shares, strict=True)):
            final, shares = _run(trainer, scorer, manifest, multiplier, fixed[-1])
        finals.append(final)
        counts.append(shares)
    assignments = _static_paths(trainer)
    for indices in Loop("static table", assignments):
        finals.append(env.run_path(ids, indices).to(trainer.dtype))
    reference = env.reference(ids).to(trainer.dtype)  # rounded like the others
    losses = env.mean_kl(reference, finals, heads, "table losses")
    runs = zip(multipliers, counts, fixed, losses, strict=False)
    points = [point for run in runs for point in _points(scorer, manifest, rounding, heads, *run)]
    policy = efficient(points)
    lossy = sum(point.kl > LIMIT for point in policy)  # the cheapest rows; the last of them is kept
    full_ms, static = reference_ms(manifest), []
    for indices, kls in zip(assignments, losses[len(multipliers) :], strict=True):
        path = tuple(trainer.actions[index] for index in indices)
        for lm_head, kl in zip(heads, kls, strict=True):
            share = round(manifest.costs.token_ms(path, lm_head) / full_ms, 5)
            static.append(StaticPoint(share, lm_head, round(kl + rounding, 6), path))
    for best in scorer.actions[: scorer.extra]:  # the reference itself, not part of training
        static.append(StaticPoint(1.0, manifest.heads[best], 0.0, (best,) * scorer.layers))
    static.sort(key=lambda point: point.budget)
    return policy[max(lossy - 1, 0) :], tuple(static)


def fixed_in(shares: Tensor, actions: Sequence[Action]) -> tuple[Action | None, ...]:
    """By layer, the action that nearly all tokens take according to shares `[L, A]`, or None."""
    top, commonest = shares.max(-1)
    pairs = zip(top.tolist(), commonest.tolist(), strict=True)
    return tuple(actions[index] if share >= FIXED else None for share, index in pairs)


@torch.no_grad()
def _run(
    trainer: Trainer,
    scorer: BundleScorer,
    manifest: Manifest,
    multiplier: float,
    fixed: Sequence[Action | None] = (),
) -> tuple[Tensor, Tensor]:
    """Input of the LM head `[B, T, D]`, and how often each layer takes each action `[L, A]`."""
    env = trainer.env
    penalty = multiplier * torch.tensor(manifest.costs.in_units(scorer.actions))
    penalty[0, scorer.actions.index(SKIP)] = math.inf
    for layer, action in enumerate(fixed):
        if action is not None:
            penalty[layer, [other != action for other in scorer.actions]] = math.inf
    chosen, finals = [], []

    def decide(state: State) -> Tensor:
        chosen.append((scorer.values(state) + penalty[state.layers]).argmin(-1))
        trained = (chosen[-1] - scorer.extra).clamp(min=0)  # INT8 replaces `full`
        return torch.nn.functional.one_hot(trained, len(env.actions)).float()

    total = torch.zeros(env.layers, len(scorer.actions))
    for part in env.parts(trainer.held_out):
        chosen.clear()
        finals.append(env.run(part, decide).final.to(trainer.dtype))
        decided = torch.cat(chosen, -1)[:, env.prompt_tokens :]  # [B, T, L]
        total += torch.nn.functional.one_hot(decided, len(scorer.actions)).sum((0, 1))
    return torch.cat(finals), total / total.sum(-1, keepdim=True)


def _points(
    scorer: BundleScorer,
    manifest: Manifest,
    rounding: float,
    heads: Sequence[Action],
    multiplier: float,
    counts: Tensor,
    fixed: tuple[Action | None, ...],
    losses: Sequence[float],
) -> Iterator[BudgetPoint]:
    """Rows of the policy for one multiplier, one per LM head."""
    costs, full_ms = manifest.costs, reference_ms(manifest)
    layers_ms = float((counts * torch.tensor(costs.in_units(scorer.actions))).sum()) * costs.unit_ms
    graphs = len(decided_groups(fixed, scorer.scorer.decision_points))
    shares = dict(zip(scorer.actions, counts.mean(0).tolist(), strict=True))
    # The LM head, which is never `full` here, counts as one more layer.
    full = shares[scorer.actions[0]] * len(counts) / (len(counts) + 1) if scorer.extra else 0.0
    lost = rounding * (1.0 - full)
    for head, loss in zip(heads, losses, strict=True):
        yield BudgetPoint(
            budget=round(costs.mixed_ms(layers_ms, head, True, graphs) / full_ms, 5),
            multiplier=multiplier,
            head=head,
            kl=round(loss + lost, 6),
            shares={action: round(share, 4) for action, share in shares.items()},
            fixed=fixed,
        )


def efficient(points: Sequence[BudgetPoint]) -> tuple[BudgetPoint, ...]:
    """The rows that lose less than any mixture of two others of equal cost, by ascending budget.

    These are the corners of the lower convex hull. Every multiplier is paired with every LM head,
    and the larger head is worth its time only for part of the multipliers: a row that loses only
    slightly less than a much cheaper one would distort the budgets around it.
    """
    kept: list[BudgetPoint] = []
    for point in sorted(points, key=lambda point: (point.budget, point.kl)):
        if kept and point.kl >= kept[-1].kl:
            continue
        while len(kept) > 1 and _slope(kept[-1], point) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(point)
    return tuple(kept)


def _slope(a: BudgetPoint, b: BudgetPoint) -> float:
    """Nats per unit of budget from one row to a more expensive one; negative."""
    return (b.kl - a.kl) / (b.budget - a.budget)


def _multipliers(trainer: Trainer) -> list[float]:
    """Multipliers of the rows, ascending; they exceed the range of training on both sides."""
    low, high = trainer.log_multiplier_range
    logs = np.linspace(low - 1.7, high + 1.2, ROWS).tolist()
    if trainer.extra:  # at even lower ones, layers change from INT8 to `full` one by one
        logs = [low - 7.0, low - 4.35, *logs]
    return [math.exp(log) for log in logs]


def _static_paths(trainer: Trainer) -> list[tuple[int, ...]]:
    """Each uniform precision, and the best static assignments, most expensive first, as indices."""
    skip, layers = trainer.actions.index(SKIP), trainer.env.layers
    precise = [one for one in trainer.downgrades if skip not in one.path]
    # Each skip is a large step; steps between precisions are small and many.
    every = max(1, layers // 6)
    searched = [one.path for one in [*precise[::every], *_skipping(trainer, precise)]]
    return [*dict.fromkeys([*((index,) * layers for index in range(skip)), *searched])]


def _skipping(trainer: Trainer, precise: list[Downgrade]) -> list[Downgrade]:
    """Continues the search from the last path without a skip, with the trained compensation."""
    plan, env = trainer.plan, trainer.env
    ids = trainer.ids[: plan.batch * plan.candidates]
    parts = [sampled_values(env, part, trainer.generator) for part in ids.split(plan.batch)]
    reference = torch.cat([final for *_, final in parts]).float()
    values = torch.cat([sampled[:, env.prompt_tokens :] for _, sampled, _ in parts]).mean((0, 1))
    start = precise[-1].path if precise else None
    return trainer.static_search(ids, reference, values, plan.candidates, start)
