"""Layers that take one action for all tokens at a budget, in a plan that decides the others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.core.actions import Action, each_alone
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.core.errors import BundleError
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import ScoredPolicy
from dash_onnx.runtime.deciders import ScoredDecider
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.results import Chunk

LAYERS = 4
INT8: tuple[Action, ...] = ("int8",) * LAYERS
PROMPT = "the keeper counts the ships"


@pytest.fixture(scope="module")
def partly(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scorer reads the input of the first layer; of the other three, two are fixed."""
    folder = tmp_path_factory.mktemp("partly") / "out"
    with_scorer(Path(shutil.copytree(tiny_bundle, folder)), (1,))
    manifest = Bundle(folder).manifest
    assert manifest.scorer is not None
    fixed: tuple[Action | None, ...] = ("int8", None, "int4", "int4")
    points = tuple(replace(point, fixed=fixed) for point in manifest.scorer.points)
    replace_manifest(folder, replace(manifest, scorer=replace(manifest.scorer, points=points)))
    return folder


def test_a_plan_has_a_group_of_fixed_layers_beside_dispatched_ones(partly: Path) -> None:
    """It computes what the same actions do layer by layer, and takes no more memory."""
    found, tokens = [], (5, 9, 300, 7, 44, 120, 12, 260)
    for whole in (True, False):
        with dash_onnx.load(partly, policy="dash", memory="low") as model:
            policy, sequence = model.policy(), model.new_sequence()
            assert isinstance(policy, ScoredPolicy)
            assert model.policy().groups(LAYERS) == ((0, 1), (1, 2), (2, 4))
            groups = policy.groups(LAYERS) if whole else each_alone(LAYERS)
            used = policy.used(LAYERS, model.manifest.actions)
            sequence.prefill(model.text.encode(PROMPT), INT8, "int8", groups=groups)
            deciders = [
                ScoredDecider(sequence, "int8", float(multiplier), None, used, groups)
                for multiplier in np.geomspace(1e-3, 10, 9)
            ]
            passes = [sequence.forward(token, d) for d in deciders for token in tokens]
            found.append(([path for _, path in passes], passes[-1][0].copy(), model.loaded_bytes))
    (paths, logits, some_bytes), (others, wanted, all_bytes) = found
    assert paths == others and len({path[1] for path in paths}) > 1
    assert {(path[0], *path[2:]) for path in paths} == {("int8", "int4", "int4")}
    np.testing.assert_array_equal(logits, wanted)
    assert some_bytes == all_bytes


def test_a_partly_fixed_plan_runs_alone_in_batches_and_beside_others(partly: Path) -> None:
    options = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    with dash_onnx.load(partly, policy="dash", memory="low") as model:
        expected = model.bytes_to_load()
        model.preload(model.policy())
        assert model.loaded_bytes == expected
        alone = [model.generate(prompt, **options) for prompt in (PROMPT, "a ship")]
        assert model.loaded_bytes == expected and model.bytes_to_load() == 0
        assert {(2, 4)} <= {(run.start, run.stop) for run, _ in model._sessions._joined}
        together = model.batch([PROMPT, "a ship"], options=GenerationOptions(**options))  # type: ignore[arg-type]
        assert [str(one) for one in together] == alone and model.loaded_bytes == expected
    with dash_onnx.load(partly, policy="int8", memory="low") as model:
        scheduler, told = model.new_scheduler(2), {"dash": list[Chunk](), "int8": list[Chunk]()}
        for name, pieces in told.items():
            chosen = GenerationOptions(policy=name, **options)  # type: ignore[arg-type]
            scheduler.submit(model.request(PROMPT, lambda p, to=pieces: to.append(p), chosen))
        while scheduler.step():
            pass
        assert "".join(chunk.text for chunk in told["dash"]) == alone[0]


def test_fixed_layers_cost_less_and_old_tables_fix_none(partly: Path) -> None:
    manifest = Bundle(partly).manifest
    assert manifest.scorer is not None
    plain = tuple(replace(point, fixed=()) for point in manifest.scorer.points)
    plain_facts = replace(manifest.scorer, points=plain)
    costs, path = replace(manifest.costs, join_ms=0.02), ("int8", "skip", "int4", "int4")
    found = []
    for scorer in (manifest.scorer, plain_facts):
        policy = ScoredPolicy(replace(manifest, scorer=scorer))
        controller = policy.controller()
        assert controller.multiplier == policy.multiplier
        found.append((policy.cost_ms(path, costs), len(policy.groups(LAYERS)), policy.fixed))
    (ms, graphs, fixed), (plain_ms, every, none) = found
    assert ms == pytest.approx(plain_ms - 0.02) and (graphs, every) == (3, 4)
    assert fixed == ("int8", None, "int4", "int4") and none == (None,) * LAYERS
    text = manifest.to_text()
    assert Manifest.from_text(text) == manifest
    data = json.loads(text)
    for point in data["scorer"]["points"]:
        del point["fixed"]
    assert Manifest.from_text(json.dumps(data)) == replace(manifest, scorer=plain_facts)
    data["scorer"]["points"][0]["fixed"] = ["int4"]
    with pytest.raises(BundleError, match="fixes actions that do not fit the layers"):
        Manifest.from_text(json.dumps(data))
