"""The transformers config of a GGUF file, built from its metadata and the tensors it has.

Keys and what absent ones mean are those of llama.cpp (gguf-py/gguf/constants.py,
conversion/*.py, src/models/*.cpp). transformers reads GGUF configs too, but only of some
families, and of none RoPE scaling, windows' layers, softcaps or multipliers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import CONFIG_MAPPING, PretrainedConfig

from dash_onnx.core.errors import SourceError, UnsupportedError

MODEL_TYPES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gptneox": "gpt_neox",
    "granite": "granite",
    "llama": "llama",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
}
"""transformers' model type by `general.architecture`."""

# Their largest models scale attention by the embedding's share of a head instead of `head_dim`;
# llama.cpp knows them by their number of layers.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}

# transformers rotates a quarter of their heads unless told.
_PARTLY_ROTATED = ("gptneox", "stablelm")


class Metadata:
    """Values of the keys of one architecture, without its prefix."""

    def __init__(self, architecture: str, values: Mapping[str, Any]):
        """Takes all metadata of a file."""
        self.architecture = architecture
        self._values = values

    def get(self, key: str, default: Any = None) -> Any:
        """A value, one number where a list says the same of every layer.

        Raises:
            UnsupportedError: layers differ.
        """
        value = self._values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and isinstance(value[0], int | float):
            if len(set(value)) > 1:
                raise UnsupportedError(
                    f"{self.architecture}.{key} differs from layer to layer, which is not supported"
                )
            return value[0]
        return value

    def layers(self, key: str) -> list[bool] | int | None:
        """A value that may be one for each layer."""
        value: list[bool] | int | None = self._values.get(f"{self.architecture}.{key}")
        return value

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise SourceError(f"the GGUF file has no {self.architecture}.{key}")
        return value


