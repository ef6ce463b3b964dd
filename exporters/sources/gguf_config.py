"""The transformers config of a GGUF file, built from its metadata and the tensors it has.

Keys and the defaults of absent keys are those of llama.cpp (gguf-py/gguf/constants.py,
conversion/*.py, src/models/*.cpp). transformers reads GGUF configs too, but only for some
families, and for none of them RoPE scaling, layers with windows, softcaps or multipliers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.exporters.sources.gguf_metadata import Metadata
from dash_onnx.exporters.sources.gguf_rope import proportional, rope_parameters

_SAME = (
    *("apertus", "arcee", "bitnet", "cohere2", "ernie4_5", "exaone", "exaone4", "gemma", "gemma2"),
    *("glm4", "granite", "granitemoe", "lfm2", "llama", "olmo2", "olmoe", "phi3", "qwen2", "qwen3"),
    *("smollm3", "stablelm"),
)
MODEL_TYPES = {
    **{name: name for name in _SAME},
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gpt-oss": "gpt_oss",
    "gptneox": "gpt_neox",
    "hunyuan-dense": "hunyuan_v1_dense",
    "lfm2moe": "lfm2_moe",
    "mistral3": "ministral3",
    "qwen2moe": "qwen2_moe",
    "qwen2vl": "qwen2",
    "qwen35": "qwen3_5_text",
    "qwen3moe": "qwen3_moe",
    "qwen3vl": "qwen3",
}
"""transformers' model type by `general.architecture`."""

_FULL, _SLIDING = "full_attention", "sliding_attention"  # in transformers' `layer_types`

# Their largest models scale attention by hidden size / heads instead of `head_dim`; llama.cpp
# recognizes them by their number of layers.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}

_MIXTURES = ("gpt-oss", "granitemoe", "lfm2moe", "olmoe", "qwen2moe", "qwen3moe")
_LAYER_NORMS = ("cohere2", "gptneox", "stablelm")
_UNDECLARED = {  # accepted by transformers, but not declared
    "gemma4": ("global_head_dim", "num_global_key_value_heads"),
    "qwen3moe": ("head_dim",),
}


def config_of(
    architecture: str, values: Mapping[str, Any], tensors: Mapping[str, Any]
) -> PretrainedConfig:
    """Builds the config from the metadata, by key, and the tensor readers, by name.

    Raises:
        SourceError: a value is missing.
        UnsupportedError: the file requires something that no exporter supports.
    """
    meta = Metadata(architecture, values)
    if meta.get("expert_count") and architecture not in _MIXTURES:
        raise UnsupportedError(
            f"{architecture}.expert_count is {meta['expert_count']}: mixtures of experts "
            f"are supported only for {', '.join(_MIXTURES)}"
        )
    if meta.get("attention.causal") is False:
        raise UnsupportedError(f"{architecture}.attention.causal is false: not a causal model")
    if meta.get("rope.scaling.alpha") or (architecture == "lfm2" and _window(meta)):
        raise UnsupportedError("rope.scaling.alpha and windows of LFM 2 are not read from GGUF")
    if "glm4.rope.dimension_sections" in values:
        raise UnsupportedError("the text part of a GLM-4 model for images is not read from GGUF")
    if "token_embd.weight" not in tensors:
        raise SourceError("the GGUF file has no tensor token_embd.weight")
    heads, width = int(meta["attention.head_count"]), int(meta["embedding_length"])
    head_dim = int(meta.get("attention.key_length", width // heads))
    if width != int(tensors["token_embd.weight"].shape[0]):
        raise SourceError(
            f"the embedding of the GGUF file has {tensors['token_embd.weight'].shape[0]} columns, "
            f"{architecture}.embedding_length is {width}"
        )
    if not (1 <= heads <= width and 1 <= head_dim <= width):
        raise SourceError(
            f"the GGUF file has {heads} heads of {head_dim} in a model that is {width} wide"
        )
    length = int(meta["context_length"])
    window = _window(meta)
    common: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": _width(meta),
        # The others draft more tokens.
        "num_hidden_layers": int(meta["block_count"]) - int(meta.get("nextn_predict_layers", 0)),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(meta, heads),
        "head_dim": head_dim,
        "max_position_embeddings": length,
        "sliding_window": window,
        # From the tensor, not the key: converters drop unused rows, or pad.
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": rope_parameters(meta, tensors, head_dim, length),
        "attention_bias": any(name.endswith(".attn_q.bias") for name in tensors),
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        **{
            f"{name}_token_id": values.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }
    model_type = MODEL_TYPES[architecture]
    if architecture == "llama" and window:
        model_type = "mistral"
    if architecture == "mistral3" and not meta.get("attention.temperature_scale"):
        model_type = "mistral"
    if architecture == "olmo2" and window:
        model_type = "olmo3"
    if architecture in _LAYER_NORMS:
        common["layer_norm_eps"] = float(meta["attention.layer_norm_epsilon"])
    else:
        common["rms_norm_eps"] = float(meta["attention.layer_norm_rms_epsilon"])
    common |= _own(meta, common, tensors)
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)}
    known.update(_UNDECLARED.get(architecture, ()))
    return config_class(**{key: value for key, value in common.items() if key in known})


