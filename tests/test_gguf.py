from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import LLAMA3_ROPE, tiny_tokenizer
from gguf import GGMLQuantizationType as Kind
from gguf_files import FAMILIES, add_byte_level, tiny_model, write_model
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dash_onnx.errors import SourceError, UnsupportedError
from dash_onnx.exporters.sources import Source, open_source

SUPPORTED = set(FAMILIES)
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tokens(writer: gguf.GGUFWriter) -> None:
    add_byte_level(writer, tiny_tokenizer(), 384, "gpt-2")


def written(path: Path, model: PreTrainedModel, kind: Kind = Kind.F32) -> dict[str, torch.Tensor]:
    return write_model(path, model, tokens, kind)


def opened(path: Path) -> Source:
    return open_source(str(path), SUPPORTED)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_has_the_config_it_was_made_of(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    written(tmp_path / "tiny.gguf", model)
    ours, wanted = opened(tmp_path / "tiny.gguf").config.to_dict(), model.config.to_dict()
    for key in ("initializer_range", "dtype", "architectures", "_sliding_window_pattern"):
        ours.pop(key, None), wanted.pop(key, None)  # no part of what the model computes
    assert ours.keys() == wanted.keys()
    for key, value in wanted.items():
        assert ours[key] == nearly(value), key


def nearly(value: Any) -> Any:
    """Equal but for the 24 bits of GGUF's numbers."""
    if isinstance(value, dict):
        return {key: nearly(part) for key, part in value.items()}
    numbers = isinstance(value, list) and all(isinstance(part, float) for part in value)
    return pytest.approx(value) if isinstance(value, float) or numbers else value


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_has_the_weights_it_was_made_of(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    wanted = written(tmp_path / "tiny.gguf", model)
    weights = opened(tmp_path / "tiny.gguf").weights
    state = model.state_dict()
    assert len(wanted) >= len(state) - 1  # all but a head that is the embedding
    for name, value in wanted.items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=3e-7)  # 1 + w of Gemma's norms
        assert name in weights
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0)
    assert "model.layers.0.mlp.absent.weight" not in weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_every_tensor_type_keeps_its_values_and_their_rows(
    family: str, kind: Kind, tmp_path: Path
) -> None:
    wanted = written(tmp_path / "tiny.gguf", tiny_model(family), kind)
    weights = opened(tmp_path / "tiny.gguf").weights
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", LLAMA3_ROPE),
        ("llama", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        ("mistral", YARN),
        ("qwen2", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.2}),
        ("granite", LLAMA3_ROPE),
    ],
    ids=["llama3", "linear", "yarn", "yarn-own-factors", "granite-llama3"],
)
def test_rope_scaling_gives_the_same_frequencies(
    family: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(family, rope_parameters=dict(rope))
    written(tmp_path / "tiny.gguf", model)
    config = opened(tmp_path / "tiny.gguf").config
    for length in (64, 256):
        ours = rope_of(config, length)
        wanted = rope_of(model.config, length)
        torch.testing.assert_close(ours[0], wanted[0], rtol=1e-6, atol=0)
        assert ours[1] == pytest.approx(wanted[1])
    assert ours[0].min() < 10000.0 ** -(14 / 16) / 3.9  # they are scaled


def rope_of(config: Any, length: int) -> tuple[torch.Tensor, float]:
    kind = config.rope_parameters["rope_type"]
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=length)
    return frequencies, scaling
