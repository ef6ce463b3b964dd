"""Writes tiny models as GGUF files, with the values and keys that llama.cpp's converter gives.

Facts of conversion/{llama,gemma,phi,granite,stablelm,gptneox,qwen,gpt_oss,lfm2}.py there; the names
of keys and tensors are those of the gguf package.
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
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dash_onnx.exporters.sources.gguf_config import MODEL_TYPES

ARCHITECTURES = {
    **{kind: name for name, kind in reversed(MODEL_TYPES.items())},
    "mistral": "llama",
    "olmo3": "olmo2",
}
RENAMED = {
    "attn_sub_norm.weight": "inner_attn_ln.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
    "dt_bias": "dt_proj.bias",
    "expert_bias": "expert_bias.bias",
    "ffn_sub_norm.weight": "ffn_layernorm.weight",
    "layer_scalar": "layer_scalar.weight",
    "sinks": "sinks.weight",
}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K as llama.cpp rotates them, neighbours instead of halves."""
    half = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(half.swapaxes(1, 2)).reshape(rows.shape)


def converted(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """A weight as the converter stores it."""
    heads = config.num_attention_heads
    interleaved_in = ("arcee", "granite", "granitemoe", "llama", "ministral3", "mistral", "smollm3")
    if config.model_type in interleaved_in:
        if ".q_proj." in name:
            return interleaved(value, heads)
        if ".k_proj." in name:
            return interleaved(value, config.num_key_value_heads)
    if name.endswith(("conv.conv.weight", "conv1d.weight")) and value.ndim == 3:
        value = value[:, 0]
    if config.model_type == "qwen3_5_text":
        return _of_delta_net(name, value, config)
    if config.model_type in ("gemma", "gemma2", "gemma3_text") and name.endswith("norm.weight"):
        return value + np.float32(1)
    if config.model_type == "gpt_neox" and "query_key_value" in name:
        by_head = value.reshape(heads, 3, -1, *value.shape[1:])
        return np.concatenate([by_head[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
    return value


def _of_delta_net(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """Of Qwen 3.5: value heads go in turn over the key heads."""
    if name.endswith("norm.weight"):
        return value if "linear_attn" in name else value + np.float32(1)
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    after = ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias")
    part = name.split(".")[-2 if name.endswith(".weight") else -1]
    if part == "A_log":
        value = -np.exp(value)
    if part == "out_proj":
        return np.ascontiguousarray(_in_turn(value.T, keys, heads).T)
    if part in ("in_proj_qkv", "conv1d"):
        start = 2 * keys * config.linear_key_head_dim
        return np.concatenate([value[:start], _in_turn(value[start:], keys, heads)])
    return _in_turn(value, keys, heads) if part in after else value


def _in_turn(value: np.ndarray, keys: int, heads: int) -> np.ndarray:
    by_key = value.reshape(keys, heads // keys, len(value) // heads, *value.shape[1:])
    return np.ascontiguousarray(by_key.swapaxes(0, 1)).reshape(value.shape)


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
    if rope.get("rope_type") == "proportional":
        half = config.per_layer_config[config.layer_types.index("full_attention")].head_dim // 2
        turning = int(half * rope["partial_rotary_factor"])
        factors = [1.0] * turning + [1e30] * (half - turning)
        return {"rope_freqs.weight": np.array(factors, np.float32)}
    return {}


def add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    """The model's keys."""
    kind = config.model_type
    first = config.per_layer_config[0] if kind == "gemma4_text" else config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if kind in ("lfm2", "lfm2_moe"):
        attends = [one == "full_attention" for one in config.layer_types]
        writer.add_head_count_kv([config.num_key_value_heads * one for one in attends])
        writer.add_shortconv_l_cache(config.conv_L_cache)
    elif kind != "gpt_neox":
        writer.add_head_count_kv(first.num_key_value_heads)
    if kind in ("gpt_oss", "granitemoe", "lfm2_moe", "olmoe", "qwen2_moe", "qwen3_moe"):
        local = kind in ("gpt_oss", "granitemoe")
        writer.add_expert_count(config.num_local_experts if local else config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind in ("lfm2_moe", "qwen2_moe", "qwen3_moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if kind == "gpt_oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if kind == "lfm2_moe":
        writer.add_leading_dense_block_count(config.num_dense_layers)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if kind == "qwen3_5_text":
        heads = config.linear_num_value_heads
        recurrent = [one == "linear_attention" for one in config.layer_types]
        writer.add_array("qwen35.attention.recurrent_layers", recurrent)
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_inner_size(heads * config.linear_value_head_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_time_step_rank(heads)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_rope_dimension_sections([2, 1, 1, 0])
    if kind in ("cohere2", "gpt_neox", "stablelm"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
        if kind != "cohere2":
            writer.add_parallel_residual(config.use_parallel_residual)
    else:
        epsilon = config.norm_eps if kind.startswith("lfm2") else config.rms_norm_eps
        writer.add_layer_norm_rms_eps(epsilon)
    head_dim = getattr(first, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(first, "head_dim", None):
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
    if kind in ("granite", "granitemoe"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)

    if kind == "gemma4_text":
        _add_gemma4(writer, config)


def _add_gemma4(writer: gguf.GGUFWriter, config: Any) -> None:
    """Of Gemma 4: sizes of layers that differ, in place of those of all layers."""
    layers, kinds = config.num_hidden_layers, config.layer_types
    full, sliding = (
        config.per_layer_config[kinds.index(f"{kind}_attention")] for kind in ("full", "sliding")
    )
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for side in ("key", "value"):
        getattr(writer, f"add_{side}_length")(full.head_dim)
        getattr(writer, f"add_{side}_length_swa")(sliding.head_dim)
    if config.use_double_wide_mlp:
        first, inner = layers - config.num_kv_shared_layers, config.intermediate_size
        writer.add_feed_forward_length([inner * (1 + (i >= first)) for i in range(layers)])
    heads = {"sliding_attention": sliding, "full_attention": full}
    writer.add_head_count_kv([heads[kind].num_key_value_heads for kind in kinds])
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


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
            parts = []
            for part, stored in experts_of(name, tensor.float(), config).items():
                into = kind if part.endswith(".weight") else Kind.F32
                packed = gguf.quants.quantize(stored, into)
                raw = None if into in (Kind.F32, Kind.F16) else into
                mapped = names.get_name(part, try_suffixes=(".weight", ".bias"))
                writer.add_tensor(mapped, packed, raw_dtype=raw)
                floats = gguf.quants.dequantize(packed, into).astype(np.float32)
                parts.append(torch.from_numpy(floats))
            values[name] = experts_joined(name, parts, config)
            continue
        stored = converted(name, tensor.float().numpy(), config)
        into = kind if stored.ndim == 2 and ".conv" not in name else Kind.F32
        packed = gguf.quants.quantize(np.ascontiguousarray(stored), into)
        values[name] = torch.from_numpy(
            restored(name, gguf.quants.dequantize(packed, into), config).astype(np.float32)
        )
        raw = None if into in (Kind.F32, Kind.F16) else into
        for ending, other in RENAMED.items():
            if name.endswith(f".{ending}"):
                name = name.removesuffix(ending) + other
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


def experts_of(name: str, value: torch.Tensor, config: Any) -> dict[str, np.ndarray]:
    """A weight or bias of all experts as the converter stores it: gate and up apart."""
    prefix, _, last = name.replace(".block_sparse_moe.", ".mlp.").rpartition(".")
    kind = "bias" if last.endswith("_bias") else "weight"
    transposed = config.model_type == "gpt_oss" and kind == "weight"
    value = value.transpose(1, 2) if transposed else value
    if last.startswith("down_proj"):
        parts = {"down_proj": value}
    elif config.model_type == "gpt_oss":
        parts = {"gate_proj": value[:, ::2], "up_proj": value[:, 1::2]}
    else:
        parts = dict(zip(("gate_proj", "up_proj"), value.chunk(2, 1), strict=True))
    return {f"{prefix}.{one}.{kind}": part.contiguous().numpy() for one, part in parts.items()}


def experts_joined(name: str, parts: list[torch.Tensor], config: Any) -> torch.Tensor:
    """`experts_of` undone."""
    if config.model_type != "gpt_oss":
        return torch.cat(parts, 1)
    value = torch.empty(len(parts[0]), sum(part.shape[1] for part in parts), *parts[0].shape[2:])
    for place, part in enumerate(parts):
        value[:, place :: len(parts)] = part
    return value if name.endswith("_bias") else value.transpose(1, 2).contiguous()


def restored(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """`converted` undone: rows found by converting their numbers."""
    if name.endswith(("conv.conv.weight", "conv1d.weight")):
        value = value[:, None]
    if name.endswith("linear_attn.out_proj.weight"):
        columns = np.arange(value.shape[1], dtype=np.float32)[None]
        return value[:, np.argsort(converted(name, columns, config)[0])]
    rows = np.arange(len(value), dtype=np.float32)
    if name.endswith("A_log"):
        return np.log(-value)[np.argsort(-converted(name, rows, config))]
    if name.endswith("norm.weight"):
        return value - converted(name, np.zeros_like(value), config)
    return value[np.argsort(converted(name, rows, config))]
