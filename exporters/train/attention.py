"""Causal attention of heads in torch, as the graphs compute it."""

from __future__ import annotations

import torch

from dash_onnx.core.block import Block

Tensor = torch.Tensor
F = torch.nn.functional


def attention(
    q: Tensor, k: Tensor, v: Tensor, block: Block, window: int | None, sinks: Tensor | None
) -> Tensor:
    """Outputs of the heads, `[B, H, T, d]`, like all three inputs.

    Args:
        q: queries.
        k: keys, repeated for the queries that share them.
        v: values, repeated like the keys.
        block: what all layers compute.
        window: most tokens that a token sees, or None.
        sinks: `[H]`, see `Layer`, or None.
    """
    scale, cap, length = block.attention_scale, block.attention_softcap, q.shape[2]
    if cap is None and sinks is None and (window is None or window >= length):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    if cap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    # In BF16, scores near the cap would be off by a tenth.
    with torch.autocast(q.device.type, enabled=False):
        scores = q.float() @ k.float().transpose(-1, -2) * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            added = sinks[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, added], -1)
        return scores.softmax(-1)[..., :length] @ v.float()


def by_head(x: Tensor, size: int) -> Tensor:
    """`[B, T, heads * d]` -> `[B, heads, T, d]`."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first `2 * cos.shape[-1]` dimensions of heads `[B, H, T, d]`."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
