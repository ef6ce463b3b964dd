"""The rotary embedding of a GGUF file, in transformers' terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.exporters.sources.gguf_metadata import Metadata

# By default transformers rotates only a part of their heads.
_PARTLY_ROTATED = ("glm4", "gptneox", "qwen35", "stablelm")

_STOPS = 1e20  # smallest factor that stops the rotation


def rope_parameters(
    meta: Metadata, tensors: Mapping[str, Any], head_dim: int, length: int
) -> dict[str, Any]:
    """The rotary embedding, of any kind that GGUF can hold, in transformers' terms.

    Raises:
        SourceError: its sizes are not valid.
        UnsupportedError: its kind is not known, or there are two at once.
    """
    rotated = int(meta.get("rope.dimension_count", head_dim))
    if not 2 <= rotated <= head_dim:
        raise SourceError(f"the GGUF file rotates {rotated} of {head_dim} dimensions of a head")
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
        # Llama 3's frequencies, already computed. transformers has the formula, but only
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
        if (both := meta.get("rope.scaling.yarn_log_multiplier")) is not None:
            parameters |= {"mscale": float(both), "mscale_all_dim": float(both)}
    elif kind == "linear" and factor != 1.0:
        parameters |= {"rope_type": "linear", "factor": factor}
    return parameters


def proportional(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Gemma 4's rotary embedding: factors in the file stop all but the first dimensions.

    Args:
        rope: what `rope_parameters` makes of the factors.
        head_dim: dimensions of a head.

    Raises:
        UnsupportedError: the factors do something else.
    """
    factors = rope.get("short_factor", [1.0] * (head_dim // 2))
    turning = factors.count(1.0)
    plain = rope["rope_type"] == ("longrope" if "short_factor" in rope else "default")
    if not plain or any(factor < _STOPS for factor in factors[turning:]):
        raise UnsupportedError("the RoPE of the GGUF file is not that of a Gemma 4 model")
    return {
        "rope_type": "proportional",
        "partial_rotary_factor": 2 * turning / head_dim,
        "rope_theta": rope["rope_theta"],
    }
