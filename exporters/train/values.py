"""Fisher samples: what each action of each layer would cost each token in KL, without running it.

To second order, replacing the output y `[D]` of one layer by y + d costs KL = d^T J^T F J d / 2,
where J `[V, D]` is the Jacobian of the logits and F = diag(p) - p p^T `[V, V]` the Fisher matrix of
the predicted distribution p. For a random v `[V]` of covariance F, g = J^T v has covariance
J^T F J, so (g . d)^2 / 2 is an unbiased sample of that KL: one backward pass gives it for every
token, layer and action. With a Gaussian v the samples are that KL times a chi-square variable with
one degree of freedom; drawing labels instead gives much heavier tails.
"""

from __future__ import annotations

import torch

from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.environment import Environment, State
from dash_onnx.exporters.train.scorer import Scorer

MAX_NATS = 8.0
"""Upper limit in nats on a token's cost of a replaced output. The quadratic form is unbounded: on
tokens with massive activations it gives thousands, and a few of them would dominate a mean."""


def sampled_values(
    env: Environment, ids: Tensor, generator: torch.Generator, most: float = MAX_NATS
) -> tuple[list[State], Tensor, Tensor]:
    """Samples of each action's KL along the reference path.

    Args:
        env: its first action is the reference.
        ids: `[B, T]`.
        generator: source of randomness.
        most: nats at which samples are clipped.

    Returns:
        The state of each segment; samples `[B, T, L, A]` in nats (0 for the reference action);
        the input of the LM head `[B, T, D]`.
    """
    beside = env.model.embedding.beside(ids)
    reference = torch.zeros(*ids.shape, len(env.actions))
    reference[..., 0] = 1.0
    states, differences, outputs = [], [], []
    x = before = env.model.embedding(ids).requires_grad_()
    for layers in env.segments:
        states.append(State(layers, before.detach()))
        for layer in range(layers.start, layers.stop):
            with torch.enable_grad():
                results = env.outputs(layer, x, reference, beside)
            before, x = x, results[0]
            differences.append([(result - x).detach() for result in results])
            outputs.append(x)
    final = env.model.final(x)
    gradients = torch.autograd.grad(fisher_sample(env, final, generator), outputs)
    samples = [
        torch.stack([(gradient * d).sum(-1).square() / 2 for d in difference], -1)
        for difference, gradient in zip(differences, gradients, strict=True)
    ]
    return states, torch.stack(samples, 2).float().clamp(max=most), final.detach()


def fisher_sample(env: Environment, final: Tensor, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient is that of the sum over tokens of v . logits.

    v `[V]` is Gaussian with the Fisher matrix as covariance. Tensors of shape `[tokens, V]`
    are not kept for the backward pass.

    Args:
        env: environment whose LM head is used.
        final: input of the LM head, `[B, T, D]`.
        generator: source of randomness for v.
    """
    weight, gradients = env.model.lm_head(env.model.head).weight, []
    with torch.no_grad():
        for part in final.flatten(0, 1).split(env.model.chunk):
            logits = env.model.logits(part).float()
            p = logits.softmax(-1)
            noise = p.sqrt() * torch.randn(p.shape, generator=generator)
            v = noise - p * noise.sum(-1, keepdim=True)  # (I - p 1^T) diag(p)^1/2 e
            v *= env.model.logits_slope(logits)
            gradients.append((v.to(weight.dtype) @ weight).to(final.dtype))
    return (torch.cat(gradients).view_as(final) * final).sum()


def gamma_deviance(log_values: Tensor, samples: Tensor) -> Tensor:
    """Gamma deviance with log link, elementwise; minimized by the mean of positive samples."""
    return samples * torch.exp(-log_values) + log_values


def regression_loss(scorer: Scorer, state: State, samples: Tensor) -> Tensor:
    """Mean Gamma deviance of all actions but the reference, summed over a segment's layers.

    Args:
        scorer: the scorer in training.
        state: state of a segment of n layers.
        samples: `[..., n, A]` nats.
    """
    predicted = scorer.values(state)[..., 1:].log()
    deviance = gamma_deviance(predicted, samples[..., 1:].clamp(min=1e-9))
    return deviance.mean(-1).flatten(0, -2).mean(0).sum()
