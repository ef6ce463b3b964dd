"""All layers `full` equal transformers; GQA, MHA, tied, llama-3 RoPE; prefill and decode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA3_ROPE, logits_of, reference_logits, save_tiny
from transformers import LlamaForCausalLM

import dash_onnx
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.model import Model

CONFIGS: dict[str, dict] = {
    "gqa-untied": {},
    "mha-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "linear-rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    },
    "yarn-rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "wide-head": {"head_dim": 32},
    "epsilon": {"rms_norm_eps": 1e-2},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}
LENGTHS = (1, 2, 37, 200)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    export_tiny: Callable[..., Path],
    night: Path,
) -> tuple[Model, LlamaForCausalLM]:
    overrides = CONFIGS[request.param]
    folder = save_tiny(tmp_path_factory.mktemp("source") / "m", seed=3, **overrides)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dash_onnx.load(export_tiny(folder, calibration=(night,))), reference


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 384, count)


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_equals_transformers(pair: tuple[Model, LlamaForCausalLM], length: int) -> None:
    model, reference = pair
    ids = random_ids(length, length)
    wanted = reference_logits(reference, ids)
    assert np.abs(wanted).max() > 0.5  # the comparison means something
    np.testing.assert_allclose(model.logits(ids, policy="full"), wanted, atol=1e-4)


@pytest.mark.parametrize("prompt", LENGTHS[:-1])
def test_decode_after_prefill_equals_transformers(
    pair: tuple[Model, LlamaForCausalLM], prompt: int
) -> None:
    model, reference = pair
    ids = random_ids(prompt + 12, prompt)
    wanted = reference_logits(reference, ids)[prompt:]
    got = logits_of(model.score(ids, prompt_tokens=prompt, policy="full"))
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_a_prompt_in_chunks_equals_one_in_a_single_run(tiny_model: Model) -> None:
    ids = random_ids(101)
    whole = tiny_model.logits(ids, policy="full")
    sequence = tiny_model.new_sequence()
    chunk = 25  # the last one is a single token
    got = sequence.prefill(ids, ("full",) * 4, "full", every=True, chunk=chunk)
    np.testing.assert_allclose(got, whole, atol=1e-5)
    again = tiny_model.new_sequence().prefill(ids, ("full",) * 4, "full", chunk=chunk)
    np.testing.assert_allclose(again, whole[-1], atol=1e-5)


def test_several_tokens_at_once_have_the_logits_of_each_alone(tiny_model: Model) -> None:
    ids, decider = random_ids(40), FixedPath(("full", "int8", "skip", "int4"), "int8")
    alone, together = tiny_model.new_sequence(), tiny_model.new_sequence()
    wanted = [alone.forward(token, decider)[0].copy() for token in ids.tolist()]
    got = []
    for part in np.split(ids, [1, 4, 9, 39]):  # drafts of several lengths, after one another
        rows, path = together.forward(part, decider, every=True)
        assert rows.shape == (len(part), tiny_model.manifest.model.vocab_size)
        assert path == decider.path
        got.append(rows.copy())
    np.testing.assert_allclose(np.concatenate(got), np.stack(wanted), atol=2e-4)
    assert together.length == alone.length == 40


def test_a_batch_has_the_logits_of_each_sequence_alone(tiny_model: Model) -> None:
    ids, decider = (
        random_ids(3 * 30).reshape(3, 30),
        FixedPath(("full", "int8", "skip", "int4"), "int8"),
    )
    batch = tiny_model.new_sequence(capacity=16, batch=3)  # grows
    got = [
        batch.forward(part, decider, every=True)[0].copy()
        for part in np.split(ids, range(9, 30), -1)
    ]
    last = tiny_model.new_sequence(batch=3).prefill(ids, decider.path, decider.head)
    for row, one in enumerate(ids):
        wanted = tiny_model.new_sequence().prefill(one, decider.path, decider.head, every=True)
        np.testing.assert_allclose(np.concatenate(got, 1)[row], wanted, atol=2e-4)
        np.testing.assert_allclose(last[row], wanted[-1], atol=2e-4)


def test_a_cache_that_grows_keeps_its_content(tiny_model: Model) -> None:
    ids = random_ids(150)
    wanted = tiny_model.logits(ids, policy="full")
    sequence, decider = tiny_model.new_sequence(capacity=16), FixedPath(("full",) * 4, "full")
    got = [sequence.forward(token, decider)[0].copy() for token in ids.tolist()]
    assert sequence.kv.capacity == 256
    np.testing.assert_allclose(np.stack(got), wanted, atol=1e-5)


def test_int8_is_much_nearer_to_the_reference_than_int4(tiny_model: Model) -> None:
    ids = random_ids(64)
    full = tiny_model.logits(ids, policy="full")
    int8, int4 = (
        np.linalg.norm(tiny_model.logits(ids, policy=policy) - full) for policy in ("int8", "int4")
    )
    assert 0 < 8 * int8 < int4  # 16 times more levels
