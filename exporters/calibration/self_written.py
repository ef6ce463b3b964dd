"""Text that a model writes itself, sampled at temperature 1, for calibration and for training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dash_onnx.core.arrays import Ids
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import BundleError
from dash_onnx.core.progress import Phase
from dash_onnx.runtime.backend import open_backend
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Sessions

DOCUMENT_TOKEN = "<|endoftext|>"
"""What separates documents in the training text of most models with a byte-level BPE."""

_BATCH = 96  # sequences that are written side by side at most
_BLOCK = 1024  # tokens of the vocabulary
KV_BYTES = 512 << 20
"""Of all of them at most."""


def write_text(
    bundle: Bundle, first: Ids, length: int, generator: np.random.Generator, label: str
) -> Ids:
    """Lets a bundle write sequences, at INT8 where it has it.

    Args:
        bundle: whose layers run.
        first: `[n]`, the token that each sequence begins with.
        length: tokens of a sequence, the first included.
        generator: of what is drawn.
        label: of the progress.

    Returns:
        Token ids `[n, length]`.

    Raises:
        BundleError: the graphs take one sequence only.
    """
    sessions = Sessions(bundle, open_backend(bundle.manifest.target.device))
    if sessions.embed().get_inputs()[0].shape[0] == 1:
        raise BundleError(f"{bundle.folder} is of an earlier version of dash-onnx; export again")
    manifest, dims = bundle.manifest, bundle.manifest.dims
    layers = manifest.model.num_layers
    best = "int8" if "int8" in manifest.variants else manifest.variants[0]
    decider = FixedPath((best,) * layers, manifest.heads[best])
    kv_bytes = 2 * layers * dims.num_kv_heads * dims.head_dim * np.dtype(dims.dtype).itemsize
    batch = int(np.clip(KV_BYTES // (kv_bytes * length), 1, _BATCH))
    parts = np.array_split(first, -(-len(first) // batch))
    rows = []
    with Phase(label, total=len(first) * (length - 1), unit="tokens") as phase:
        for part in parts:
            sequence = sessions.new_sequence(length, len(part))
            ids = np.empty((len(part), length), np.int64)
            ids[:, 0] = part
            for position in range(length - 1):
                ids[:, position + 1] = _next(sequence, decider, ids[:, position], generator)
                phase.update(len(part))
            rows.append(ids)
    return np.concatenate(rows)


def _next(
    sequence: SequenceState, decider: FixedPath, tokens: Ids, generator: np.random.Generator
) -> Ids:
    """Runs a token of each sequence and draws the next ones, `[n]`."""
    logits = sequence.forward(tokens[:, None], decider)[0].reshape(len(tokens), -1)
    return np.array([_draw(row, generator) for row in logits], np.int64)


def _draw(logits: npt.NDArray[np.floating], generator: np.random.Generator) -> int:
    """A token by the inverse of the distribution function, of blocks and then inside of one."""
    weights = np.exp(logits - logits.max(), dtype=np.float32)
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    heights = np.cumsum(sums)
    drawn = generator.random() * heights[-1]
    block = int(np.searchsorted(heights, drawn, side="right"))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    place = int(np.searchsorted(inside, drawn - (heights[block] - sums[block]), side="right"))
    return block * _BLOCK + min(place, len(inside) - 1)
