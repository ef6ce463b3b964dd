"""GGUF files: config, weights and integers as they were written, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import LLAMA3_ROPE, reference_logits, refusal_of, tiny_tokenizer
from gguf import GGMLQuantizationType as Kind
from gguf_files import ARCHITECTURES, write_model
from gguf_models import FAMILIES, tiny_model
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import dash_onnx
from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.exporters.architectures import REGISTRY, architecture_of
from dash_onnx.exporters.calibration.reference import streamed_model
from dash_onnx.exporters.calibration.tokens import sequences_of
from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.export.suited import suited
from dash_onnx.exporters.sources import Source, open_source
from dash_onnx.exporters.sources.gguf_config import config_of
from dash_onnx.exporters.sources.gguf_metadata import Metadata
from dash_onnx.exporters.sources.gguf_rope import proportional
from dash_onnx.runtime.model import Model

SUPPORTED = set(FAMILIES)
IDS = np.random.default_rng(3).integers(2, 300, 30)
TOKENS = 12
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def opened(path: Path) -> Source:
    return open_source(str(path), SUPPORTED)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_has_the_config_it_was_made_of(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    write_model(tmp_path / "tiny.gguf", model)
    ours, wanted = opened(tmp_path / "tiny.gguf").config.to_dict(), model.config.to_dict()
    for key in ("initializer_range", "dtype", "architectures", "_sliding_window_pattern"):
        ours.pop(key, None), wanted.pop(key, None)  # no part of what the model computes
    assert ours.keys() == wanted.keys()
    for key, value in wanted.items():
        assert ours[key] == nearly(value), key


def test_a_name_that_is_not_utf8_can_be_written(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xfcr.gguf"))
    write_model(tmp_path / "tiny.gguf", tiny_model("llama"))
    (tmp_path / "tiny.gguf").rename(path)
    assert opened(path).name == "f\\udcfcr"


def nearly(value: Any) -> Any:
    """Equal but for the 24 bits of GGUF's numbers."""
    if isinstance(value, dict):
        return {key: nearly(part) for key, part in value.items()}
    numbers = isinstance(value, list) and all(isinstance(part, float) for part in value)
    return pytest.approx(value) if isinstance(value, float) or numbers else value


def test_a_model_in_parts_is_opened_by_any_of_them(tmp_path: Path) -> None:
    wanted = write_model(tmp_path / "tiny.gguf", tiny_model("llama"), tensors_a_file=15)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for part in parts:
        source = opened(part)
        assert source.name == "tiny" and source.files == tuple(parts)
        for name, value in wanted.items():
            assert torch.equal(source.weights[name], value)
    parts[1].rename(tmp_path / "other.gguf")
    with pytest.raises(SourceError, match=r"tiny-00002-of-00003.gguf is missing: .* 3 parts"):
        opened(parts[0])
    parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(SourceError, match="one of 3 parts by its content"):
        opened(tmp_path / "alone.gguf")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_has_the_weights_it_was_made_of(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    wanted = write_model(tmp_path / "tiny.gguf", model)
    weights = opened(tmp_path / "tiny.gguf").weights
    state = model.state_dict()
    assert len(wanted) >= len(state) - 1  # all but a head that is the embedding
    for name, value in wanted.items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=3e-7)  # 1 + w of Gemma's norms
        assert name in weights
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0)
    assert "model.layers.0.mlp.absent.weight" not in weights
    assert weights.unread("model.layers.0.") == []


def with_sections(writer: gguf.GGUFWriter) -> None:
    """How frequencies are split among the three positions of a part of an image."""
    writer.add_rope_dimension_sections([4, 2, 2, 0])


