"""Rotary position embeddings of every kind, as inverse frequencies and one factor.

`dynamic` and `longrope` change their frequencies when a context outgrows the model's original
training length. Cached K/V cannot follow, so the export decides: contexts of at most that length
use the original frequencies, longer ones those for `max_length` tokens.

ONNX Runtime's attention rotates multiples of 16 dimensions. Where a model rotates another number,
all dimensions of a head are rotated, most of them by zero, and `head_order` moves the pairs to
their places. It also does so where a model pairs other dimensions than the two halves of the
rotated part.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dash_onnx.core.errors import ContextLengthError, SourceError, UnsupportedError
from dash_onnx.core.facts import Rope

Pairs = Literal["halves", "swapped", "neighbours"]
"""The dimensions of a head that rotate together: j of the first and of the second half of the
rotated part, the same in the opposite direction, or 2 j and 2 j + 1."""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Layer types, in the order of their rotary embeddings where these differ."""

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def context_length(config: PretrainedConfig, asked: int | None) -> int:
    """Context length in tokens: as requested, or the longest that needs no change of frequencies.

    Raises:
        ContextLengthError: the request exceeds what the model supports.
    """
    usual = longest = int(config.max_position_embeddings)
    parameters: dict[str, Any] = config.rope_parameters or {}
    kind = parameters.get("rope_type")
    if kind == "dynamic":
        longest = int(longest * parameters["factor"])
    elif kind in ("linear", "yarn"):
        original = parameters.get("original_max_position_embeddings", usual)
        longest = max(longest, int(original * parameters["factor"]))
    elif kind == "longrope":
        usual = int(parameters["original_max_position_embeddings"])
    if asked is not None and not 1 <= asked <= longest:
        raise ContextLengthError(
            f"--max-length {asked} is outside 1..{longest}, what the model was trained for"
        )
    return asked or usual


def rope_of(
    config: PretrainedConfig,
    length: int,
    layer_type: str | None = None,
    base: float | None = None,
) -> Rope:
    """The rotary embedding for contexts of at most `length` tokens.

    Args:
        config: config of the model.
        length: length of the context.
        layer_type: which of the config's embeddings, where layers have different ones.
        base: base of the frequencies, instead of the config's.

    Raises:
        UnsupportedError: the kind of embedding is not supported.
        SourceError: its base is not valid.
    """
    parameters: dict[str, Any] = config.rope_parameters or {}
    if layer_type is not None:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if kind not in KINDS:
        raise UnsupportedError(
            f"RoPE type {kind!r} is not supported; supported: {', '.join(KINDS)}"
        )
    if base is not None:
        config = copy.deepcopy(config)
        config.rope_parameters = parameters = {**parameters, "rope_theta": base}
    base = parameters.get("rope_theta", 1.0)
    if not 0 < base < np.inf:
        raise SourceError(f"the base of the rotary embedding is {base}, which cannot be")
    if kind == "dynamic" and (alpha := parameters.get("alpha")):  # Hunyuan's: one base for all
        head = config.head_dim
        kind, base = "default", base * alpha ** (head / (head - 2))
    if kind == "default":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        share = parameters.get("partial_rotary_factor")
        rotated = int(head * (1.0 if share is None else share))
        if rotated < 2:
            raise UnsupportedError("the rotary embedding turns no dimension: not supported")
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
        inv_freq, scaling = 1.0 / base**exponents, 1.0
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length, layer_type=layer_type)
    return Rope(inv_freq=tuple(inv_freq.float().tolist()), attention_scaling=float(scaling))


def widened(rope: Rope, head: int) -> Rope:
    """The rotation of heads of `head` dimensions, in `head_order`, as ONNX Runtime supports it.

    Raises:
        UnsupportedError: it does not.
    """
    pairs = len(rope.inv_freq)
    if pairs % 8 == 0 and head % 8 == 0:
        return rope
    if head % 16 or rope.attention_scaling != 1.0:  # what is not rotated must not be scaled
        raise UnsupportedError(
            f"each head rotates {2 * pairs} of {head} dimensions; ONNX Runtime's attention needs "
            "multiples of 16"
        )
    return Rope(rope.inv_freq + (0.0,) * (head // 2 - pairs), 1.0)


def head_order(rope: Rope, head: int, pairs: Pairs = "halves") -> npt.NDArray[np.int64] | None:
    """Source index of each dimension of a head; None where the order stays.

    The graphs rotate dimension j with j + r / 2, r being the number they rotate: the pairs that
    rotate come first in both halves, before the dimensions that the model does not rotate.
    """
    count, half = int(np.count_nonzero(rope.inv_freq)), len(rope.inv_freq)
    turned, still = np.arange(2 * count), np.arange(2 * count, head)
    if pairs == "neighbours":
        first, second = turned[::2], turned[1::2]
    else:
        first, second = turned[:count], turned[count:]
        if pairs == "swapped":
            first, second = second, first
    between = half - count
    order = np.concatenate([first, still[:between], second, still[between:]])
    return None if np.array_equal(order, np.arange(head)) else order
