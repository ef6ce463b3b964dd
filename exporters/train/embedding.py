"""The start of a pass: the token embedding, and what layers read in addition to their input."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import EMBED_PATH
from dash_onnx.core.rope import rotary_tables
from dash_onnx.exporters.train.stored import dequantized, norm_of

Tensor = torch.Tensor

_STORED = ("values", "scales")  # parts of a row in INT8


@dataclass
class Beside:
    """What layers read in addition to their input, in one pass.

    Attributes:
        rotary: cosine and sine `[T, rotary_dim / 2]` of each of the model's rotary embeddings.
        per_layer: embeddings of the tokens for each layer, `[B, T, L, P]`, or None.
        shared: by layer, keys and values that later layers read, as returned by `qkv`.
    """

    rotary: list[tuple[Tensor, Tensor]]
    per_layer: Tensor | None = None
    shared: dict[int, Tensor] = field(default_factory=dict)


class Embedding:
    """The token embedding of a bundle; only the rows of input tokens are read."""

    def __init__(self, bundle: Bundle):
        """Maps its files.

        Raises:
            BundleError: one is missing or damaged.
        """
        path, self._manifest = bundle.verified(EMBED_PATH), bundle.manifest
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        self._found = {tensor.name: _array(tensor, path.parent) for tensor in tensors}

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids `[B, T]` -> hidden states `[B, T, D]` float32."""
        found, rows = self._found, self._rows("embedding", ids)
        x = rows.view(*ids.shape, -1) * np.asarray(found.get("embedding_scale", 1.0)).item()
        if "embedding_norm" in found:
            x = norm_of(found, "embedding_norm")(x, self._manifest.block)
        return x

    def beside(self, ids: Tensor) -> Beside:
        """What layers read in addition to their input, for token ids `[B, T]`."""
        tables = [rotary_tables(rope, ids.shape[1], "float32") for rope in self._manifest.ropes]
        rotary = [(torch.as_tensor(cos), torch.as_tensor(sin)) for cos, sin in tables]
        reads = self._manifest.block.per_layer_width > 0
        return Beside(rotary, self._per_layer(ids) if reads else None)

    def _rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows `[B * T, n]` of a table, float32; the others, gigabytes of some, are not read."""
        found, tokens = self._found, ids.flatten().numpy(force=True)
        if name in found:
            return torch.as_tensor(found[name][tokens]).float()
        stored = {f"{name}.{part}": found[f"{name}.{part}"][tokens] for part in _STORED}
        return dequantized(stored, name, self._manifest.target.block_size, torch.float32)

    def _per_layer(self, ids: Tensor) -> Tensor:
        found, block, x = self._found, self._manifest.block, self(ids)
        rows = self._rows("per_layer.rows", ids).view(*ids.shape, -1, block.per_layer_width)
        projected = x @ torch.tensor(found["per_layer_projection.weight"]).float()
        epsilon = block.norm_epsilon * x.shape[-1]  # as in the graph
        norm = norm_of(found, "per_layer.norm")
        normed = norm(projected.view_as(rows), replace(block, norm_epsilon=epsilon))
        return rows * np.asarray(found["per_layer.scale"]).item() + normed


def _array(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[Any]:
    if not uses_external_data(tensor):
        return numpy_helper.to_array(tensor)
    place, dtype = ExternalDataInfo(tensor), helper.tensor_dtype_to_np_dtype(tensor.data_type)
    file, shape = folder / place.location, tuple(tensor.dims)
    return np.memmap(file, dtype, "r", place.offset or 0, shape)
