"""Value regression: what each action would cost each token, without running it.

To second order, replacing the output y of one layer by y + d costs KL = d^T J^T F J d / 2, where J
leads from y to the logits and F = diag(p) - p p^T is the Fisher matrix of the predicted
distribution p. With a random vector v of covariance F, g = J^T v has covariance J^T F J, so
(g . d)^2 / 2 is an unbiased sample of that KL: one backward pass gives it for every token, layer
and action. A Gaussian v makes the samples that KL times chi-square of one degree of freedom;
drawing labels instead gives much heavier tails.
"""

from __future__ import annotations

import torch

from dash_onnx.exporters.train.environment import Environment, State
from dash_onnx.exporters.train.frozen import Tensor
from dash_onnx.exporters.train.scorer import Scorer


def sampled_values(
    env: Environment, ids: Tensor, generator: torch.Generator
) -> tuple[list[State], Tensor, Tensor]:
    """Samples of each action's KL along the reference path.

    Args:
        env: the process; its first action is the reference.
        ids: `[B, T]`.
        generator: of the samples.

    Returns:
        The state of each segment; samples `[B, T, L, A]` in nats (0 for the reference action);
        the input of the LM head `[B, T, D]`.
    """
    frozen = env.frozen
    rotary = frozen.rotary(ids.shape[1])
    weights = torch.zeros(*ids.shape, len(env.actions))
    weights[..., 0] = 1.0
    states, differences, outputs = [], [], []
    x = before = frozen.embed(ids).requires_grad_()
    for layers in env.segments:
        states.append(State(layers, before.detach()))
        for layer in range(layers.start, layers.stop):
            with torch.enable_grad():
                results = env.outputs(layer, x, weights, rotary)
            before, x = x, results[0]
            differences.append([(result - x).detach() for result in results])
            outputs.append(x)
    final = frozen.final(x)
    direction = random_direction(env, final, generator)
    gradients = torch.autograd.grad(direction, outputs)
    samples = [
        torch.stack([torch.linalg.vecdot(gradient, d).square() / 2 for d in difference], -1)
        for difference, gradient in zip(differences, gradients, strict=True)
    ]
    return states, torch.stack(samples, 2).float(), final.detach()


def random_direction(env: Environment, final: Tensor, generator: torch.Generator) -> Tensor:
    """Sum over tokens of v . logits, v Gaussian with the Fisher matrix as covariance.

    Args:
        final: input of the LM head, `[B, T, D]`.
    """
    total = final.new_zeros(())
    for part in final.flatten(0, 1).split(512):
        logits = env.frozen.logits(part).float()
        with torch.no_grad():
            p = logits.softmax(-1)
            noise = p.sqrt() * torch.randn(p.shape, generator=generator)
            direction = noise - p * noise.sum(-1, keepdim=True)  # (I - p 1^T) diag(p)^1/2 e
        total = total + (direction * logits).sum()
    return total


def gamma_deviance(log_values: Tensor, samples: Tensor) -> Tensor:
    """Loss whose minimum is the mean of heavy-tailed positive samples (Gamma, log link)."""
    return samples * torch.exp(-log_values) + log_values


def regression_loss(scorer: Scorer, state: State, samples: Tensor) -> Tensor:
    """Mean deviance of all actions but the reference, summed over the layers of a segment.

    Args:
        scorer: in training.
        state: of n layers.
        samples: `[..., n, A]` nats.
    """
    predicted = scorer.values(state)[..., 1:].log()
    deviance = gamma_deviance(predicted, samples[..., 1:].clamp(min=1e-9))
    return deviance.mean(-1).flatten(0, -2).mean(0).sum()
