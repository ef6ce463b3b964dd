"""Rotary position embeddings of every kind, as inverse frequencies and one factor.

`dynamic` and `longrope` change their frequencies when a context outgrows what the model was
trained on first. K/V that are cached cannot follow, so the export decides: contexts of at most
that length take the original frequencies, longer ones those for `max_length` tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dash_onnx.errors import ContextLengthError, UnsupportedError
from dash_onnx.manifest import Rope

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def context_length(config: PretrainedConfig, asked: int | None) -> int:
    """Tokens of context: what was asked for, or what the model needs no other frequencies for.

    Raises:
        ContextLengthError: more than the model can do.
    """
    usual = longest = int(config.max_position_embeddings)
    parameters: dict[str, Any] = config.rope_parameters or {}
    kind = parameters.get("rope_type")
    if kind == "dynamic":
        longest = int(longest * parameters["factor"])
    elif kind == "longrope":
        usual = int(parameters["original_max_position_embeddings"])
    if asked is not None and not 1 <= asked <= longest:
        raise ContextLengthError(
            f"--max-length {asked} is outside 1..{longest}, what the model was trained for"
        )
    return asked or usual


def rope_of(config: PretrainedConfig, length: int, layer_type: str | None = None) -> Rope:
    """The rotary embedding for contexts of at most `length` tokens.

    Args:
        layer_type: which of the config's embeddings, where layers have different ones.

    Raises:
        UnsupportedError: of another kind.
    """
    parameters: dict[str, Any] = config.rope_parameters or {}
    if layer_type is not None:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if kind not in KINDS:
        raise UnsupportedError(
            f"RoPE type {kind!r} is not supported; supported: {', '.join(KINDS)}"
        )
    if kind == "default":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotated = int(head * (parameters.get("partial_rotary_factor") or 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
        inv_freq, scaling = 1.0 / parameters["rope_theta"] ** exponents, 1.0
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length, layer_type=layer_type)
    return Rope(inv_freq=tuple(inv_freq.float().tolist()), attention_scaling=float(scaling))
