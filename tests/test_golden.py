"""What a bundle of fixed seeds computes: a change that was to change none of it shows here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.runtime.model import Model

PROMPT = [5, 6, 7, 8, 9]
LETTERS = {"full": "f", "int8": "8", "int4": "4", "skip": "-"}
LOGITS = {
    "full": [-0.3534, -0.7539, 1.0186, 1.4528],
    "int8": [-0.3839, -0.7926, 0.9827, 1.5098],
    "int4": [0.6137, -1.2496, 0.3816, 1.5777],
}
"""The first four after the prompt."""
SCORED = {
    0.35: (
        [287, 138, 125, 161, 238, 158, 77, 4],
        ["ffff", "4444", "4444", "4-4-", "4444", "4444", "4444", "4444"],
    ),
    0.8: ([287, 138, 271, 92, 351, 250, 44, 98], ["ffff", *["8888"] * 7]),
}
"""Tokens and paths by budget, of a scorer with random weights."""
TOKENS = {
    "full": [287, 138, 271, 92, 351, 250, 44, 98],
    "int8": [133, 98, 283, 188, 293, 280, 201, 280],
    "int4": [119, 183, 279, 184, 126, 267, 137, 267],
}


@pytest.fixture(scope="module")
def model(tiny_with: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("golden") / "out"
    return dash_onnx.load(with_scorer(Path(shutil.copytree(tiny_with(), folder))))


def generated(model: Model, **options: Any) -> tuple[list[int], list[str]]:
    steps = list(model.generate_step(PROMPT, max_new_tokens=8, ignore_eos=True, **options))
    paths = ["".join(LETTERS[action] for action in step.path) for step in steps]
    return [step.token for step in steps], paths


@pytest.mark.parametrize("precision", LOGITS)
def test_logits_and_tokens_of_a_precision(precision: str, model: Model) -> None:
    found = model.logits(PROMPT, policy=precision)[-1, :4]
    # On another processor GPTQ may round a weight the other way.
    atol = 0.02 if precision == "int4" else 2e-3
    np.testing.assert_allclose(found, LOGITS[precision], atol=atol)
    tokens, paths = generated(model, policy=precision)
    assert tokens == TOKENS[precision]
    assert set(paths) == {4 * LETTERS[precision]}


@pytest.mark.parametrize("budget", SCORED)
def test_tokens_and_paths_of_a_scored_policy(budget: float, model: Model) -> None:
    assert generated(model, policy="dash", budget=budget) == SCORED[budget]
