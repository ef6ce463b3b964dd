"""The policy table: each multiplier's budget and KL, on tokens held out of training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dash_onnx.core.actions import SKIP
from dash_onnx.core.budget import reference_ms
from dash_onnx.core.facts import BudgetPoint
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.train.environment import Environment, State
from dash_onnx.exporters.train.frozen import Tensor
from dash_onnx.exporters.train.scorer import BundleScorer
from dash_onnx.exporters.train.static import LIMIT


@dataclass
class _Recorder:
    """Decides as the runtime does and remembers it, `full` included, which the process lacks."""

    scorer: BundleScorer
    env: Environment
    penalty: Tensor  # [L, A'] nats
    chosen: list[Tensor]

    def __call__(self, state: State) -> Tensor:
        action = self.scorer.decide(state, self.penalty)
        self.chosen.append(action)
        known = (action - self.scorer.extra).clamp(min=0)
        return torch.nn.functional.one_hot(known, len(self.env.actions)).float()


def measure(
    env: Environment,
    scorer: BundleScorer,
    manifest: Manifest,
    ids: Tensor,
    reference: Tensor,
    multipliers: list[float],
    rounding_kl: float,
) -> tuple[BudgetPoint, ...]:
    """Runs the policy at every multiplier.

    Args:
        env: the process.
        scorer: trained.
        manifest: of the bundle, with its costs.
        ids: held-out tokens `[B, T]`.
        reference: input of the LM head on the reference path, `[B, T, D]`.
        multipliers: nats per `Costs.unit_ms`.
        rounding_kl: KL of the process's own reference against the bundle's; it is what a token
            loses that leaves `full`.

    Returns:
        Rows of the table by ascending budget, as far as they are useful; one that is no cheaper
        than the one below it is left out.
    """
    unit_ms = manifest.costs.unit_ms
    costs = torch.tensor(manifest.costs.in_units(scorer.actions))
    allowed = costs.clone()
    allowed[0, scorer.actions.index(SKIP)] = math.inf
    full_ms = reference_ms(manifest)
    heads = {head: ms / unit_ms for head, ms in manifest.costs.heads_ms.items()}
    fixed_ms = manifest.costs.embed_ms + manifest.costs.scorer_ms
    with torch.no_grad():
        points: list[BudgetPoint] = []
        for multiplier in sorted(multipliers):
            chosen, finals = [], []
            for part in ids.split(4):
                penalty = multiplier * allowed
                recorder = _Recorder(scorer, env, penalty, [])
                finals.append(env.run(part, recorder).final)
                chosen.append(torch.cat(recorder.chosen, -1))
            paths = torch.cat(chosen)[:, env.prompt_tokens :]  # [B, T, L]
            final = torch.cat(finals)
            counts = torch.nn.functional.one_hot(paths, len(scorer.actions)).float().mean((0, 1))
            layers_ms = float((counts * costs).sum()) * unit_ms
            left = 1.0 - float(counts[:, 0].mean()) if scorer.extra else 1.0
            losses = env.mean_kl(reference, final, list(env.frozen.heads))
            head, kl = min(
                zip(env.frozen.heads, losses, strict=True),
                key=lambda pair: pair[1] + multiplier * heads[pair[0]],
            )
            kl += left * rounding_kl
            ms = fixed_ms + layers_ms + manifest.costs.heads_ms[head]
            shares = dict(zip(scorer.actions, counts.mean(0).tolist(), strict=True))
            points.append(
                BudgetPoint(
                    budget=round(ms / full_ms, 5),
                    multiplier=multiplier,
                    head=head,
                    kl=round(kl, 6),
                    shares={action: round(share, 4) for action, share in shares.items()},
                )
            )
            if kl > LIMIT:
                break
    kept: list[BudgetPoint] = []
    for point in points:  # from dear to cheap
        if not kept or point.budget < kept[-1].budget - 1e-4:
            kept.append(point)
    return tuple(reversed(kept))
