"""Weights of BitNet checkpoints as BitLinear layers use them: -s, 0 and s.

Source: transformers' `integrations/bitnet.py`. The layers also round their inputs to INT8 per
token, which is not part of the weights: that is left to the precision of the graphs.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.exporters.quantize.blockwise import Quantized
from dash_onnx.exporters.sources.source import Weights, Wrapped, finite

_PACKED = 4  # rows per byte
_MIN_SCALE = 1e-5  # floor of the mean magnitude of weights that are not ternary yet
_LAYER = re.compile(r"\w+\.layers\.\d+\..+\.weight")


class BitLinearWeights(Wrapped):
    """Weights of another source, with those of linear layers as they are applied."""

    def __init__(self, weights: Weights, quantization: dict[str, Any]):
        """Takes the weights, and the config's `quantization_config`.

        Raises:
            SourceError: `quantization_config` is damaged.
            UnsupportedError: the layers compute something else.
        """
        if quantization.get("use_rms_norm"):
            raise UnsupportedError(
                "bitnet with use_rms_norm is not supported: it adds norms to linear layers"
            )
        super().__init__(weights)
        self._online = quantization.get("quantization_mode") == "online"
        self._divided = quantization.get("linear_class", "bitlinear") == "bitlinear"
        self._left = quantization.get("modules_to_not_convert") or []
        if not isinstance(self._left, list) or not all(isinstance(x, str) for x in self._left):
            raise SourceError("modules_to_not_convert must be a list of names of modules")

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        shape = self.stored.shape(name)
        return (shape[0] * _PACKED, *shape[1:]) if self._scale(name) in self.stored else shape

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.stored[name]
        if (scale := self._scale(name)) in self.stored:
            factor = self.stored[scale].float().flatten()
            if len(factor) != 1:
                raise SourceError(f"{scale} holds {len(factor)} numbers, not one")
            return finite(name, _unpacked(name, weight) * (1 / factor if self._divided else factor))
        return _rounded(weight) if self._online and self._converted(name, weight) else weight

    def packed(self, name: str) -> Quantized | None:
        """See `Weights`."""
        return None if self._scale(name) in self.stored else self.stored.packed(name)

    @staticmethod
    def _scale(name: str) -> str:
        return f"{name}_scale"

    def _converted(self, name: str, weight: torch.Tensor) -> bool:
        """Whether a weight belongs to a linear layer that rounds it when it runs."""
        linear = weight.dim() == 2 and _LAYER.fullmatch(name) is not None
        return linear and not any(f".{left}." in f".{name}" for left in self._left)


def _unpacked(name: str, bytes_: torch.Tensor) -> torch.Tensor:
    """-1, 0 and 1 `[N, K]` from uint8 `[N / 4, K]`; each byte holds one row of every quarter."""
    if bytes_.dtype != torch.uint8:
        raise SourceError(f"{name} has a scale and is not packed: {bytes_.dtype}, not uint8")
    levels = torch.cat([(bytes_ >> shift) & 3 for shift in range(0, 8, 2)])
    if (levels == 3).any():
        raise SourceError(f"{name} has values beyond -1, 0 and 1: the weights are damaged")
    return levels.float() - 1


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """Rounds to the nearest of -s, 0 and s, with s the mean magnitude of the weights."""
    weight = weight.float()
    scale = 1.0 / weight.abs().mean().clamp_(min=_MIN_SCALE)
    return (weight * scale).round().clamp(-1, 1) / scale
