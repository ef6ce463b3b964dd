"""Writes tiny models as GGUF files, with the values and keys that llama.cpp's converter gives.

Facts of conversion/{llama,gemma,phi,granite,stablelm,gptneox}.py there; the names of keys and
tensors are those of the gguf package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from conftest import TINY, tiny_tokenizer
from gguf import GGMLQuantizationType as Kind
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dash_onnx.exporters.sources.gguf_config import MODEL_TYPES

ARCHITECTURES = {
    **{kind: name for name, kind in MODEL_TYPES.items()},
    "mistral": "llama",
    "olmo3": "olmo2",
}
SIZES = {**TINY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
# Heads of 32, of which half rotates: less than 16 is no multiple that ORT's attention takes.
_HALF = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WINDOWS = {
    "sliding_window": 16,
    "layer_types": ["full_attention", *["sliding_attention"] * 3],
    "num_hidden_layers": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "arcee": {"head_dim": 16},
    "cohere2": {**_WINDOWS, "logit_scale": 0.25, "tie_word_embeddings": True},
    "ernie4_5": {"head_dim": 32, "tie_word_embeddings": True},
    "exaone": {},
    "exaone4": _WINDOWS,
    "glm4": {**_HALF, "head_dim": 32, "attention_bias": True},
    "ministral3": {
        "head_dim": 32,
        "rope_parameters": {
            **_YARN,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.25,
        },
    },
    "olmo3": {
        **_WINDOWS,
        "rope_parameters": {
            "full_attention": _YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "num_hidden_layers": 7,  # one of them sees all
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "gpt_neox": {**_HALF},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
        "tie_word_embeddings": True,
    },
    "lfm2": {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": True,
    },
    "llama": {},
    "mistral": {"sliding_window": 16},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": None},
    "phi3": {
        **_HALF,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
            "attention_factor": 1.25,
            "original_max_position_embeddings": 128,
        },
        "sliding_window": 100,
    },
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "smollm3": {"tie_word_embeddings": True},
    "stablelm": {**_HALF, "use_qkv_bias": True},
}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of a family, norms and biases random too, weights rounded to FP16."""
    sizes = {**SIZES, **FAMILIES[family], **overrides}
    if family == "gpt_neox":
        del sizes["num_key_value_heads"]  # it has as many as queries
    config = AutoConfig.for_model(family, **sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value += torch.randn_like(value) * 0.2
            value.copy_(value.half().float())
    return model


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K as llama.cpp rotates them, neighbours instead of halves."""
    half = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(half.swapaxes(1, 2)).reshape(rows.shape)


def converted(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """A weight as the converter stores it."""
    heads = config.num_attention_heads
    if config.model_type in ("arcee", "granite", "llama", "ministral3", "mistral", "smollm3"):
        if ".q_proj." in name:
            return interleaved(value, heads)
        if ".k_proj." in name:
            return interleaved(value, config.num_key_value_heads)
    if name.endswith("conv.conv.weight"):
        return value[:, 0]
    if config.model_type in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
        return value + np.float32(1)
    if config.model_type == "gpt_neox" and "query_key_value" in name:
        by_head = value.reshape(heads, 3, -1, *value.shape[1:])
        return np.concatenate([by_head[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
    return value


def rope_tensors(config: Any) -> dict[str, np.ndarray]:
    """Factors of the frequencies, where the RoPE's kind has some."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") == "llama3":
        dim = config.hidden_size // config.num_attention_heads
        plain = rope["rope_theta"] ** -(np.arange(0, dim, 2) / dim)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
        return {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}
    if rope.get("rope_type") == "longrope":
        return {
            "rope_factors_long.weight": np.array(rope["long_factor"], np.float32),
            "rope_factors_short.weight": np.array(rope["short_factor"], np.float32),
        }
    return {}


def add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    """The model's keys."""
    kind = config.model_type
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if kind == "lfm2":
        attends = [one == "full_attention" for one in config.layer_types]
        writer.add_head_count_kv([config.num_key_value_heads * one for one in attends])
        writer.add_shortconv_l_cache(config.conv_L_cache)
    elif kind != "gpt_neox":
        writer.add_head_count_kv(config.num_key_value_heads)
    if kind in ("olmoe", "qwen3_moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind in ("cohere2", "gpt_neox", "stablelm"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
        if kind != "cohere2":
            writer.add_parallel_residual(config.use_parallel_residual)
    else:
        epsilon = config.norm_eps if kind == "lfm2" else config.rms_norm_eps
        writer.add_layer_norm_rms_eps(epsilon)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if kind not in ("gemma2", "gemma3_text", "olmo2", "qwen2", "qwen3"):
        writer.add_rope_dimension_count(rotated)
    if kind not in ("gemma2", "gpt_neox", "stablelm"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    for name in ("beta_fast", "beta_slow"):
        if rope.get(name):
            getattr(writer, f"add_rope_scaling_yarn_{name}")(rope[name])
    if rope["rope_type"] == "yarn" and rope.get("attention_factor"):
        writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    if rope["rope_type"] in ("longrope", "yarn"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, device="cpu")
        writer.add_rope_scaling_attn_factors(factor)
    if kind != "qwen2" and kind != "qwen3" and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if kind in ("cohere2", "exaone4", "olmo3") and config.sliding_window:
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_sliding_window_pattern(slides)
    if kind == "cohere2":
        writer.add_logit_scale(config.logit_scale)
    if kind == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def add_byte_level(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int, pre: str
) -> None:
    """A byte-level BPE tokenizer, padded to a model's number of rows."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"]: token["special"] for token in state["added_tokens"]}
    ids = tokenizer.get_vocab()
    tokens, types = [f"[PAD{i}]" for i in range(size)], [gguf.TokenType.UNUSED] * size
    for token, index in ids.items():
        tokens[index] = token
        types[index] = gguf.TokenType.NORMAL
        if token in added:
            special = added[token]
            types[index] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def add_tiny_tokenizer(writer: gguf.GGUFWriter) -> None:
    """That of `conftest`."""
    add_byte_level(writer, tiny_tokenizer(), TINY["vocab_size"], "gpt-2")


def write_model(
    path: Path,
    model: PreTrainedModel,
    *extras: Callable[[gguf.GGUFWriter], object],
    kind: Kind = Kind.F32,
    tokenizer: Callable[[gguf.GGUFWriter], object] = add_tiny_tokenizer,
    without: str = "",
    tensors_a_file: int = 0,
) -> dict[str, torch.Tensor]:
    """Writes a model; matrices as `kind`, vectors as F32.

    Args:
        path: the file.
        model: what to write.
        extras: further keys or tensors.
        kind: of matrices.
        tokenizer: adds its keys.
        without: a tensor that is left out, by its name in the file.
        tensors_a_file: splits the model into parts of so many; 0: one file.

    Returns:
        The values that the file stands for, by Hugging Face name.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_file)
    add_config(writer, config)
    for add in (tokenizer, *extras):
        add(writer)
    values: dict[str, torch.Tensor] = {}
    xielu: dict[str, list[float]] = {}
    for name, tensor in model.state_dict().items():
        if "rotary" in name or (config.tie_word_embeddings and name.endswith("lm_head.weight")):
            continue
        if ".act_fn." in name:
            xielu.setdefault(name.rpartition(".")[2], []).append(tensor.float().item())
            values[name] = tensor.float()
            continue
        if ".experts." in name:
            values[name], (prefix, _, last) = tensor.float(), name.rpartition(".")
            inside = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            for one, part in zip(inside, values[name].chunk(len(inside), 1), strict=True):
                mapped = names.get_name(f"{prefix}.{one}")
                writer.add_tensor(f"{mapped}.weight", part.contiguous().numpy())
            continue
        stored = converted(name, tensor.float().numpy(), config)
        into = kind if stored.ndim == 2 and ".conv.conv." not in name else Kind.F32
        packed = gguf.quants.quantize(np.ascontiguousarray(stored), into)
        values[name] = torch.from_numpy(
            restored(name, gguf.quants.dequantize(packed, into), config).astype(np.float32)
        )
        raw = None if into in (Kind.F32, Kind.F16) else into
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        if mapped != without:
            writer.add_tensor(mapped, packed, raw_dtype=raw)
    for name, numbers in xielu.items():
        writer.add_array(f"xielu.{name}", numbers)
    for name, value in rope_tensors(config).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def restored(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """`converted` undone: rows found by converting their numbers."""
    if name.endswith("conv.conv.weight"):
        return value[:, None]
    rows = np.arange(len(value), dtype=np.float32)
    if name.endswith("norm.weight"):
        return value - converted(name, np.zeros_like(value), config)
    return value[np.argsort(converted(name, rows, config))]
