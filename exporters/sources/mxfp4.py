"""Weights of experts in MXFP4, as in gpt-oss checkpoints: 4-bit floats, 32 per scale."""

from __future__ import annotations

import torch

from dash_onnx.core.errors import SourceError
from dash_onnx.exporters.sources.source import Wrapped, finite

_SIZE = 32  # values in a block
_LARGEST = 127 + 125  # limit of the exponents: times 6, still finite in float32


class Mxfp4Weights(Wrapped):
    """Weights of another source; those in MXFP4 become BF16, which holds them exactly."""

    def __contains__(self, name: str) -> bool:
        return name in self.stored or self._is_packed(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`: transformers has these matrices transposed."""
        if not self._is_packed(name):
            return self.stored.shape(name)
        scales = self.stored.shape(f"{name}_scales")
        stored = self.stored.shape(f"{name}_blocks")
        if len(scales) != 3 or stored != (*scales, _SIZE // 2):
            raise SourceError(f"{name} is not in MXFP4: blocks {[*stored]}, scales {[*scales]}")
        experts, rows, blocks = scales
        return experts, blocks * _SIZE, rows

    def __getitem__(self, name: str) -> torch.Tensor:
        if not self._is_packed(name):
            return self.stored[name]
        # Not a public function: if it moves, other models must still work.
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        self.shape(name)  # refuses others
        blocks, scales = self.stored[f"{name}_blocks"], self.stored[f"{name}_scales"]
        if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise SourceError(f"{name} is not in MXFP4: {blocks.dtype}, {scales.dtype}, not uint8")
        if (scales > _LARGEST).any():
            raise SourceError(f"{name} has scales that are not finite: the weights are damaged")
        return finite(name, convert_moe_packed_tensors(blocks, scales))

    def _is_packed(self, name: str) -> bool:
        return f"{name}_blocks" in self.stored and f"{name}_scales" in self.stored
