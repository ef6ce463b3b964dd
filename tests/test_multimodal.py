"""The language models of multimodal checkpoints against transformers, on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import reference_logits, tiny_tokenizer
from families import CASES, config_of, random_ids, write_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

import dash_onnx
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.exporters.architectures import REGISTRY, architecture_of
from dash_onnx.exporters.calibration.reference import streamed_model
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.exporters.sources import open_source
from dash_onnx.exporters.sources.names import MULTIMODAL
from dash_onnx.exporters.sources.source import layers_in

_PATCHES = {"image_size": 28, "patch_size": 14}
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
_TOWER = {**_SMALL, **_PATCHES, "num_attention_heads": 2}
_GEMMA4_TOWER = {
    **_SMALL,
    "model_type": "gemma4_vision",
    "patch_size": 14,
    "position_embedding_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_QWEN_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
_INTERLEAVED = {**_SECTIONS, "mrope_section": [6, 5, 5], "mrope_interleaved": True}


def text(case: str, **change: Any) -> dict[str, Any]:
    """The config of a language model inside another one."""
    config: dict[str, Any] = config_of(CASES[case].family, CASES[case].config).to_dict()
    return {**config, **change}


def plain(kind: str, **change: Any) -> dict[str, Any]:
    """The same of a Qwen."""
    return {**config_of("llama", {}).to_dict(), "model_type": kind, **change}


def tower(kind: str, **change: Any) -> dict[str, Any]:
    """The config of an image encoder."""
    return {**_TOWER, "model_type": kind, **change}


# By `model_type`: text config, image config.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exaone4_5": (
        text("exaone4"),
        {**_QWEN_TOWER, "out_hidden_size": 64, "num_key_value_heads": 1},
    ),
    "gemma3": (text("gemma3"), tower("siglip_vision_model")),
    "gemma4": (text("gemma4", pad_token_id=0), _GEMMA4_TOWER),
    "gemma4_unified": (
        text("gemma4 unified", pad_token_id=0),
        {"model_type": "gemma4_unified_vision", "mm_embed_dim": 64, "mm_posemb_size": 16},
    ),
    "idefics3": (text("llama"), tower("idefics3_vision")),
    "internvl": (text("qwen3"), tower("internvl_vision")),
    "lfm2_vl": (text("lfm2"), tower("siglip2_vision_model")),
    "lighton_ocr": (text("qwen3"), tower("pixtral", head_dim=16)),
    "llava": (text("llama"), tower("clip_vision_model")),
    "llava_next": (text("mistral"), tower("clip_vision_model")),
    "llava_onevision": (text("qwen2"), tower("siglip_vision_model")),
    "minicpmv4_6": (
        text("qwen3_5"),
        tower("minicpmv4_6_vision"),
    ),
    "mistral3": (text("ministral3"), tower("pixtral", head_dim=16)),
    "qwen2_5_vl": (
        plain("qwen2_5_vl_text", rope_parameters=_SECTIONS),
        {**_QWEN_TOWER, "out_hidden_size": 64},
    ),
    "qwen2_vl": (
        plain("qwen2_vl_text", rope_parameters=_SECTIONS),
        {"depth": 1, "hidden_size": 64, "embed_dim": 32, "num_heads": 2},
    ),
    "qwen3_5": (
        text("qwen3_5"),
        {**_QWEN_TOWER, "out_hidden_size": 64, "num_position_embeddings": 16},
    ),
    "qwen3_5_moe": (
        text("qwen3_5_moe"),
        {**_QWEN_TOWER, "out_hidden_size": 64, "num_position_embeddings": 16},
    ),
    "qwen3_vl": (
        plain("qwen3_vl_text", head_dim=32, rope_parameters=_INTERLEAVED),
        {**_QWEN_TOWER, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_vl_moe": (
        plain("qwen3_vl_moe_text", head_dim=32, rope_parameters=_INTERLEAVED, **_EXPERTS),
        {**_QWEN_TOWER, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    ),
    "smolvlm": (text("llama"), tower("smolvlm_vision")),
}


def save_multimodal(folder: Path, kind: str) -> PreTrainedModel:
    """Writes a tiny random model with an image encoder."""
    inside, images = MODELS[kind]
    config = AutoConfig.for_model(kind, text_config=inside, vision_config=images)
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_((value + 0.1 * torch.randn_like(value)).half() if "vis" not in name else 0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_the_language_model_of_a_multimodal_one_is_read_as_one_of_its_own(
    kind: str, tmp_path: Path
) -> None:
    model, ids = save_multimodal(tmp_path, kind), random_ids(60)
    source = open_source(str(tmp_path), REGISTRY)
    wanted = reference_logits(model, ids)
    assert wanted.std() > 0.3  # the comparison means something
    logits = reference_logits(streamed_model(source), ids)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    family = architecture_of(source.config)
    spec = family.describe("", source.config, None)
    family.layer(source.weights, spec.facts.num_layers - 1, spec)
    family.head(source.weights, spec)
    assert layers_in(source.weights.stored.shapes) == spec.facts.num_layers


def test_every_multimodal_type_is_compared() -> None:
    assert set(MODELS) == set(MULTIMODAL)


def test_a_config_without_a_text_config_of_its_own_is_read(tmp_path: Path) -> None:
    model = save_multimodal(tmp_path, "qwen2_5_vl")
    raw = json.loads((tmp_path / "config.json").read_text("utf-8"))
    inside = raw.pop("text_config")  # as in the files of Qwen 2.5 VL
    inside = {key: value for key, value in inside.items() if key not in ("model_type", "dtype")}
    (tmp_path / "config.json").write_text(json.dumps({**inside, **raw}))
    source, ids = open_source(str(tmp_path), REGISTRY), random_ids(20)
    logits = reference_logits(streamed_model(source), ids)
    np.testing.assert_allclose(logits, reference_logits(model, ids), atol=1e-4)


def test_a_language_model_saved_without_its_images_keeps_its_prefix(tmp_path: Path) -> None:
    """As transformers saves a model of text after fine-tuning."""
    save_multimodal(tmp_path / "whole", "qwen3_5")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    source, ids = open_source(str(tmp_path), REGISTRY), random_ids(20)
    assert any(name.startswith("model.language_model.") for name in saved_names(tmp_path))
    logits = reference_logits(streamed_model(source), ids)
    np.testing.assert_allclose(logits, reference_logits(model, ids), atol=1e-4)


def test_stacked_experts_are_read_from_either_layout(tmp_path: Path) -> None:
    """The files of Qwen 3 VL hold the transposes of what transformers computes with."""
    model, path = save_multimodal(tmp_path, "qwen3_vl_moe"), tmp_path / "model.safetensors"
    stored, first = load_file(path), "model.language_model.layers.0.mlp.experts.down_proj"
    for shape in ((6, 64, 96), (6, 96, 64)):
        assert tuple(stored[first].shape) == shape
        source = open_source(str(tmp_path), REGISTRY)
        for name, parameter in model.model.language_model.layers.named_parameters():
            assert source.weights.shape(f"model.layers.{name}") == tuple(parameter.shape)
            found = source.weights[f"model.layers.{name}"]
            torch.testing.assert_close(found, parameter.data, rtol=0, atol=0)
        for name in stored:
            if ".mlp.experts." in name:
                stored[name] = stored[name].transpose(1, 2).contiguous()
        save_file(stored, path, {"format": "pt"})


def saved_names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return [*file.keys()]


def test_a_language_model_of_another_family_is_refused(tmp_path: Path) -> None:
    inside = {"model_type": "phimoe"}
    config = {"model_type": "llava", "text_config": inside, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="architecture 'phimoe' is not supported"):
        open_source(str(tmp_path), REGISTRY)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "lfm2_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe"])
def test_a_bundle_of_the_language_model_gives_the_logits_of_the_whole(
    kind: str, tmp_path: Path
) -> None:
    model, ids = save_multimodal(tmp_path / "source", kind), random_ids(60)
    calibration = (write_text(tmp_path / "text.txt"),)
    options = ExportOptions(variants=("full", "int8"), calibration=calibration, accuracy_level=0)
    export(str(tmp_path / "source"), tmp_path / "out", options)
    with dash_onnx.load(tmp_path / "out") as bundle:
        got = bundle.logits(ids, policy="full")
    np.testing.assert_allclose(got, reference_logits(model, ids), atol=3e-4)
