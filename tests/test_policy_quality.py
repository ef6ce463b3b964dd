"""The claim of the policy, on the demo model: better decisions at the same cost."""

from __future__ import annotations

import itertools
import runpy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dash_onnx
from dash_onnx.core.budget import reference_ms
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.core.policy import Policy
from dash_onnx.core.recost import with_costs
from dash_onnx.eval.text import Evaluation, evaluate_policies
from dash_onnx.runtime.model import Model

skipping = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/policies.py"))["skipping"]

pytestmark = [pytest.mark.slow, pytest.mark.demo]


@pytest.fixture(scope="module")
def model(trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The demo bundle as if a path ran layer by layer, as decisions do.

    What one graph saves a path is a fact of the machine, which presets weigh; the claim is about
    the decisions.
    """
    bundle = Path(shutil.copytree(trained_bundle, tmp_path_factory.mktemp("demo") / "out"))
    manifest = Bundle(bundle).manifest
    replace_manifest(bundle, with_costs(manifest, replace(manifest.costs, join_ms=0.0)))
    return dash_onnx.load(bundle)


@pytest.fixture(scope="module")
def text(model: Model) -> str:
    """Text that the model writes at its best, with a seed that training did not use."""
    rng = np.random.default_rng(99)
    parts = []
    for _ in range(5):
        start = [int(rng.integers(100, 40000))]
        steps = model.generate_step(
            start, policy="int8", max_new_tokens=290, ignore_eos=True, temperature=1.0, seed=5
        )
        parts.append(model.text.decode([*start, *(step.token for step in steps)]))
    return "\n\n".join(parts)


def quality(model: Model, text: str, policies: Sequence[Policy]) -> list[Evaluation]:
    """Of each policy, beside one reference for all."""
    return evaluate_policies(
        model, text, policies, window=256, prompt_tokens=64, max_windows=5, timed=False
    )


@pytest.fixture(scope="module")
def at_presets(model: Model, text: str) -> dict[float, Evaluation]:
    """By budget, in ascending order."""
    assert model.manifest.scorer is not None
    budgets = sorted(model.manifest.scorer.presets.values())
    found = quality(model, text, [model.policy("dash", budget) for budget in budgets])
    return dict(zip(budgets, found, strict=True))


def skipping_budget(model: Model) -> float:
    """A tenth of the layers' time below all INT4 with the cheapest head: layers must be skipped.

    Nearer to all INT4, where every layer is cheap and none is bad, nothing is gained. Where skips
    save little, by the profile of this machine, the static search may end before that.
    """
    manifest, scorer = model.manifest, model.manifest.scorer
    assert scorer is not None
    costs, path = manifest.costs, ("int4",) * manifest.model.num_layers
    layers = sum(layer["int4"] for layer in costs.layers_ms)
    int4 = min(costs.token_ms(path, head) for head in manifest.exported_heads)
    wanted = (int4 - 0.1 * layers) / reference_ms(manifest)
    return max(wanted, min(point.budget for point in scorer.static))


def test_the_policy_beats_static_random_and_even_skipping_at_the_same_cost(
    model: Model, text: str
) -> None:
    budget = skipping_budget(model)
    policies = [model.policy(name, budget) for name in ("dash", "static", "random")]
    policies += [skipping(model.manifest, order, budget) for order in ("even", "cosine")]
    ours, *others = quality(model, text, policies)
    assert ours.actions["skip"] > 0.05, ours
    for other in others:
        assert ours.kl < other.kl, (ours, other)
        assert ours.cost_ms <= 1.05 * other.cost_ms, (ours, other)


def test_the_controller_holds_the_budget(model: Model, at_presets: dict[float, Evaluation]) -> None:
    full_ms = reference_ms(model.manifest)
    for budget, found in at_presets.items():
        spent = found.cost_ms / full_ms
        assert abs(spent / budget - 1) <= 0.05, (budget, spent)


def test_more_budget_never_makes_it_much_worse(at_presets: dict[float, Evaluation]) -> None:
    losses = [found.kl for found in at_presets.values()]
    assert all(after <= 1.1 * before for before, after in itertools.pairwise(losses))
