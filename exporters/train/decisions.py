"""How often the scorer decides for a token: the number that loses least at equal cost.

More decisions know more, and each takes the time of a run of the scorer: a large part of a layer in
a small model, next to nothing in a large one.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from dash_onnx.core.contract import scorer_ports
from dash_onnx.core.progress import Loop
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.environment import Decide, State
from dash_onnx.exporters.train.scorer import BundleScorer, cheapest, export_scorer
from dash_onnx.exporters.train.trainer import Trainer
from dash_onnx.runtime.profile import graph_ms

_LOG = logging.getLogger(__name__)

_MULTIPLIERS = 5  # at which each candidate runs
_LEAST = 1e-6  # nats
_NOISE = 0.02  # of the KL: what is gained less than this is worth no decision more

Curve: TypeAlias = list[tuple[float, float]]
"""Costs in `Costs.unit_ms` and KL in nats, by ascending cost."""


def choose(trainer: Trainer, ids: Tensor, fit: Callable[[], None]) -> None:
    """Leaves the trainer with a new scorer at the decision points that lose least at equal cost.

    Args:
        trainer: with candidates.
        ids: `[B, T]` that none of the candidates is fitted to.
        fit: fits the scorer that the trainer has now.
    """
    run_ms = decision_ms(trainer)
    unit_ms = trainer.bundle.manifest.costs.unit_ms
    curves = []
    for points in Loop("decisions", trainer.candidates):
        trainer.decide_at(points)
        fit()
        decided = len(points) * run_ms / unit_ms
        found = policy_curve(trainer, ids, _MULTIPLIERS)
        curves.append([(cost + decided, kl) for cost, kl in found])
    losses = compared(curves)
    best = next(number for number, loss in enumerate(losses) if loss <= min(losses) + _NOISE)
    seen = zip(trainer.candidates, losses, strict=True)
    _LOG.info(
        "decisions for a token, %.3f ms each: %d; KL at equal cost beside the first: %s",
        run_ms,
        len(trainer.candidates[best]),
        ", ".join(f"{len(points)} {loss:+.1%}" for points, loss in seen),
    )
    trainer.decide_at(trainer.candidates[best])


def compared(curves: Sequence[Curve]) -> list[float]:
    """How much more each curve loses than the first one at equal cost; 0 for the first.

    The mean of the logs, over the costs that all of them reach. Where there are none, the dearer
    one is the worse.
    """
    least, most = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if least >= most:
        return [curve[0][0] / curves[0][0][0] - 1 for curve in curves]
    grid = np.linspace(least, most, 9)
    logs = []
    for curve in curves:
        costs, kls = np.array(curve).T
        logs.append(np.interp(grid, costs, np.log(np.maximum(kls, _LEAST))))
    return [math.exp(float(np.mean(log - logs[0]))) - 1 for log in logs]


def policy_curve(trainer: Trainer, ids: Tensor, multipliers: int) -> Curve:
    """Cost and KL of the policy as it is now, at multipliers of the range that is trained.

    Args:
        trainer: whose scorer decides.
        ids: `[B, T]`.
        multipliers: how many.
    """
    env, (low, high) = trainer.env, trainer.log_multiplier_range
    points = []
    with torch.no_grad(), trainer.autocast():
        reference = env.reference(ids)
        for log in np.linspace(low - 1, high + 1, multipliers):
            decide = greedy(trainer, math.exp(log))
            rollouts = [env.run(part, decide) for part in env.parts(ids)]
            costs = [trainer.cost(torch.cat(rollout.decisions, 2)) for rollout in rollouts]
            final = torch.cat([rollout.final for rollout in rollouts])
            kl = env.mean_kl(reference, [final], [env.model.head])[0][0]
            points.append((float(torch.cat(costs)[:, env.prompt_tokens :].mean()), kl))
    return sorted(points)


def greedy(trainer: Trainer, multiplier: float) -> Decide:
    """Decisions as the runtime takes them."""
    penalty = multiplier * trainer.costs

    def decide(state: State) -> Tensor:
        taken = cheapest(trainer.scorer.values(state), penalty[state.layers])
        return torch.nn.functional.one_hot(taken, len(trainer.actions)).float()

    return decide


def decision_ms(trainer: Trainer) -> float:
    """Milliseconds of one run of the scorer's graph, whose weights do not matter."""
    manifest = trainer.bundle.manifest
    gain = torch.zeros(trainer.env.layers)
    scorer = BundleScorer(trainer.scorer, trainer.actions, trainer.extra, gain)
    ports = scorer_ports(manifest.dims, scorer.layers, len(scorer.actions))
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / export_scorer(scorer, Path(folder), manifest.dims)
        return graph_ms(graph, ports, manifest.target.device)
