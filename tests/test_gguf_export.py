from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import tiny_tokenizer
from gguf import GGMLQuantizationType as Kind
from gguf_files import FAMILIES, add_byte_level, tiny_model, write_model

import dash_onnx
from dash_onnx.runtime.engine import Model

IDS = np.random.default_rng(3).integers(2, 300, 30)
TOKENS = 12


def tokens(writer: gguf.GGUFWriter) -> None:
    add_byte_level(writer, tiny_tokenizer(), 384, "gpt-2")


def greedy(model: Model) -> list[int]:
    """What the model writes after a prompt that outgrows the windows."""
    steps = model.generate_step(IDS, policy="full", max_new_tokens=TOKENS, ignore_eos=True)
    return [step.token for step in steps]


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_and_safetensors_of_the_same_weights_give_the_same_tokens(
    family: str, night: Path, tmp_path: Path, export_tiny: Callable[..., Path]
) -> None:
    layers = {"gemma3_text": 6, "smollm3": 4}  # one of them is different
    model = tiny_model(family, num_hidden_layers=layers.get(family, 2))
    model.save_pretrained(tmp_path / "folder")
    tiny_tokenizer().save_pretrained(tmp_path / "folder")
    write_model(tmp_path / "tiny.gguf", model, tokens, Kind.F16)
    options = {"calibration": (night,), "variants": ("full",)}
    ours = dash_onnx.load(export_tiny(tmp_path / "tiny.gguf", **options))
    same = dash_onnx.load(export_tiny(tmp_path / "folder", **options))
    assert greedy(ours) == greedy(same)
    np.testing.assert_allclose(ours.logits(IDS), same.logits(IDS), atol=2e-4)
    assert ours.manifest.model == replace(same.manifest.model, name="tiny")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "granite", "phi3", "qwen2"])
def test_the_integers_of_the_file_are_the_weights_in_their_rows(
    family: str, night: Path, tmp_path: Path, export_tiny: Callable[..., Path]
) -> None:
    model = tiny_model(family, tie_word_embeddings=False, num_hidden_layers=2)
    write_model(tmp_path / "tiny.gguf", model, tokens, Kind.Q4_0)
    options = {"calibration": (night,), "variants": ("full", "int4")}
    bundle = dash_onnx.load(export_tiny(tmp_path / "tiny.gguf", **options))
    full, int4 = (bundle.logits(IDS, policy=policy) for policy in ("full", "int4"))
    assert np.abs(full).max() > 1.0
    np.testing.assert_allclose(int4, full, atol=1e-2)  # `full` rounds to FP16
