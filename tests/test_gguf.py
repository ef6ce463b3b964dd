from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import LLAMA3_ROPE, tiny_tokenizer
from gguf import GGMLQuantizationType as Kind
from gguf_files import FAMILIES, add_byte_level, tiny_model, write_model
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.exporters.sources import Source, open_source
from dash_onnx.exporters.sources.gguf_config import Metadata, config_of

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


def written(
    path: Path,
    model: PreTrainedModel,
    kind: Kind = Kind.F32,
    extras: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> dict[str, torch.Tensor]:
    def add(writer: gguf.GGUFWriter) -> None:
        tokens(writer)
        extras(writer)

    return write_model(path, model, add, kind)


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


def layers_of(path: Path, family: str, add: Callable[[gguf.GGUFWriter], None]) -> list[str]:
    written(path, tiny_model(family, num_hidden_layers=6), extras=add)
    types: list[str] = opened(path).config.layer_types
    return types


def test_windows_are_where_the_file_says(tmp_path: Path) -> None:
    path, slides, sees = tmp_path / "tiny.gguf", "sliding_attention", "full_attention"
    usual = layers_of(path, "gemma3_text", lambda w: None)
    assert usual == [*[slides] * 5, sees]
    period = layers_of(path, "gemma3_text", lambda w: w.add_sliding_window_pattern(3))
    assert period == [slides, slides, sees] * 2
    listed = [True, False, False, True, True, False]
    pattern = layers_of(path, "gemma2", lambda w: w.add_sliding_window_pattern(listed))
    assert pattern == [slides if value else sees for value in listed]
    model = tiny_model("gemma3_text", num_hidden_layers=6, sliding_window=None)
    written(path, model)
    config = opened(path).config
    assert config.layer_types == [sees] * 6 and config.sliding_window is None


def refusal(
    path: Path, family: str, add: Callable[[gguf.GGUFWriter], None], **overrides: Any
) -> str:
    written(path, tiny_model(family, num_hidden_layers=2, **overrides), extras=add)
    with pytest.raises((SourceError, UnsupportedError)) as caught:
        opened(path)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


FACTORS = np.linspace(1.0, 2.0, 8, dtype=np.float32)


@pytest.mark.parametrize(
    ("family", "add", "said"),
    [
        ("llama", lambda w: w.add_expert_count(8), "mixtures of experts"),
        ("llama", lambda w: w.add_uint16("split.count", 3), "llama-gguf-split"),
        ("llama", lambda w: w.add_string("llama.rope.scaling.type", "ntk"), "'ntk'"),
        ("llama", lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "rope_factors"),
        ("llama", lambda w: w.add_tensor("rope_freqs.weight", FACTORS[:5]), "are not 8"),
        ("granite", lambda w: w.add_rope_scaling_finetuned(False), "no position embedding"),
        ("olmo2", lambda w: w.add_sliding_window(16), "OLMo 3"),
    ],
    ids=["experts", "split", "scaling", "longrope", "factors", "granite", "olmo3"],
)
def test_what_the_file_asks_for_and_nobody_has_is_refused(
    family: str, add: Callable[[gguf.GGUFWriter], None], said: str, tmp_path: Path
) -> None:
    assert said in refusal(tmp_path / "tiny.gguf", family, add)


def test_two_scalings_at_once_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    add = lambda w: w.add_tensor("rope_freqs.weight", FACTORS)  # noqa: E731
    assert "at once" in refusal(tmp_path / "t.gguf", "llama", add, rope_parameters=rope)


def test_layers_of_different_sizes_and_missing_keys_are_refused() -> None:
    sizes = {"llama.feed_forward_length": [96, 64]}
    with pytest.raises(UnsupportedError, match="differs from layer to layer"):
        Metadata("llama", sizes)["feed_forward_length"]
    assert Metadata("llama", {"llama.head_count": [4, 4]})["head_count"] == 4
    with pytest.raises(SourceError, match=r"llama\.embedding_length"):
        config_of("llama", {"llama.attention.head_count": 4}, {"token_embd.weight": None})


def test_the_largest_gemmas_scale_attention_by_the_share_of_a_head() -> None:
    for family, layers in (("gemma2", 46), ("gemma3", 62)):
        values = {
            f"{family}.{key}": value
            for key, value in {
                "attention.head_count": 32,
                "attention.key_length": 128,
                "attention.layer_norm_rms_epsilon": 1e-6,
                "block_count": layers,
                "context_length": 8192,
                "embedding_length": 4608,
                "feed_forward_length": 64,
            }.items()
        }
        tensors = {"token_embd.weight": SimpleNamespace(shape=(4608, 384))}
        assert config_of(family, values, tensors).query_pre_attn_scalar == 144
        values[f"{family}.block_count"] = 26
        assert config_of(family, values, tensors).query_pre_attn_scalar == 128