@pytest.mark.parametrize(("family", "name"), [("qwen2", "qwen2vl"), ("qwen3", "qwen3vl")])
def test_the_text_part_of_a_model_for_images_is_that_of_its_family(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, family, name)
    model = tiny_model(family)
    wanted = write_model(tmp_path / "tiny.gguf", model, with_sections)
    source = opened(tmp_path / "tiny.gguf")
    assert source.config.model_type == family
    assert source.config.rope_parameters == nearly(model.config.rope_parameters)
    for tensor, value in wanted.items():
        assert torch.equal(source.weights[tensor], value)


def test_a_glm_for_images_is_refused(tmp_path: Path) -> None:
    """llama.cpp's converter stores its rows of Q and K in another order."""
    write_model(tmp_path / "tiny.gguf", tiny_model("glm4"), with_sections)
    assert "GLM-4 model for images is not read from GGUF" in refusal(tmp_path / "tiny.gguf")


def test_an_architecture_that_is_read_only_from_folders_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "llama", "seed_oss")
    write_model(tmp_path / "tiny.gguf", tiny_model("llama"))
    message = refusal(tmp_path / "tiny.gguf")
    assert "architecture 'seed_oss' is not read from GGUF; those read are apertus, " in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_every_tensor_type_keeps_its_values_and_their_rows(
    family: str, kind: Kind, tmp_path: Path
) -> None:
    wanted = write_model(tmp_path / "tiny.gguf", tiny_model(family), kind=kind)
    weights = opened(tmp_path / "tiny.gguf").weights
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_5_text"])
def test_integers_stand_for_the_weights_in_their_rows_and_columns(
    family: str, tmp_path: Path
) -> None:
    wanted = write_model(tmp_path / "tiny.gguf", tiny_model(family), kind=Kind.Q8_0)
    weights, found = opened(tmp_path / "tiny.gguf").weights, 0
    for name, value in wanted.items():
        packed = weights.packed(name)
        assert packed is not None or value.dim() != 2 or "layers" not in name, name
        if packed is not None:
            levels = packed.values.astype(np.float32) - 128
            floats = (levels * packed.scales[..., None]).reshape(packed.shape)
            np.testing.assert_array_equal(floats, value.numpy())
            found += ".layers." in name
    assert found >= 4 * 3  # matrices of a layer


def test_heads_that_cut_blocks_are_rounded_again(tmp_path: Path) -> None:
    write_model(
        tmp_path / "tiny.gguf",
        tiny_model("qwen3_5_text", linear_value_head_dim=16),
        kind=Kind.Q8_0,
    )
    weights, prefix = opened(tmp_path / "tiny.gguf").weights, "model.layers.0.linear_attn"
    assert weights.packed(f"{prefix}.out_proj.weight") is None
    assert weights.packed(f"{prefix}.in_proj_qkv.weight") is not None


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("gpt_oss", Kind.MXFP4),
        ("lfm2_moe", Kind.Q8_0),
        ("qwen3_moe", Kind.Q4_0),
        ("qwen2_moe", Kind.Q8_0),
    ],
)
def test_quantized_experts_keep_their_values(family: str, kind: Kind, tmp_path: Path) -> None:
    wanted = write_model(tmp_path / "tiny.gguf", tiny_model(family), kind=kind)
    weights, found = opened(tmp_path / "tiny.gguf").weights, 0
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0)
        assert weights.shape(name) == tuple(value.shape)
        found += ".experts." in name
    assert found >= 2 * 2


def test_a_tensor_may_have_a_scale_of_its_own(tmp_path: Path) -> None:
    """As those in NVFP4 and those of BitNet that are packed."""
    model, name = tiny_model("bitnet"), "model.layers.1.mlp.up_proj.weight"

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.1.ffn_up.scale", np.array([0.25], np.float32))

    wanted = write_model(tmp_path / "tiny.gguf", model, add, kind=Kind.Q8_0)
    weights = opened(tmp_path / "tiny.gguf").weights
    assert torch.equal(weights[name], 0.25 * wanted[name]) and weights.packed(name) is None
    other = name.replace("up_proj", "gate_proj")
    assert torch.equal(weights[other], wanted[other]) and weights.packed(other) is not None


