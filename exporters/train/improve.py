"""On-policy improvement of the scorer: straight-through decisions with noise on the values."""

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
        costs: milliseconds `[L, A]`, from dear to cheap, infinite where forbidden.
        log_price: log nats per millisecond, broadcastable to `[B, T]`.
        temperature: scale of the logistic noise on log values.
        generator: of the noise.
    """

    def decide(state: State) -> Tensor:
        steps = scorer.log_steps(state, log_price)  # [B, T, A-1]
        uniform = torch.rand(steps.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        steps = steps + temperature * torch.logit(uniform)
        row = costs[state.layer]
        saved = log_price.exp()[..., None] * (row[:-1] - row[1:])  # [B, 1, A-1] nats
        beyond = torch.zeros_like(steps[..., 0])
        go: list[Tensor] = []
        for step in reversed(range(steps.shape[-1])):
            worth = saved[..., step] + beyond
            logit = (worth.clamp(min=_LEAST).log() - steps[..., step]) / temperature
            logit = torch.where(saved[..., step].isfinite(), logit, _NEVER)
            soft = torch.sigmoid(logit)
            hard = (logit > 0).float()
            go.append(hard + soft - soft.detach())
            beyond = (worth - steps[..., step].exp()).clamp(min=0).detach()
        # Weight of action k: went down k times, and not once more.
        reached = torch.ones_like(beyond)
        weights = []
        for down in reversed(go):
            weights.append(reached * (1 - down))
            reached = reached * down
        return torch.stack([*weights, reached], -1)

    return decide
