"""Runs freshly written graphs over the calibration tokens: the load test and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from dash_onnx.actions import Action
from dash_onnx.block import Block
from dash_onnx.exporters.architectures.base import ModelSpec, Norm
from dash_onnx.exporters.calibrate import SINK_TOKENS, Ids
from dash_onnx.exporters.graphs import HIDDEN
from dash_onnx.rope import rotary_tables
from dash_onnx.runtime.ort import Device, create_session

_RIDGE = 0.01  # of the mean diagonal: keeps directions that calibration hardly saw near zero

_TURN = 8  # sequences

Hidden = npt.NDArray[np.floating]
"""`[sequences, length, D]`."""


@dataclass(frozen=True)
class Runner:
    """Runs graphs of a model outside the runtime, each sequence from an empty K/V cache.

    Attributes:
        device: where the graphs run; the CPU can run those built for CUDA, slowly.
    """

    spec: ModelSpec
    device: Device

    def embed(self, path: Path, ids: Ids) -> Hidden:
        """Token ids `[sequences, length]` -> hidden states."""
        session = create_session(path, self.device)
        return np.concatenate([session.run(["hidden"], {"input_ids": row[None]})[0] for row in ids])

    def layer(self, index: int, path: Path, hidden: Hidden) -> Hidden:
        """Output of a graph of one layer."""
        session = create_session(path, self.device)
        rows = [session.run(["hidden_out"], self._feeds(index, x))[0] for x in hidden]
        return np.concatenate(rows)

    def layer_with_hessians(
        self, index: int, path: Path, hidden: Hidden, taps: Mapping[str, str]
    ) -> tuple[Hidden, dict[str, torch.Tensor]]:
        """Output of a layer graph, and the sum of x x^T of the inputs of each linear layer.

        Args:
            index: of the layer.
            path: its graph in full precision.
            hidden: its input.
            taps: by linear layer, the value inside the graph that is its input.

        Returns:
            The output, and by linear layer `[K, K]` float32 over all calibration tokens.
        """
        create_session(path, self.device)  # the file itself must load; what runs is a copy
        model = onnx.load(path)
        inside = [name for name in dict.fromkeys(taps.values()) if name != HIDDEN]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside)
        session = create_session(model.SerializeToString(), self.device)
        sums: dict[str, Any] = dict.fromkeys(taps.values(), 0.0)
        rows = []
        # In turns of several sequences: ORT's threads spin for a while after each run, on the
        # cores that torch then needs.
        for start in range(0, len(hidden), _TURN):
            part = hidden[start : start + _TURN]
            runs = [session.run(["hidden_out", *inside], self._feeds(index, x)) for x in part]
            rows += [run[0] for run in runs]
            for name in sums:
                if name == HIDDEN:
                    values = part
                else:
                    at = 1 + inside.index(name)
                    values = np.concatenate([run[at] for run in runs])
                flat = torch.from_numpy(values).float().flatten(0, -2)  # [tokens, K]
                sums[name] = sums[name] + flat.T @ flat
        return np.concatenate(rows), {linear: sums[name] for linear, name in taps.items()}

    def head(self, path: Path, hidden: Hidden) -> None:
        """Loads a head graph and runs it on the last token of the first sequence."""
        session = create_session(path, self.device)
        logits = session.run(["logits"], {"hidden": hidden[:1, -1:]})[0]
        if not np.isfinite(logits).all():
            raise FloatingPointError(f"{path} gives logits that are not finite")

    def _feeds(self, index: int, x: Hidden) -> dict[str, np.ndarray]:
        facts, length = self.spec.facts, x.shape[0]
        rope = self.spec.ropes[self.spec.attention[index].rope or 0]
        cos, sin = rotary_tables(rope, length, x.dtype.name)
        cache = np.zeros((1, facts.num_kv_heads, length, facts.head_dim), x.dtype)
        return {
            HIDDEN: x[None],
            "past_key": cache,
            "past_value": cache,
            "seqlens_k": np.array([length - 1], np.int32),
            "total_sequence_length": np.array(length, np.int32),
            "start": np.zeros(1, np.int64),
            "cos_cache": cos,
            "sin_cache": sin,
        }


def scale_and_cosine(x: Hidden, y: Hidden) -> tuple[float, float]:
    """Means over tokens of ||y|| / ||x|| and of cos(x, y), sink tokens left out."""
    x, y = (h[:, SINK_TOKENS:].astype(np.float64) for h in (x, y))
    x_norm, y_norm = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    scale = np.mean(y_norm / x_norm)
    cosine = np.mean(np.sum(x * y, -1) / (x_norm * y_norm))
    return float(scale), float(cosine)


def compensation(
    x: Hidden, y: Hidden, norm: Norm | None, block: Block, scale: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best map of a rank from the input of attention to `y - scale * x`, sink tokens left out.

    Reduced-rank regression: the least-squares map, projected onto the leading directions of what
    it predicts. K and V read the same, so the skip graph has one product for all three; a norm
    there bounds what the map can return, however large a hidden state grows.

    Args:
        x: input of the layer.
        y: its output.
        norm: before its attention.
        block: of the model.
        scale: see `LayerFacts`.
        rank: r.

    Returns:
        A `[rank, D]` and B `[D, rank]` of the map B A.
    """
    x, y = (h[:, SINK_TOKENS:] for h in (x, y))
    inputs = normed(x, norm, block)
    missing = torch.from_numpy(y - np.float32(scale) * x).float().flatten(0, 1)
    gram = inputs.T @ inputs
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    cross = inputs.T @ missing
    linear = torch.linalg.solve(gram, cross)  # [D, D], in x out
    _, directions = torch.linalg.eigh(cross.T @ linear)  # of the predictions, ascending
    best = directions[:, -rank:]
    return (linear @ best).T.contiguous(), best.contiguous()


def relative_errors(reference: Hidden, outputs: dict[Action, Hidden]) -> dict[Action, float]:
    """||output - reference|| / ||reference|| over all tokens but the sinks."""
    reference = reference[:, SINK_TOKENS:].astype(np.float64)
    norm = np.linalg.norm(reference)
    return {
        action: float(np.linalg.norm(output[:, SINK_TOKENS:] - reference) / norm)
        for action, output in outputs.items()
    }


def normed(hidden: Hidden, norm: Norm | None, block: Block) -> torch.Tensor:
    """What a linear layer behind a norm reads, `[tokens, D]` float32."""
    x = torch.from_numpy(hidden).float().flatten(0, 1)
    return x if norm is None else norm(x, block)
