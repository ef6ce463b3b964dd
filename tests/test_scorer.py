"""The scorer in training: how it decides, with noise and without."""

from __future__ import annotations

import math

import pytest
import torch

from dash_onnx.exporters.train.environment import State
from dash_onnx.exporters.train.improve import probabilities
from dash_onnx.exporters.train.scorer import Scorer

LAYERS = 4
ALLOWED = torch.tensor([[2.0, 1.0, math.inf], *[[2.0, 1.0, 0.2]] * (LAYERS - 1)])
"""Costs of INT8, INT4 and skip in each layer."""


@pytest.fixture
def indifferent() -> Scorer:
    """A scorer to which all actions cost nothing."""
    scorer = Scorer(LAYERS, 64, 3, (2, 3))
    with torch.no_grad():
        scorer.expand.zero_()
        scorer.bias.fill_(-100.0)
    return scorer


def test_training_never_skips_the_first_layer(indifferent: Scorer) -> None:
    state = State(slice(0, 2), torch.randn(64, 1024, 64))
    p = probabilities(indifferent, ALLOWED, state, torch.zeros(64, 1), 0.7).detach()
    torch.testing.assert_close(p.sum(-1), torch.ones(64, 1024, 2))
    assert float(p[:, :, 0, 2].max()) < 1e-30
    taken = (indifferent.values(state) + ALLOWED[state.layers]).argmin(-1)
    assert (taken == torch.tensor([1, 2])).all()  # the cheapest that is allowed


def test_training_draws_every_action_of_the_other_layers(indifferent: Scorer) -> None:
    with torch.no_grad():
        indifferent.bias.fill_(math.log(0.9))  # as dear as the time they save
    state = State(slice(2, 3), torch.randn(4, 1024, 64))
    p = probabilities(indifferent, ALLOWED, state, torch.zeros(4, 1), 0.7)
    assert (p.detach().mean((0, 1, 2)) > 0.05).all()
    (p[..., 2].sum()).backward()
    assert indifferent.bias.grad is not None
    assert (indifferent.bias.grad[2] < 0).all()  # dearer increments make a skip rarer


def test_without_noise_training_decides_as_the_runtime_does(indifferent: Scorer) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        indifferent.expand.normal_(0, 0.3, generator=generator)
        indifferent.bias.fill_(-0.5)
    log_multipliers = torch.linspace(-2, 2, 8)[:, None]
    for layers in (slice(0, 2), slice(2, 3), slice(3, LAYERS)):
        state = State(layers, torch.randn(8, 64, 64, generator=generator))
        cold = probabilities(indifferent, ALLOWED, state, log_multipliers, 1e-6)
        penalty = log_multipliers.exp()[..., None, None] * ALLOWED[layers]
        wanted = (indifferent.values(state) + penalty).argmin(-1)
        assert torch.equal(cold.argmax(-1), wanted)
        assert len(wanted[:, :, -1].unique()) > 1
