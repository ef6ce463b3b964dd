"""A mixture of experts in torch, from the weights stored in its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from dash_onnx.core.block import Experts
from dash_onnx.exporters.train.stored import StoredLinear

F = torch.nn.functional


def experts_of(
    layers: Mapping[str, StoredLinear],
    choice_bias: torch.Tensor | None,
    sizes: Experts,
    x: torch.Tensor,
    rounded: Callable[[torch.Tensor, StoredLinear], torch.Tensor],
) -> torch.Tensor:
    """The weighted sum of each token's experts.

    Args:
        layers: the linear layers of a decoder layer, see `Mixture`.
        choice_bias: see `Mixture`.
        sizes: sizes of the experts.
        x: input of the router and the experts, `[..., D]`.
        rounded: the input of an expert's product, as its kernel rounds it.

    Returns:
        `[..., D]`; the gradient flows through the weights of the chosen experts, not their choice.
    """
    rows = x.flatten(0, -2)
    # In float32 even under autocast: rounded scores could choose other experts.
    with torch.autocast(x.device.type, enabled=False):
        router = layers["router"]
        bias = None if router.bias is None else router.bias.float()
        scores = F.linear(rows.float(), router.weight.float(), bias)
    scores = scores.softmax(-1) if sizes.scoring == "softmax" else scores.sigmoid()
    by = scores if choice_bias is None else scores + choice_bias
    chosen = by.topk(sizes.per_token, -1).indices  # [rows, k]
    weights = scores.gather(-1, chosen)
    if sizes.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * sizes.factor
    up, up_bias = _apart(layers["experts_up"], sizes)
    down, down_bias = _apart(layers["experts_down"], sizes)
    total = torch.zeros_like(rows)
    for expert in chosen.unique().tolist():
        row, place = torch.where(chosen == expert)
        both = F.linear(rounded(rows[row], layers["experts_up"]), up[expert], up_bias[expert])
        gate, value = both.unflatten(-1, (-1, 2)).unbind(-1)
        if (limit := sizes.limit) is not None:
            gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
        opened = gate * (sizes.gate_slope * gate).sigmoid() * (value + sizes.up_offset)
        added = F.linear(rounded(opened, layers["experts_down"]), down[expert], down_bias[expert])
        total = total.index_add(0, row, (added * weights[row, place, None]).to(total.dtype))
    return total.view_as(x)


def _apart(
    linear: StoredLinear, sizes: Experts
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor | None]]:
    """Weights and biases of each expert."""
    bias = linear.bias
    biases = [None] * sizes.count if bias is None else bias.view(sizes.count, -1).unbind()
    return linear.weight.chunk(sizes.count), biases
