"""ORT GenAI runs the fused graph of the demo model as it is, and finds the same tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.exporters.fused import FuseOptions, fuse
from dash_onnx.runtime.deciders import ScoredDecider

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "build/demo/bundle"
QUESTIONS = (
    "What is the capital of France?",
    "Name three animals of the sea.",
    "Why is the sky blue?",
    "Write one sentence about a lighthouse.",
)
TOKENS = 32

pytestmark = [pytest.mark.slow, pytest.mark.demo]
og = pytest.importorskip("onnxruntime_genai", reason="needs `make .venv/.bench`")


@pytest.fixture(scope="module", params=["int8", "int4", "dash"])
def policy(request: pytest.FixtureRequest) -> str:
    if not (TRAINED / "dash.json").is_file():
        pytest.skip("no trained demo bundle: run `make demo`")
    return str(request.param)


@pytest.fixture(scope="module")
def fused(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / policy
    fuse(Bundle(TRAINED), folder, FuseOptions("genai", policy), overwrite=False)
    return folder


def theirs(folder: Path, ids: list[int]) -> list[int]:
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(ids) + TOKENS)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def ours(model: dash_onnx.Model, ids: list[int], policy: str) -> list[int]:
    """On the multiplier that the graph has: without the controller, prompts at the best branch."""
    chosen = model.policy(policy)
    if policy != "dash":
        steps = model.generate_step(ids, policy=policy, prefill=policy, max_new_tokens=TOKENS)
        return [step.token for step in steps]
    sequence = model.new_sequence()
    path = ("int8",) * model.manifest.model.num_layers
    logits = sequence.prefill(np.array(ids), path, chosen.head)
    decider = ScoredDecider(sequence, chosen.head, chosen.multiplier)  # type: ignore[attr-defined]
    found: list[int] = []
    while True:
        token = int(logits.argmax())
        found.append(token)
        if token in model.text.eos_token_ids or len(found) == TOKENS:
            return found
        logits, _ = sequence.forward(token, decider)


def test_greedy_tokens_are_those_of_our_runtime(fused: Path, policy: str) -> None:
    model = dash_onnx.load(TRAINED, threads=1)
    equal = total = 0
    for question in QUESTIONS:
        ids = model.text.encode_chat([{"role": "user", "content": question}]).tolist()
        a, b = ours(model, ids, policy), theirs(fused, ids)
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
        equal, total = equal + same, total + len(a)
    # Sums in another order may turn a near-tie, after which the texts differ.
    assert equal >= 0.9 * total, (equal, total)


def test_the_example_answers(fused: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/genai.py"), str(fused), QUESTIONS[0]]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
