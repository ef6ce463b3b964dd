"""On-policy improvement of the scorer: straight-through Gumbel decisions and policy gradient."""

from __future__ import annotations

import torch

from dash_onnx.exporters.train.environment import Decide, State
from dash_onnx.exporters.train.frozen import Tensor
from dash_onnx.exporters.train.scorer import Scorer

_SATURATION = 6.0  # in units of the cost scale; a worse action is as good as excluded


def logits(scorer: Scorer, state: State, costs: Tensor, log_price: Tensor, scale: float) -> Tensor:
    """Preferences `[B, T, A]`: minus the total price of each action, in milliseconds / `scale`."""
    values = torch.exp(scorer.log_values(state, log_price) - log_price[..., None])
    total = (values + costs[state.layer]) / scale
    lowest = total.detach().amin(-1, keepdim=True)
    return -(total - lowest).clamp(max=40.0)


def straight_through(
    scorer: Scorer,
    costs: Tensor,
    log_price: Tensor,
    forbidden: Tensor,
    scale: float,
    generator: torch.Generator,
) -> Decide:
    """Random decisions, one-hot in value, with the gradient of their softmax (Gumbel).

    Args:
        scorer: in training.
        costs: milliseconds `[L, A]`.
        log_price: log nats per millisecond, broadcastable to `[B, T]`.
        forbidden: `[L, A]`, 0 or infinity.
        scale: milliseconds of difference that the noise is as large as.
        generator: of the noise.
    """

    def decide(state: State) -> Tensor:
        z = logits(scorer, state, costs, log_price, scale) - forbidden[state.layer]
        noise = -torch.log(
            -torch.log(torch.rand(z.shape, generator=generator).clamp(1e-9, 1 - 1e-7))
        )
        soft = torch.softmax(z + noise, -1)
        hard = torch.nn.functional.one_hot(soft.argmax(-1), z.shape[-1]).float()
        return hard + soft - soft.detach()

    return decide
