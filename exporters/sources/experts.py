"""Experts stored as one tensor each, stacked as in transformers."""

from __future__ import annotations

import re

import torch

from dash_onnx.exporters.sources.source import Weights, Wrapped

TRANSPOSED = ("qwen3_vl_moe",)
"""Types whose files may hold stacked experts as `[E, K, N]`."""

_NAME = r"(.+\.experts)\.(gate_up_proj|down_proj)"
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""By name in transformers, possible names of an expert's tensors; rows of several are stacked."""


class StackedExperts(Wrapped):
    """Weights of another source, with the experts of each layer as one tensor `[E, N, K]`."""

    def __init__(self, weights: Weights, transposed: bool = False):
        """Wraps the weights of another source, which may be of a type in `TRANSPOSED`."""
        super().__init__(weights)
        self._transposed = transposed

    def __contains__(self, name: str) -> bool:
        return name in self.stored or bool(self._parts(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        if name in self.stored or not (parts := self._parts(name)):
            shape = self.stored.shape(name)
            return (shape[0], shape[2], shape[1]) if self._turned(name) else shape
        rows = sum(self.stored.shape(part)[0] for part in parts[0])
        return len(parts), rows, *self.stored.shape(parts[0][0])[1:]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.stored or not (parts := self._parts(name)):
            weight = self.stored[name]
            return weight.transpose(1, 2) if self._turned(name) else weight
        return torch.stack([torch.cat([self.stored[one] for one in part]) for part in parts])

    def _turned(self, name: str) -> bool:
        """Whether experts are stored as `[E, K, N]`: gate and up are twice as wide as down."""
        match = re.fullmatch(_NAME, name) if self._transposed else None
        if match is None:
            return False
        up, down = (self.stored.shape(f"{match[1]}.{part}") for part in _PARTS)
        return len(up) == len(down) == 3 and up[1:] == (down[2], 2 * down[1])

    def _parts(self, name: str) -> list[tuple[str, ...]]:
        """Names of the tensors of each expert; empty if the name is not that of stacked experts."""
        match = re.fullmatch(_NAME, name)
        if match is None:
            return []
        prefix = match[1]
        for names in _PARTS[match[2]]:
            found: list[tuple[str, ...]] = []
            while f"{prefix}.{len(found)}.{names[0]}.weight" in self.stored:
                found.append(tuple(f"{prefix}.{len(found)}.{one}.weight" for one in names))
            if found:
                return found
        return []
