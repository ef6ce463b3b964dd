"""Sampled values are unbiased: their mean is the second-order KL computed by brute force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dash_onnx.core.bundle import Bundle
from dash_onnx.exporters.train.environment import Environment
from dash_onnx.exporters.train.frozen import Frozen
from dash_onnx.exporters.train.scorer import Scorer
from dash_onnx.exporters.train.values import gamma_deviance, regression_loss, sampled_values

TOKENS = 5
DRAWS = 1500
ACTIONS = ("int8", "int4", "skip")


@pytest.fixture(scope="module")
def env(tiny_folder: Path, night: Path, export_tiny: Callable[..., Path]) -> Environment:
    bundle = Bundle(export_tiny(tiny_folder, calibration=(night,)))
    return Environment(Frozen(bundle, ACTIONS, torch.float32), ACTIONS, 0, "int8", (1, 2))


def from_layer(env: Environment, layer: int, y: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[B, T, V]` when the output of a layer is `y`; the rest at the base."""
    frozen, rotary = env.frozen, env.frozen.rotary(TOKENS)
    for later in range(layer + 1, env.layers):
        normed = frozen.normed(later, y)
        queries, keys_values = frozen.split(later, frozen.qkv(later, ACTIONS[0], normed))
        attention = frozen.attend(later, queries, keys_values, rotary)
        y = frozen.complete(later, ACTIONS[0], y, attention)
    return frozen.logits(frozen.final(y)).double().log_softmax(-1)


def second_order_kl(env: Environment, ids: torch.Tensor) -> torch.Tensor:
    """`[L, T, A]`: half the variance, under p, of how the logits move; summed over all tokens."""
    base = torch.zeros(1, TOKENS, len(ACTIONS))
    base[..., 0] = 1.0
    frozen, rotary = env.frozen, env.frozen.rotary(TOKENS)
    result = torch.zeros(env.layers, TOKENS, len(ACTIONS), dtype=torch.float64)
    x = frozen.embed(ids)
    with torch.no_grad():
        for layer in range(env.layers):
            outputs = env.outputs(layer, x, base, rotary)
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
    _, draws, _ = sampled_values(env, ids.expand(DRAWS, -1), torch.Generator().manual_seed(1))
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
    seen = []
    env.run(ids, lambda state: (seen.append(state), base[:, :, state.layers])[1])
    states, _, final = sampled_values(env, ids, torch.Generator())
    for wanted, state in zip(seen, states, strict=True):
        torch.testing.assert_close(state.hidden, wanted.hidden, rtol=1e-4, atol=1e-4)
        assert state.layers == wanted.layers
    assert torch.equal(final, env.reference(ids, ACTIONS[0]))  # kept in its place


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


def test_the_regression_loss_falls_when_the_scorer_learns_the_values(env: Environment) -> None:
    torch.manual_seed(0)
    scorer = Scorer(env.layers, 64, len(ACTIONS), (1, 2))
    ids = torch.randint(2, 384, (8, TOKENS), generator=torch.Generator().manual_seed(4))
    states, samples, _ = sampled_values(env, ids, torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(scorer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = sum(regression_loss(scorer, state, samples[:, :, state.layers]) for state in states)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1
