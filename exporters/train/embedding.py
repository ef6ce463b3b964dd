"""The start of a pass: the token embedding, and what layers read in addition to their input."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import EMBED_PATH
from dash_onnx.core.rope import rotary_tables
from dash_onnx.runtime.ort import create_session

Tensor = torch.Tensor


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
    """The token embedding of a bundle, of which nothing is trained; its table stays in its file."""

    def __init__(self, bundle: Bundle):
        """Loads the graph.

        Raises:
            BundleError: a file is missing or damaged.
        """
        self._session = create_session(bundle.verified(EMBED_PATH), "cpu")
        self._manifest = bundle.manifest

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids `[B, T]` -> hidden states `[B, T, D]` float32."""
        return self._run("hidden", ids)

    def beside(self, ids: Tensor) -> Beside:
        """What layers read in addition to their input, for token ids `[B, T]`."""
        tables = [rotary_tables(rope, ids.shape[1], "float32") for rope in self._manifest.ropes]
        rotary = [(torch.as_tensor(cos), torch.as_tensor(sin)) for cos, sin in tables]
        reads = self._manifest.block.per_layer_width > 0
        return Beside(rotary, self._run("per_layer", ids) if reads else None)

    def _run(self, name: str, ids: Tensor) -> Tensor:
        rows = ids.numpy(force=True)[:, None]  # graphs of earlier versions take one sequence
        found = [self._session.run([name], {"input_ids": row})[0] for row in rows]
        return torch.as_tensor(np.concatenate(found)).float()