def test_an_older_file_of_qwen_2_moe_says_less(tmp_path: Path) -> None:
    """Neither widths of experts, nor that the gate of the shared one is a matrix."""
    model = tiny_model("qwen2_moe", intermediate_size=128, shared_expert_intermediate_size=128)
    gate = "model.layers.0.mlp.shared_expert_gate.weight"

    def add(writer: gguf.GGUFWriter) -> None:
        for key in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
            del writer.kv_data[0][f"qwen2moe.{key}"]
        flat = model.state_dict()[gate][0].numpy()
        writer.add_tensor("blk.0.ffn_gate_inp_shexp.weight", flat)

    left_out = "blk.0.ffn_gate_inp_shexp.weight"
    write_model(tmp_path / "tiny.gguf", model, add, without=left_out)
    source = opened(tmp_path / "tiny.gguf")
    assert source.config.moe_intermediate_size == 64
    assert source.config.shared_expert_intermediate_size == 128
    assert torch.equal(source.weights[gate], model.state_dict()[gate])
    assert source.weights.shape(gate) == (1, 64)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", LLAMA3_ROPE),
        ("llama", LINEAR),
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
    write_model(tmp_path / "tiny.gguf", model)
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
    write_model(path, tiny_model(family, num_hidden_layers=6), add)
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
    write_model(path, model)
    config = opened(path).config
    assert config.layer_types == [sees] * 6 and config.sliding_window is None


