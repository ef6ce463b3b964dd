"""Value regression: what each action would cost each token, without running it.

To second order, replacing the output y of one layer by y + d costs KL = d^T J^T F J d / 2, where J
leads from y to the logits and F is the Fisher matrix of the predicted distribution. With a label
c drawn from that distribution, g = grad_y(-log p_c) has covariance J^T F J, so (g . d)^2 / 2 is
an unbiased sample of that KL: one backward pass gives it for every token, layer and action.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dash_onnx.exporters.sampling import drawn
from dash_onnx.exporters.train.environment import Environment, State
from dash_onnx.exporters.train.frozen import Tensor
from dash_onnx.exporters.train.scorer import Scorer


def sampled_values(
    env: Environment, ids: Tensor, generator: torch.Generator
) -> Iterator[tuple[State, Tensor]]:
    """Samples of each action's KL along the reference path.

    Args:
        env: the process; its first action is the reference.
        ids: `[B, T]`.
        generator: of the labels.

    Yields:
        Per layer the state, and `[B, T, A]` samples in nats (0 for the reference action).
    """
    frozen = env.frozen
    rotary = frozen.rotary(ids.shape[1])
    weights = torch.zeros(*ids.shape, len(env.actions))
    weights[..., 0] = 1.0
    states, differences, outputs = [], [], []
    x = before = frozen.embed(ids).requires_grad_()
    previous = torch.full(ids.shape, len(env.actions))
    for layer in range(env.layers):
        if layer % env.block == 0:
            seen = before.detach(), previous
        states.append(State(layer, *seen))
        with torch.enable_grad():
            results = env.outputs(layer, x, weights, rotary)
        before, x = x, results[0]
        differences.append([(result - x).detach() for result in results])
        outputs.append(x)
        previous = torch.zeros_like(previous)
    loss = _sampled_nll(env, x, generator)
    gradients = torch.autograd.grad(loss, outputs)
    for state, difference, gradient in zip(states, differences, gradients, strict=True):
        effects = [torch.linalg.vecdot(gradient, d).square() / 2 for d in difference]
        yield state, torch.stack(effects, -1).float()


def _sampled_nll(env: Environment, x: Tensor, generator: torch.Generator) -> Tensor:
    """Sum over tokens of -log p of a label drawn from p itself."""
    total = x.new_zeros(())
    for part in env.frozen.final(x).flatten(0, 1).split(512):
        log_p = env.frozen.logits(part).float().log_softmax(-1)
        with torch.no_grad():
            labels = drawn(log_p.exp(), generator)
        total = total - log_p.gather(-1, labels).sum()
    return total


def gamma_deviance(log_values: Tensor, samples: Tensor) -> Tensor:
    """Loss whose minimum is the mean of heavy-tailed positive samples (Gamma, log link)."""
    return samples * torch.exp(-log_values) + log_values


def regression_loss(scorer: Scorer, state: State, samples: Tensor, log_price: Tensor) -> Tensor:
    """Mean deviance of all actions but the reference."""
    predicted = scorer.values(state, log_price)[..., 1:].log()
    return gamma_deviance(predicted, samples[..., 1:].clamp(min=1e-9)).mean()