def _window(meta: Metadata) -> int | None:
    return int(meta.get("attention.sliding_window") or 0) or None


def _width(meta: Metadata) -> int:
    """Width inside an MLP; that of the first layer if Gemma 4 has two."""
    found = meta.layers("feed_forward_length")
    if meta.architecture == "gemma4" and isinstance(found, list):
        return found[0]
    return int(meta["feed_forward_length"])


def _kv_heads(meta: Metadata, heads: int) -> int:
    """K/V heads, the maximum: LFM 2 has layers without any, Gemma 4 has most in window layers."""
    found = meta.layers("attention.head_count_kv")
    if meta.architecture.startswith(("gemma4", "lfm2")) and isinstance(found, list):
        return max(found)
    return int(meta.get("attention.head_count_kv", heads))


def _layer_types(meta: Metadata, layers: int, period: int) -> list[str]:
    """Every `period`-th layer has full attention, unless the file lists which layers slide."""
    pattern = meta.layers("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        slides = [bool(value) for value in pattern]
    else:
        slides = [bool((index + 1) % (pattern or period)) for index in range(layers)]
    return [_SLIDING if slide else _FULL for slide in slides]


def _own(meta: Metadata, common: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Config entries of an architecture that differ from the common ones, or add to them."""
    layers, head_dim = common["num_hidden_layers"], common["head_dim"]
    window, softcap = common["sliding_window"], meta.get("final_logit_softcapping")
    if meta.architecture in _GEMMA_27B_LAYERS:
        common["query_pre_attn_scalar"] = head_dim
        if layers == _GEMMA_27B_LAYERS[meta.architecture]:
            share = common["hidden_size"] // common["num_attention_heads"]
            common["query_pre_attn_scalar"] = share
    match meta.architecture:
        case "bitnet":
            return {"hidden_act": "silu"}  # the architecture has only this one
        case "cohere2":
            return {
                "layer_types": _layer_types(meta, layers, 4),
                "logit_scale": float(meta["logit_scale"]),
            }
        case "ernie4_5":
            return {"use_bias": common["attention_bias"]}
        case "exaone4":
            types = _layer_types(meta, layers, 4) if window else [_FULL] * layers
            return {"layer_types": types, "sliding_window_pattern": 4 if window else 0}
        case "gemma2":
            return {
                "sliding_window": window or 4096,
                "layer_types": _layer_types(meta, layers, 2),
                "attn_logit_softcapping": float(meta.get("attn_logit_softcapping", 50.0)),
                "final_logit_softcapping": 30.0 if softcap is None else float(softcap),
            }
        case "gemma3":
            everywhere = common["rope_parameters"]
            if meta.get("rope.freq_base") is None:
                everywhere["rope_theta"] = 1e6
            local = float(meta.get("rope.freq_base_swa", 10000.0))
            return {
                "layer_types": _layer_types(meta, layers, 6) if window else [_FULL] * layers,
                "final_logit_softcapping": None if softcap is None else float(softcap),
                "rope_parameters": {
                    _FULL: everywhere,
                    _SLIDING: {"rope_type": "default", "rope_theta": local},
                },
            }
        case "gemma4":
            return _gemma4(meta, common, tensors)
        case "gptneox":
            return {
                "use_parallel_residual": bool(meta.get("use_parallel_residual", True)),
                "attention_bias": "blk.0.attn_qkv.bias" in tensors,
                "hidden_act": "gelu",
            }
        case "gpt-oss":
            common["rope_parameters"]["truncate"] = False
            mixture = _mixture(meta)
            return {
                **mixture,
                "intermediate_size": mixture["moe_intermediate_size"],
                "sliding_window": int(meta["attention.sliding_window"]),
                "layer_types": _layer_types(meta, layers, 2),
            }
        case "granite" | "granitemoe":
            if meta.get("rope.scaling.finetuned") is False:
                raise UnsupportedError(
                    "this granite model has no position embedding: not supported"
                )
            # Dense models of Granite 4 have the key, too, for their only MLP.
            if meta.get("expert_count") and meta.get("expert_shared_feed_forward_length"):
                raise UnsupportedError("granite with a shared expert is not supported")
            return {
                **({} if meta.architecture == "granite" else _mixture(meta)),
                "attention_multiplier": float(meta.get("attention.scale") or head_dim**-0.5),
                "embedding_multiplier": float(meta.get("embedding_scale") or 1.0),
                "residual_multiplier": float(meta.get("residual_scale") or 1.0),
                "logits_scaling": float(meta["logit_scale"]),
            }
        case "lfm2" | "lfm2moe":
            attending = meta.layers("attention.head_count_kv")
            if not isinstance(attending, list):
                raise SourceError("the GGUF file does not say which layers have attention")
            return {
                "layer_types": [_FULL if count else "conv" for count in attending],
                "conv_L_cache": int(meta["shortconv.l_cache"]),
                "conv_bias": any(name.endswith("shortconv.conv.bias") for name in tensors),
                "block_auto_adjust_ff_dim": False,
                "norm_eps": common["rms_norm_eps"],
                **({} if meta.architecture == "lfm2" else _mixture(meta)),
                "num_dense_layers": int(meta.get("leading_dense_block_count", 0)),
                "use_expert_bias": any(".exp_probs_b." in name for name in tensors),
                "routed_scaling_factor": float(meta.get("expert_weights_scale") or 1.0),
            }
        case "mistral3" if beta := meta.get("attention.temperature_scale"):
            common["rope_parameters"]["llama_4_scaling_beta"] = float(beta)
        case "olmo2" if window:
            rope = common["rope_parameters"]
            sliding = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
            return {
                "layer_types": _layer_types(meta, layers, 4),
                "rope_parameters": {_FULL: rope, _SLIDING: sliding},
            }
        case "olmoe" | "qwen3moe":
            return {
                **_mixture(meta),
                "norm_topk_prob": meta.architecture == "qwen3moe",
                "clip_qkv": meta.get("attention.clamp_kqv"),
            }
        case "phi3":
            length = common["max_position_embeddings"]
            original = meta.get("rope.scaling.original_context_length", length)
            return {"original_max_position_embeddings": int(original)}
        case "qwen2moe":
            inner = common["intermediate_size"]
            return {
                **_mixture(meta),
                "shared_expert_intermediate_size": int(
                    meta.get("expert_shared_feed_forward_length", inner)
                ),
                "qkv_bias": common["attention_bias"],
            }
        case "qwen35":
            recurrent = meta.layers("attention.recurrent_layers")
            if not isinstance(recurrent, list):
                interval = int(meta.get("full_attention_interval", 4))
                recurrent = [(index + 1) % interval for index in range(layers)]
            heads, groups = int(meta["ssm.time_step_rank"]), int(meta["ssm.group_count"])
            inner = int(meta["ssm.inner_size"])
            if groups < 1 or heads < 1 or heads % groups or inner % heads:
                raise SourceError(
                    f"the GGUF file has {heads} value heads for {groups} key heads, {inner} wide"
                )
            return {
                "layer_types": ["linear_attention" if one else _FULL for one in recurrent[:layers]],
                "linear_conv_kernel_dim": int(meta["ssm.conv_kernel"]),
                "linear_num_key_heads": groups,
                "linear_num_value_heads": heads,
                "linear_key_head_dim": int(meta["ssm.state_size"]),
                "linear_value_head_dim": inner // heads,
            }
        case "stablelm":
            # From tensors, not the key `use_parallel_residual`: converters always write it.
            return {
                "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
                "use_qkv_bias": common["attention_bias"],
                "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
            }
    return {}


def _gemma4(meta: Metadata, common: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of layers with a window, of layers without, and of the last ones, which share K/V."""
    layers, shared = common["num_hidden_layers"], int(meta.get("attention.shared_kv_layers", 0))
    types, head_dim = _layer_types(meta, layers, 6), int(meta["attention.key_length_swa"])
    inner, kv_heads = common["intermediate_size"], common["num_key_value_heads"]
    widths = meta.by_layer("feed_forward_length", layers)
    heads = meta.by_layer("attention.head_count_kv", layers)
    wide, others = widths[-1] != inner, heads[types.index(_FULL)]
    if widths != [inner * (1 + (wide and i >= layers - shared)) for i in range(layers)]:
        raise UnsupportedError("gemma4.feed_forward_length is not doubled where K/V are shared")
    if heads != [others if kind == _FULL else kv_heads for kind in types]:
        raise UnsupportedError("gemma4.attention.head_count_kv does not go by windows")
    table, softcap = "per_layer_token_embd.weight", meta.get("final_logit_softcapping")
    local = float(meta.get("rope.freq_base_swa", 10000.0))
    everywhere, common["head_dim"] = common["head_dim"], head_dim
    return {
        "layer_types": types,
        "global_head_dim": everywhere,
        "num_global_key_value_heads": others,
        "attention_k_eq_v": f"blk.{types.index(_FULL)}.attn_v.weight" not in tensors,
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": wide,
        "hidden_size_per_layer_input": int(meta.get("embedding_length_per_layer_input", 0)),
        "vocab_size_per_layer_input": (
            int(tensors[table].shape[1]) if table in tensors else common["vocab_size"]
        ),
        "final_logit_softcapping": None if softcap is None else float(softcap),
        "rope_parameters": {
            _FULL: proportional(common["rope_parameters"], everywhere),
            _SLIDING: {"rope_type": "default", "rope_theta": local},
        },
    }


def _mixture(meta: Metadata) -> dict[str, Any]:
    used, whole = int(meta["expert_used_count"]), int(meta["feed_forward_length"])
    # Some have a single width; older files of Qwen 2 MoE lack the width of an expert.
    widths = {"granitemoe": whole, "olmoe": whole, "qwen2moe": whole // max(used, 1)}
    usual = widths.get(meta.architecture)
    width = meta.get("expert_feed_forward_length", usual)
    return {
        **dict.fromkeys(("num_experts", "num_local_experts"), int(meta["expert_count"])),
        "num_experts_per_tok": used,
        "moe_intermediate_size": int(width or meta["expert_feed_forward_length"]),
    }