def refusal(path: Path) -> str:
    return refusal_of((SourceError, UnsupportedError), lambda: opened(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A readable file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(path, tiny_model("llama", num_hidden_layers=2))
    return path.read_bytes()


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"not a model" * 100, b"GGUF" * 100])
def test_a_file_that_only_claims_to_be_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert "is not a GGUF file, or incomplete" in refusal(tmp_path / "model.gguf")


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.05, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(whole: bytes, tmp_path: Path, share: float) -> None:
    (tmp_path / "model.gguf").write_bytes(whole[: int(len(whole) * share)])
    assert "is not a GGUF file, or incomplete" in refusal(tmp_path / "model.gguf")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    model = tiny_model("qwen3_5_text")

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("qwen35.nextn_predict_layers", 1)
        writer.add_uint32("qwen35.block_count", 4)
        del writer.kv_data[0]["qwen35.attention.recurrent_layers"]
        writer.add_array("qwen35.attention.recurrent_layers", [True, False, True, False])
        writer.add_tensor("blk.3.attn_norm.weight", np.ones(64, np.float32))

    write_model(tmp_path / "tiny.gguf", model, add)
    source = opened(tmp_path / "tiny.gguf")
    config, name = source.config, "model.layers.2.mlp.up_proj.weight"
    assert config.num_hidden_layers == 3 and config.layer_types == model.config.layer_types
    torch.testing.assert_close(source.weights[name], model.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("interval", [3, 4])
def test_a_file_that_names_no_layers_says_how_often_one_attends(
    interval: int, tmp_path: Path
) -> None:
    types = [*["linear_attention"] * (interval - 1), "full_attention"] * 2
    model = tiny_model("qwen3_5_text", num_hidden_layers=2 * interval, layer_types=types)
    add = {3: lambda writer: writer.add_full_attention_interval(3), 4: lambda writer: None}
    write_model(tmp_path / "tiny.gguf", model, add[interval])
    data = (tmp_path / "tiny.gguf").read_bytes()
    name = b"qwen35.attention.recurrent_layers"
    assert data.count(name) == 1
    (tmp_path / "tiny.gguf").write_bytes(data.replace(name, name[::-1]))
    assert opened(tmp_path / "tiny.gguf").config.layer_types == types


def test_the_check_takes_a_bias_that_the_file_lacks_as_zero(tmp_path: Path) -> None:
    model: Any = tiny_model("llama", attention_bias=True)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.bias.zero_()
    write_model(tmp_path / "tiny.gguf", model, without="blk.1.attn_output.bias")
    found = streamed_model(opened(tmp_path / "tiny.gguf"))(torch.from_numpy(IDS)[None]).logits
    torch.testing.assert_close(found, model(torch.from_numpy(IDS)[None]).logits)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path, model = tmp_path / "model.gguf", tiny_model("llama", num_hidden_layers=2)
    assert "model.gguf" in refusal(path)
    write_model(path, model, tokenizer=lambda writer: None)
    assert "tokenizer" in refusal(path)
    write_model(path, model, without="blk.1.ffn_up.weight")
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj"):
        opened(path).weights["model.layers.1.mlp.up_proj.weight"]
    write_model(path, model, without="token_embd.weight")
    assert "token_embd.weight" in refusal(path)


def test_another_architecture_is_refused_and_the_known_ones_are_listed(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = refusal(tmp_path / "model.gguf")
    assert "mamba" in message and "llama" in message


FACTORS = np.linspace(1.0, 2.0, 8, dtype=np.float32)


@pytest.mark.parametrize(
    ("family", "add", "said"),
    [
        ("llama", lambda w: w.add_expert_count(8), "mixtures of experts"),
        ("llama", lambda w: w.add_string("llama.rope.scaling.type", "ntk"), "'ntk'"),
        ("llama", lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "rope_factors"),
        ("llama", lambda w: w.add_tensor("rope_freqs.weight", FACTORS[:5]), "are not 8"),
        ("linear", lambda w: w.add_tensor("rope_freqs.weight", FACTORS), "at once"),
        ("granite", lambda w: w.add_rope_scaling_finetuned(False), "no position embedding"),
        ("llama", lambda w: w.add_causal_attention(False), "not a causal model"),
        ("llama", lambda w: w.add_float32("llama.rope.scaling.alpha", 2.0), "alpha"),
        ("granitemoe", lambda w: w.add_expert_shared_feed_forward_length(96), "a shared expert"),
    ],
    ids="experts scaling longrope factors two-scalings granite causal alpha shared".split(),
)
def test_what_the_file_asks_for_and_nobody_has_is_refused(
    family: str, add: Callable[[gguf.GGUFWriter], None], said: str, tmp_path: Path
) -> None:
    if family == "linear":
        model = tiny_model("llama", num_hidden_layers=2, rope_parameters=LINEAR)
    else:
        model = tiny_model(family, num_hidden_layers=2)
    write_model(tmp_path / "tiny.gguf", model, add)
    assert said in refusal(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda w: w.add_feed_forward_length([96, 96, 96, 192]), "feed_forward_length"),
        (lambda w: w.add_feed_forward_length([96, 96]), "has 2 values for 4 layers"),
        (lambda w: w.add_head_count_kv([2, 2, 1, 2]), "does not go by windows"),
        (lambda w: w.add_rope_scaling_factor(2.0), "at once"),
    ],
)
def test_sizes_of_gemma_4_that_its_config_does_not_have_are_refused(
    add: Callable[[gguf.GGUFWriter], None], said: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "tiny.gguf", tiny_model("gemma4_text"), add)
    assert said in refusal(tmp_path / "tiny.gguf")


