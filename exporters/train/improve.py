"""On-policy improvement of the scorer: random decisions, and a gradient through them."""

from __future__ import annotations

import torch

from dash_onnx.exporters.train.environment import Decide, State
from dash_onnx.exporters.train.frozen import Tensor
from dash_onnx.exporters.train.scorer import Scorer

_LEAST = 1e-8  # nats; a log of nothing
_NEVER = -100.0  # logit of a forbidden action: no noise reaches it


def straight_through(
    scorer: Scorer,
    costs: Tensor,
    log_price: Tensor,
    temperature: float,
    generator: torch.Generator,
) -> Decide:
    """Random decisions, one-hot in value, with the gradient of their probabilities.

    The argmin of value + price * cost, every step between neighbouring actions multiplied by
    random noise. It is taken from the cheap end: going one action cheaper is worth the price of
    the time it saves, plus what going further would gain from there. The logit of each such
    choice is the log of worth over value, so noise and gradient act on the scale of the values,
    which differ by orders of magnitude between tokens.

    Args:
        scorer: in training.
        costs: `[L, A]`, in any unit, from dear to cheap, infinite where forbidden.
        log_price: log nats per unit of cost, broadcastable to `[B, T]`.
        temperature: scale of the logistic noise on log values.
        generator: of the noise.
    """

    def decide(state: State) -> Tensor:
        steps = scorer.log_steps(state, log_price)  # [B, T, A-1]
        uniform = torch.rand(steps.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        noise = torch.logit(uniform)
        row = costs[state.layer]
        saved = log_price.exp()[..., None] * (row[:-1] - row[1:])  # [B, 1, A-1] nats
        beyond = torch.zeros_like(steps[..., 0])
        go: list[Tensor] = []
        for step in reversed(range(steps.shape[-1])):
            worth = saved[..., step] + beyond
            logit = (worth.clamp(min=_LEAST).log() - steps[..., step]) / temperature
            logit = torch.where(saved[..., step].isfinite(), logit, _NEVER)
            go.append(_drawn(logit, noise[..., step]))
            noisy = steps[..., step] + temperature * noise[..., step]
            beyond = (worth - noisy.exp()).clamp(min=0).detach()
        # Weight of action k: went down k times, and not once more.
        reached = torch.ones_like(beyond)
        weights = []
        for down in reversed(go):
            weights.append(reached * (1 - down))
            reached = reached * down
        return torch.stack([*weights, reached], -1)

    return decide


def _drawn(logit: Tensor, noise: Tensor) -> Tensor:
    """A Bernoulli draw, with a gradient that is exact where the loss is quadratic in it.

    The plain straight-through gradient takes the slope of the loss at what was drawn, and the KL
    has none where nothing was skipped yet: it finds the first skip free. ReinMax (Liu et al.
    2023, arXiv 2304.08612) weighs the slopes at both ends alike.
    """
    with torch.no_grad():
        p = torch.sigmoid(logit)
        drawn = (logit > noise).float()
        weight = torch.where(drawn > 0, 1 - p, p) / 2
    return drawn + weight * (logit - logit.detach())
