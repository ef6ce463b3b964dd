"""The random checkpoints of big.py as GGUF files, to compare with llama.cpp at the same shape.

Keys and names are those that llama.cpp's converter writes. Values that it would convert, such as
the decay of Gated DeltaNet, are left unchanged: the file only serves to measure speed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import gguf
import torch
from build_peers import requantize
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from dash_onnx.exporters.sources.gguf_layout import Layout

_ARCHITECTURES = {
    "llama": "llama", "lfm2": "lfm2", "lfm2_moe": "lfm2moe", "qwen3_5_text": "qwen35",
}  # fmt: skip


def save_gguf(
    path: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    weights: Iterable[tuple[str, torch.Tensor]],
    kind: str = "Q4_0",
) -> None:
    """Writes a model, via a file in FP16.

    Args:
        path: the file.
        config: config of a Llama, an LFM 2 or a Qwen 3.5.
        tokenizer: byte-level BPE.
        weights: by Hugging Face name.
        kind: type of matrices, as named by llama-quantize; F16 keeps them.
    """
    architecture = _ARCHITECTURES[config.model_type]
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    layout = Layout(architecture, config)
    full = path if kind == "F16" else path.with_name(f"{path.name}.f16")
    full.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(full, architecture, use_temp_file=True)
    _add_keys(writer, config)
    _add_tokens(writer, tokenizer, config.vocab_size)
    for weight, value in weights:
        parts = layout.parts(weight)
        values = value.chunk(len(parts), 1) if len(parts) > 1 else [value]
        for name, tensor in zip(parts, values, strict=True):
            mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert mapped is not None, name
            convolves = tensor.shape[1:2] == (1,)  # `[D, 1, K]`
            exact = tensor.ndim == 1 or convolves or name.endswith(".gate.weight")
            tensor = tensor.squeeze(1) if convolves else tensor
            tensor = tensor.to(torch.float32 if exact else torch.float16)
            writer.add_tensor(mapped, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if full != path:
        requantize(full, path, kind)
        full.unlink()


def _add_keys(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    kind = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(config.vocab_size)
    if kind.startswith("lfm2"):
        attends = [one == "full_attention" for one in config.layer_types]
        writer.add_head_count_kv([config.num_key_value_heads * one for one in attends])
        writer.add_shortconv_l_cache(config.conv_L_cache)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
    if kind == "lfm2_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_leading_dense_block_count(config.num_dense_layers)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if kind == "qwen3_5_text":
        values = config.linear_num_value_heads
        writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_inner_size(values * config.linear_value_head_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_time_step_rank(values)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_rope_dimension_count(head_dim // 4)
        writer.add_rope_dimension_sections([11, 11, 10, 0])


def _add_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    """Adds the tokens, padded to the model's vocabulary size."""
    known = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    padding = [f"[PAD{index}]" for index in range(len(known), size)]
    types = [gguf.TokenType.NORMAL] * len(known) + [gguf.TokenType.UNUSED] * len(padding)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*known, *padding])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
