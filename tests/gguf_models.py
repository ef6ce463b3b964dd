"""Tiny models of the families that GGUF files are read of."""

from __future__ import annotations

from typing import Any

import torch
from conftest import TINY
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
    "bitnet": {"hidden_act": "silu", "tie_word_embeddings": True},
    "cohere2": {**_WINDOWS, "logit_scale": 0.25, "tie_word_embeddings": True},
    "ernie4_5": {"head_dim": 32, "tie_word_embeddings": True, "use_bias": True},
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
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
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
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 16,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": TINY["vocab_size"],
        "final_logit_softcapping": 10.0,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {**_HALF},
    "gpt_oss": {
        "head_dim": 32,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "rope_parameters": {**_YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_dense": {"head_dim": 32, "tie_word_embeddings": True},
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
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
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
    "qwen2_moe": {
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3": {"head_dim": 32},
    "qwen3_5_text": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    },
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
            if family == "gemma4_text" and "q_norm" in name:  # attention has no other scale
                value *= 0.25
            value.copy_(value.half().float())
        for name, value in model.named_buffers():
            if name.endswith("layer_scalar"):
                value.copy_(0.7 + 0.3 * torch.rand_like(value))
    return model