def test_a_dense_granite_4_may_name_the_width_of_a_shared_expert(tmp_path: Path) -> None:
    model = tiny_model("granite", num_hidden_layers=2)
    add = lambda w: [w.add_expert_count(0), w.add_expert_shared_feed_forward_length(96)]  # noqa: E731
    write_model(tmp_path / "tiny.gguf", model, add)
    assert opened(tmp_path / "tiny.gguf").config.model_type == "granite"


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, {}),
        ({"temp": 1.0}, {"temperature": 1.0}),
        ({"top_k": -1, "top_p": 0.0}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
        ({"penalty_repeat": 1.5}, {"do_sample": None, "repetition_penalty": 1.5}),
        ({"temp": 0.5}, {"temperature": 0.5}),
        ({"temp": 0.0, "top_p": 0.5}, {"temperature": 0.0, "do_sample": False, "top_p": 0.5}),
        ({"top_k": 20, "top_p": 0.5}, {"temperature": 1.0, "top_k": 20, "top_p": 0.5}),
        ({"temp": 0.5, "min_p": 0.25}, {"temperature": 0.5, "min_p": 0.25}),
    ],
    ids=str,
)
def test_sampling_defaults_of_the_metadata_are_read(
    keys: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        for name, value in keys.items():
            given = writer.add_int32 if isinstance(value, int) else writer.add_float32
            given(f"general.sampling.{name}", value)

    write_model(tmp_path / "tiny.gguf", tiny_model("llama", num_hidden_layers=2), add)
    found = opened(tmp_path / "tiny.gguf").generation_config
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(found, name)) is not None}
    wanted = {"do_sample": True, **wanted} if wanted else {}
    assert given == {name: value for name, value in wanted.items() if value is not None}


def test_a_tensor_type_that_gguf_does_not_know_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: int) -> None:
        raise ValueError("36 is not a valid GGMLQuantizationType")

    write_model(tmp_path / "tiny.gguf", tiny_model("llama", num_hidden_layers=2))
    monkeypatch.setattr(gguf.gguf_reader, "GGMLQuantizationType", unknown)
    assert "a type that the package gguf does not know (36" in refusal(tmp_path / "tiny.gguf")


def test_gemma_4_stops_dimensions_by_no_other_factors() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e6, "short_factor": [1.0, 1.0, 2.0, 1e30]}
    with pytest.raises(UnsupportedError, match="not that of a Gemma 4 model"):
        proportional(rope, 8)
    rope["short_factor"] = [1.0, 1.0, 1e30, 1e30]
    assert proportional(rope, 8)["partial_rotary_factor"] == 0.5
    assert proportional(PLAIN, 8)["partial_rotary_factor"] == 1.0


@pytest.mark.parametrize(
    "add",
    [
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE),
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
    ],
)
def test_rope_scaling_by_nothing_is_no_scaling(
    add: Callable[[gguf.GGUFWriter], None], tmp_path: Path
) -> None:
    write_model(tmp_path / "tiny.gguf", tiny_model("llama", num_hidden_layers=2), add)
    assert opened(tmp_path / "tiny.gguf").config.rope_parameters["rope_type"] == "default"


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


# Exported


def greedy(model: Model) -> list[int]:
    """What the model writes after a prompt that outgrows the windows."""
    steps = model.generate_step(IDS, policy="full", max_new_tokens=TOKENS, ignore_eos=True)
    return [step.token for step in steps]


def assert_exported(
    model: PreTrainedModel, folder: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    """Writes a model as GGUF; its export gives the logits and tokens of transformers."""
    write_model(folder / "tiny.gguf", model, kind=Kind.F16)
    options = {"calibration": (night,), "variants": ("full",)}
    ours = dash_onnx.load(export_tiny(folder / "tiny.gguf", **options))
    tokens = greedy(ours)
    ids = np.array([*IDS, *tokens])
    wanted = reference_logits(model, ids)
    np.testing.assert_allclose(ours.logits(ids), wanted, atol=2e-4)
    assert tokens == wanted[len(IDS) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_gives_the_logits_and_tokens_of_transformers(
    family: str, night: Path, tmp_path: Path, export_tiny: Callable[..., Path]
) -> None:
    layers = {"gemma3_text": 6, "smollm3": 4}  # one of them is different
    listed = len(FAMILIES[family].get("layer_types", "??"))
    model = tiny_model(family, num_hidden_layers=layers.get(family, listed))
    assert_exported(model, tmp_path, night, export_tiny)


def test_gemma_4_may_take_its_values_from_keys(
    night: Path, tmp_path: Path, export_tiny: Callable[..., Path]
) -> None:
    model = tiny_model(
        "gemma4_text",
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        num_kv_shared_layers=0,
        use_double_wide_mlp=False,
        hidden_size_per_layer_input=0,
    )
    write_model(tmp_path / "tiny.gguf", model)
    config = opened(tmp_path / "tiny.gguf").config
    assert config.to_dict()["per_layer_config"] == model.config.to_dict()["per_layer_config"]
    assert_exported(model, tmp_path, night, export_tiny)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "granite", "phi3", "qwen2"])
