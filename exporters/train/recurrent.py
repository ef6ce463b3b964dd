"""Layers without attention, in torch: what each token contributes, and how tokens are mixed.

Shapes: B sequences, T tokens each, D hidden size, H value heads. Tensors are float32; what linear
layers return has a lower precision under autocast.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from dash_onnx.core.block import Recurrence

F = torch.nn.functional
Tensor = torch.Tensor


def kept_of(projected: Tensor, gates: Tensor | None, vectors: Mapping[str, Tensor]) -> Tensor:
    """What later tokens read, from the rows of the input projection that a skip computes."""
    if gates is None:
        before, x = projected.chunk(2, -1)
        return before * x
    a, b = gates.float().chunk(2, -1)
    decay = vectors["decay"] * F.softplus(a + vectors["decay_bias"])
    return torch.cat([projected.float(), decay, b.sigmoid()], -1)


def mixed(own: Tensor, kept: Tensor, vectors: Mapping[str, Tensor], sizes: Recurrence) -> Tensor:
    """Input of the output projection, `[B, T, D]`.

    For a Gated DeltaNet with H heads of d values: `[B, T, H * d]`, before norm and gate.
    """
    weight, bias = vectors["conv"], vectors.get("conv.bias")
    if not sizes.value_heads:
        return own * convolved(kept, weight, bias)
    x, decay, rate = kept.split([sizes.channels, sizes.value_heads, sizes.value_heads], -1)
    x = F.silu(convolved(x, weight, bias))
    query, key, value = x.split([sizes.key_width, sizes.key_width, sizes.value_width], -1)
    result, _ = torch_chunk_gated_delta_rule(
        query.unflatten(-1, (-1, sizes.key_dim)),
        key.unflatten(-1, (-1, sizes.key_dim)),
        value.unflatten(-1, (-1, sizes.value_dim)),
        g=decay,
        beta=rate,
        use_qk_l2norm_in_kernel=True,
    )
    return result.flatten(-2)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The causal convolution of `[B, T, channels]` by `[channels, 1, kernel]`."""
    behind = F.pad(x.transpose(1, 2).float(), (weight.shape[-1] - 1, 0))
    return F.conv1d(behind, weight, bias, groups=len(weight)).transpose(1, 2)
