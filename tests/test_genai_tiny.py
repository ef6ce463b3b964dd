"""ORT GenAI on the tiny model: shared K/V buffers, and budgets that adapters set."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.policy import ScoredPolicy
from dash_onnx.exporters.fused import PATH, FuseOptions, adapter, fuse
from dash_onnx.runtime.deciders import ScoredDecider

pytestmark = pytest.mark.slow  # quick, but what it needs is installed for the slow tests
og = pytest.importorskip("onnxruntime_genai", reason="needs `make .venv/.bench`")

PROMPT = list(range(20, 33))
TOKENS = 32
ACTIONS = ("full", "int8", "int4", "skip")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("genai") / "out")
    return Bundle(with_scorer(Path(folder)))


@pytest.fixture(scope="module")
def fused(bundle: Bundle) -> Path:
    fuse(bundle, bundle.folder.parent / "fused", FuseOptions(), overwrite=False)
    return bundle.folder.parent / "fused"


@pytest.mark.parametrize("preset", [None, "quality", "balanced", "fast"])
def test_tokens_and_paths_are_those_of_the_runtime(
    bundle: Bundle, fused: Path, preset: str | None
) -> None:
    model = og.Model(str(fused))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(PROMPT) + TOKENS)
    generator = og.Generator(model, params)
    adapters = og.Adapters(model)
    if preset is not None:
        adapters.load(str(fused / adapter(preset)), preset)
        generator.set_active_adapter(adapters, preset)
    generator.append_tokens(np.array(PROMPT, np.int32))
    paths = []
    while not generator.is_done():
        generator.generate_next_token()
        paths.append(tuple(ACTIONS[index] for index in generator.get_output(PATH).tolist()))
    theirs = [int(token) for token in generator.get_sequence(0)[len(PROMPT) :]]

    ours = dash_onnx.load(bundle.folder, threads=1)
    policy, sequence = ours.policy("dash", preset), ours.new_sequence()
    assert isinstance(policy, ScoredPolicy)
    decider = ScoredDecider(sequence, policy.head, policy.multiplier)
    assert isinstance(policy, ScoredPolicy)
    path = ("int8",) * bundle.manifest.model.num_layers
    logits, wanted, taken = sequence.prefill(np.array(PROMPT), path, policy.head), [], []  # type: ignore[arg-type]
    for _ in theirs:
        wanted.append(int(logits.argmax()))
        taken.append(tuple(path))
        logits, path = sequence.forward(wanted[-1], decider)
    assert theirs == wanted
    assert paths == taken
