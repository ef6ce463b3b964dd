"""A mixture of experts in torch, from the weights that its graph stores."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dash_onnx.core.block import Experts
from dash_onnx.exporters.architectures.base import Linear

F = torch.nn.functional


def experts_of(layers: Mapping[str, Linear], sizes: Experts, x: torch.Tensor) -> torch.Tensor:
    """What the experts of each token add, weighted.

    Args:
        layers: the linear layers of a decoder layer, see `Mixture`.
        sizes: of the experts.
        x: what the router and they read, `[..., D]`.

    Returns:
        `[..., D]`; the gradient goes through the weights of the chosen experts, not their choice.
    """
    rows = x.flatten(0, -2)
    # In float32 under autocast too: rounded scores would choose other experts.
    with torch.autocast(x.device.type, enabled=False):
        scores = F.linear(rows.float(), layers["router"].weight.float()).softmax(-1)
    weights, chosen = scores.topk(sizes.per_token, -1)  # [rows, k]
    if sizes.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    up, down = (layers[f"experts_{name}"].weight.chunk(sizes.count) for name in ("up", "down"))
    total = torch.zeros_like(rows)
    for expert in chosen.unique().tolist():
        row, place = torch.where(chosen == expert)
        gate, value = F.linear(rows[row], up[expert]).unflatten(-1, (-1, 2)).unbind(-1)
        added = F.linear(F.silu(gate) * value, down[expert])
        total = total.index_add(0, row, (added * weights[row, place, None]).to(total.dtype))
    return total.view_as(x)
