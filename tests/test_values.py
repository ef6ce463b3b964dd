"""Sampled values are unbiased: their mean is the second-order KL computed by brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dash_onnx.core.bundle import Bundle
from dash_onnx.exporters.train.dequantized import DequantizedModel
from dash_onnx.exporters.train.environment import Environment, State
from dash_onnx.exporters.train.regress import fit
from dash_onnx.exporters.train.scorer import Scorer
from dash_onnx.exporters.train.values import gamma_deviance, sampled_values

TOKENS = 5
DRAWS = 1500
ACTIONS = ("int8", "int4", "skip")


@pytest.fixture(scope="module")
def env(tiny_folder: Path, night: Path, export_tiny: Callable[..., Path]) -> Environment:
    bundle = Bundle(export_tiny(tiny_folder, calibration=(night,)))
    return Environment(DequantizedModel(bundle, ACTIONS, torch.float32), ACTIONS, 0, (1, 2))


def from_layer(env: Environment, layer: int, y: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[B, T, V]` when the output of a layer is `y`; the rest at the base."""
    model, beside = env.model, env.model.embedding.beside(torch.zeros(1, TOKENS, dtype=torch.long))
    for later in range(layer + 1, env.layers):
        queries, keys_values = model.qkv(later, ACTIONS[0], model.normed(later, y))
        attention = model.attend(later, queries, keys_values, beside)
        y = model.complete(later, ACTIONS[0], y, attention)
    return model.logits(model.final(y)).double().log_softmax(-1)


def second_order_kl(env: Environment, ids: torch.Tensor) -> torch.Tensor:
    """`[L, T, A]`: half the variance, under p, of how the logits move; summed over all tokens."""
    base = torch.zeros(1, TOKENS, len(ACTIONS))
    base[..., 0] = 1.0
    beside = env.model.embedding.beside(ids)
    result = torch.zeros(env.layers, TOKENS, len(ACTIONS), dtype=torch.float64)
    x = env.model.embedding(ids)
    with torch.no_grad():
        for layer in range(env.layers):
            outputs = env.outputs(layer, x, base, beside)
            y = outputs[0]
            p = from_layer(env, layer, y).exp()
            for action in range(1, len(ACTIONS)):
                change = outputs[action] - y
                for token in range(TOKENS):
                    d = torch.zeros_like(y)
                    d[:, token] = change[:, token]
                    step = 0.02 * float(y[:, token].norm() / d.norm())
                    moved = from_layer(env, layer, y + step * d) - from_layer(
                        env, layer, y - step * d
                    )
                    moved = moved / (2 * step)  # d log p: its mean under p is zero
                    variance = (p * moved.square()).sum(-1) - (p * moved).sum(-1).square()
                    result[layer, token, action] = variance.sum() / 2
            x = y
    return result


def test_the_mean_of_many_draws_is_the_second_order_kl(env: Environment) -> None:
    ids = torch.randint(2, 384, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    exact = second_order_kl(env, ids)
    generator = torch.Generator().manual_seed(1)
    _, draws, _ = sampled_values(env, ids.expand(DRAWS, -1), generator, most=math.inf)
    assert draws.shape == (DRAWS, TOKENS, env.layers, len(ACTIONS))
    assert (draws[..., 0] == 0).all()
    for layer in range(env.layers):
        values = draws[:, :, layer].double()
        error = values.std(0) / DRAWS**0.5
        wanted = exact[layer]
        assert (wanted[:, 1:] > 0).all()
        distance = (values.mean(0) - wanted).abs()
        assert (distance <= 5 * error + 0.02 * wanted).all(), (layer, values.mean(0), wanted)
        # The figures are sharp enough to tell: most are within a few percent.
        assert float((error[:, 1:] / wanted[:, 1:]).max()) < 0.2


def test_the_states_and_the_end_are_those_of_the_reference_path(env: Environment) -> None:
    ids = torch.randint(2, 384, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    base = torch.zeros(2, TOKENS, env.layers, len(ACTIONS))
    base[..., 0] = 1.0
    rollout = env.run(ids, lambda state: base[:, :, state.layers])
    states, _, final = sampled_values(env, ids, torch.Generator())
    for wanted, state in zip(rollout.states, states, strict=True):
        torch.testing.assert_close(state.hidden, wanted.hidden, rtol=1e-4, atol=1e-4)
        assert state.layers == wanted.layers
    assert torch.equal(final, env.reference(ids))  # kept in its place


def test_samples_are_cut_where_no_token_can_lose_more(env: Environment) -> None:
    ids = torch.randint(2, 384, (4, TOKENS), generator=torch.Generator().manual_seed(4))
    every, cut = (
        sampled_values(env, ids, torch.Generator().manual_seed(5), most)[1]
        for most in (math.inf, 1.0)
    )
    assert every.max() > 1.0
    assert torch.equal(cut, every.clamp(max=1.0))


def test_the_same_generator_gives_the_same_samples(env: Environment) -> None:
    ids = torch.randint(2, 384, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    first, again, other = (
        sampled_values(env, ids, torch.Generator().manual_seed(seed))[1] for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_least_deviance_is_at_the_mean_of_the_samples() -> None:
    samples = torch.distributions.Gamma(0.5, 1.0).sample((4096,)) * 1e-3
    mean = samples.mean().log()
    at = {shift: float(gamma_deviance(mean + shift, samples).mean()) for shift in (-0.1, 0.0, 0.1)}
    assert at[0.0] == min(at.values())


def test_values_are_learned_from_the_states_of_their_own_segment() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(8192, 64, generator=generator) for _ in range(2)]
    segments = [slice(0, 2), slice(2, 3), slice(3, 4)]
    samples = torch.ones(8192, 4, 2)  # nats, of two actions
    for layers, part in zip(segments[1:], hidden, strict=True):
        part[:, 1:8] = part[:, :1]  # told by several dimensions, as in a model
        samples[:, layers, 1] = part[:, :1].sign().exp()
    scorer = Scorer(4, 64, 2, (2, 3))
    fit(scorer, segments, hidden, samples, generator)
    for layers, part in zip(segments[1:], hidden, strict=True):
        values = scorer.values(State(layers, part)).detach()[:, 0, 1]
        pair = torch.stack([values.log(), samples[:, layers.start, 1].log()])
        assert torch.corrcoef(pair)[0, 1] > 0.8


def test_noise_is_not_learned_by_heart() -> None:
    """Few samples of much noise, as in training: on others a scorer must not be far worse than a
    constant."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 512, 256, generator=generator)
    samples = torch.randn(2, 512, 2, 2, generator=generator).square()
    scorer = Scorer(2, 256, 2, (1,))
    fit(scorer, [slice(0, 1), slice(1, 2)], [hidden[0]], samples[0], generator)
    told = scorer.values(State(slice(1, 2), hidden[1])).detach()[:, 0, 1].log()
    seen = samples[1, :, 1, 1].clamp(min=1e-9)
    lost = gamma_deviance(told, seen).mean() - gamma_deviance(seen.mean().log(), seen).mean()
    assert lost < 0.3