def config_of(
    architecture: str, values: Mapping[str, Any], tensors: Mapping[str, Any]
) -> PretrainedConfig:
    """Builds the config.

    Args:
        architecture: a key of `MODEL_TYPES`.
        values: all metadata, by key.
        tensors: readers of all tensors, by GGUF name.

    Raises:
        SourceError: a value is missing.
        UnsupportedError: the file asks for something no exporter has.
    """
    meta = Metadata(architecture, values)
    if meta.get("expert_count"):
        raise UnsupportedError(
            f"{architecture}.expert_count is {meta['expert_count']}: mixtures of experts are not "
            "supported, only dense models"
        )
    if "token_embd.weight" not in tensors:
        raise SourceError("the GGUF file has no tensor token_embd.weight")
    heads, width = int(meta["attention.head_count"]), int(meta["embedding_length"])
    head_dim = int(meta.get("attention.key_length", width // heads))
    length = int(meta["context_length"])
    window = meta.get("attention.sliding_window")
    common = {
        "hidden_size": width,
        "intermediate_size": int(meta["feed_forward_length"]),
        "num_hidden_layers": int(meta["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(meta.get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": length,
        # The tensor, not the key: converters cut rows that no token has, or pad.
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": rope_parameters(meta, tensors, head_dim, length),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        **{
            f"{name}_token_id": values.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }
    model_type = MODEL_TYPES[architecture]
    if architecture == "llama" and window:
        model_type = "mistral"
    own = _OWN.get(architecture, lambda meta, common, tensors: {})(meta, common, tensors)
    if architecture in ("stablelm", "gptneox"):
        own["layer_norm_eps"] = float(meta["attention.layer_norm_epsilon"])
    else:
        own["rms_norm_eps"] = float(meta["attention.layer_norm_rms_epsilon"])
    if window:
        own["sliding_window"] = int(window)
    elif architecture in ("phi3", "gemma3"):
        own["sliding_window"] = None
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{key: v for key, v in {**common, **own}.items() if key in known})


def rope_parameters(
    meta: Metadata, tensors: Mapping[str, Any], head_dim: int, length: int
) -> dict[str, Any]:
    """The rotary embedding, of any kind that GGUF can hold, in transformers' terms.

    Raises:
        UnsupportedError: of a kind that is not known, or two at once.
    """
    rotated = int(meta.get("rope.dimension_count", head_dim))
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(meta.get("rope.freq_base", 10000.0)),
    }
    if rotated != head_dim or meta.architecture in _PARTLY_ROTATED:
        parameters["partial_rotary_factor"] = rotated / head_dim
    factor = float(meta.get("rope.scaling.factor") or meta.get("rope.scale_linear") or 1.0)
    kind = meta.get("rope.scaling.type") or "linear"
    factors = {
        name: np.array(tensors[f"{name}.weight"].data, np.float32).tolist()
        for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
        if f"{name}.weight" in tensors
    }
    if any(len(values) != rotated // 2 for values in factors.values()):
        raise SourceError(f"the RoPE factors of the GGUF file are not {rotated // 2}")
    if factors.get("rope_freqs") == [1.0] * (rotated // 2):
        del factors["rope_freqs"]
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedError(
            f"RoPE scaling {kind!r} is not read from GGUF; supported: linear, yarn, longrope, "
            "and llama3 as rope_freqs.weight"
        )
    if factors and kind in ("linear", "yarn") and factor != 1.0:
        raise UnsupportedError(f"the GGUF file has RoPE factors and {kind} scaling at once")
    if "rope_freqs" in factors:
        # Llama 3's frequencies, already worked out. transformers has its formula, but only
        # `longrope` takes numbers; with one list for all lengths and this factor it is the same.
        return {
            **parameters,
            "rope_type": "longrope",
            "short_factor": factors["rope_freqs"],
            "long_factor": factors["rope_freqs"],
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
        }
    if "rope_factors_short" in factors:
        parameters |= {
            "rope_type": "longrope",
            "short_factor": factors["rope_factors_short"],
            "long_factor": factors.get("rope_factors_long", factors["rope_factors_short"]),
            "original_max_position_embeddings": int(meta["rope.scaling.original_context_length"]),
        }
        if (attention := meta.get("rope.scaling.attn_factor")) is not None:
            parameters["attention_factor"] = float(attention)
    elif kind == "longrope":
        raise SourceError("the GGUF file has longrope scaling without its rope_factors tensors")
    elif kind == "yarn":
        parameters |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(meta["rope.scaling.original_context_length"]),
        }
        for name, key in (
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
            ("attention_factor", "yarn_attn_factor"),
        ):
            if (value := meta.get(f"rope.scaling.{key}")) is not None:
                parameters[name] = float(value)
    elif kind == "linear" and factor != 1.0:
        parameters |= {"rope_type": "linear", "factor": factor}
    return parameters


def _layer_types(meta: Metadata, layers: int, period: int) -> list[str]:
    """Every `period`-th layer sees all, unless the file says which do not."""
    pattern = meta.layers("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        slides = [bool(value) for value in pattern]
    else:
        slides = [bool((index + 1) % (pattern or period)) for index in range(layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _gemma(meta: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    layers, head_dim = common["num_hidden_layers"], common["head_dim"]
    if layers == _GEMMA_27B_LAYERS[meta.architecture]:
        return {"query_pre_attn_scalar": common["hidden_size"] // common["num_attention_heads"]}
    return {"query_pre_attn_scalar": head_dim}


def _gemma2(meta: Metadata, common: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_gemma(meta, common),
        "sliding_window": 4096,
        "layer_types": _layer_types(meta, common["num_hidden_layers"], 2),
        "attn_logit_softcapping": float(meta.get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(meta.get("final_logit_softcapping", 30.0)),
    }


def _gemma3(meta: Metadata, common: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    layers = common["num_hidden_layers"]
    windowed = bool(meta.get("attention.sliding_window"))
    softcap = meta.get("final_logit_softcapping")
    local = float(meta.get("rope.freq_base_swa", 10000.0))
    glob = common["rope_parameters"]
    if meta.get("rope.freq_base") is None:
        glob["rope_theta"] = 1e6
    return {
        **_gemma(meta, common),
        "layer_types": _layer_types(meta, layers, 6) if windowed else ["full_attention"] * layers,
        "final_logit_softcapping": None if softcap is None else float(softcap),
        "rope_parameters": {
            "full_attention": glob,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _granite(meta: Metadata, common: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    if meta.get("rope.scaling.finetuned") is False:
        raise UnsupportedError("this granite model has no position embedding: not supported")
    return {
        "attention_multiplier": float(meta.get("attention.scale") or common["head_dim"] ** -0.5),
        "embedding_multiplier": float(meta.get("embedding_scale") or 1.0),
        "residual_multiplier": float(meta.get("residual_scale") or 1.0),
        "logits_scaling": float(meta["logit_scale"]),
    }


def _olmo2(meta: Metadata, common: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    if meta.get("attention.sliding_window"):
        raise UnsupportedError("olmo2.attention.sliding_window is set: OLMo 3 is not supported")
    return {}


def _phi3(meta: Metadata, common: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    original = meta.get("rope.scaling.original_context_length", common["max_position_embeddings"])
    return {"original_max_position_embeddings": int(original)}


def _stablelm(meta: Metadata, common: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    # Of tensors, not of the key `use_parallel_residual`: converters write it where it is not so.
    return {
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
        "use_qkv_bias": common["attention_bias"],
        "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
    }


def _gptneox(meta: Metadata, common: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "use_parallel_residual": bool(meta.get("use_parallel_residual", True)),
        "attention_bias": "blk.0.attn_qkv.bias" in tensors,
        "hidden_act": "gelu",
    }


_OWN: dict[str, Callable[[Metadata, dict[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gptneox": _gptneox,
    "granite": _granite,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "stablelm": _stablelm,
}