def test_the_integers_of_the_file_are_the_weights_in_their_rows(
    family: str, night: Path, tmp_path: Path, export_tiny: Callable[..., Path]
) -> None:
    model = tiny_model(family, tie_word_embeddings=False, num_hidden_layers=2)
    write_model(tmp_path / "tiny.gguf", model, kind=Kind.Q4_0)
    options = {"calibration": (night,), "variants": ("full", "int4")}
    bundle = dash_onnx.load(export_tiny(tmp_path / "tiny.gguf", **options))
    full, int4 = (bundle.logits(IDS, policy=policy) for policy in ("full", "int4"))
    assert np.abs(full).max() > 1.0
    np.testing.assert_allclose(int4, full, atol=1e-2)  # `full` rounds to FP16


@pytest.mark.parametrize(
    ("kind", "options", "sequences"),
    [
        (Kind.Q4_0, {}, 32),
        (Kind.Q4_1, {}, 32),
        (Kind.Q4_0, {"requantize": True}, 64),
        (Kind.Q4_0, {"variants": ("int4", "int2")}, 64),
        (Kind.Q8_0, {}, 64),
        (Kind.F16, {}, 64),
    ],
)
def test_half_the_calibration_text_does_where_gptq_rounds_no_layer(
    kind: Kind, options: dict[str, Any], sequences: int, tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    write_model(tmp_path / "tiny.gguf", model, kind=kind)
    source = open_source(str(tmp_path / "tiny.gguf"), REGISTRY, options.get("requantize", False))
    architecture = architecture_of(source.config)
    spec = architecture.describe("tiny", source.config, None)
    found = suited(ExportOptions(**options), source, architecture, spec)
    assert sequences_of(spec.facts, found.exact) == sequences


def test_int8_of_the_file_is_int8_of_the_bundle_bit_for_bit(
    night: Path, tmp_path: Path, export_tiny: Callable[..., Path]
) -> None:
    """Q8_0 has the same blocks and levels; what it stands for is rounded to them once more."""
    model = tiny_model("llama", num_hidden_layers=2)
    values = write_model(tmp_path / "tiny.gguf", model, kind=Kind.Q8_0)
    model.load_state_dict(values, strict=False)
    model.save_pretrained(tmp_path / "folder")
    tiny_tokenizer().save_pretrained(tmp_path / "folder")
    ours, same = (
        dash_onnx.load(
            export_tiny(tmp_path / name, calibration=(night,), variants=("full", "int8"))
        )
        for name in ("tiny.gguf", "folder")
    )
    assert ours.manifest.export.source == "gguf:tiny"
    for policy in ("full", "int8"):
        found, wanted = (one.logits(IDS, policy=policy) for one in (ours, same))
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("kind", "block"), [(Kind.F16, 64), (Kind.Q4_0, 32), (Kind.Q8_0, 32), (Kind.Q5_0, 64)]
)
def test_only_integers_that_can_be_kept_ask_for_small_blocks(
    kind: Kind, block: int, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128}
    write_model(tmp_path / "m.gguf", tiny_model("llama", **sizes), kind=kind)
    source = opened(tmp_path / "m.gguf")
    assert source.integers == (block == 32)
    architecture = architecture_of(source.config)
    spec = architecture.describe("m", source.config, None)
    assert suited(ExportOptions(), source, architecture, spec).block_size == block
