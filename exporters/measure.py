"""Runs freshly written graphs over the calibration tokens: the load test and the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from dash_onnx.core.actions import Action
from dash_onnx.core.block import Block
from dash_onnx.core.rope import rotary_tables
from dash_onnx.exporters.architectures.base import ModelSpec, Norm
from dash_onnx.exporters.calibrate import SINK_TOKENS, Ids
from dash_onnx.exporters.graphs import HIDDEN
from dash_onnx.exporters.states import Hidden, States
from dash_onnx.runtime.ort import Device, create_session

_EXACT_WIDTH = 1024  # beyond it all eigenvectors of a matrix take too long
_ITERATIONS = 8  # each weakens what is not leading

_RIDGE = 0.01  # of the mean diagonal: keeps directions that calibration hardly saw near zero


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
        self,
        index: int,
        path: Path,
        hidden: States,
        out: States,
        taps: Mapping[str, str],
        sink_weight: float,
    ) -> dict[str, torch.Tensor]:
        """Writes the output of a layer graph, and sums x x^T of the inputs of each linear layer.

        Args:
            index: of the layer.
            path: its graph in full precision.
            hidden: its input.
            out: its output.
            taps: by linear layer, the value inside the graph that is its input.
            sink_weight: of the first tokens of each sequence in the sums.

        Returns:
            By linear layer, `[K, K]` float32 over all calibration tokens.
        """
        inside = [name for name in dict.fromkeys(taps.values()) if name != HIDDEN]
        session = self._tapped(path, inside)
        sums: dict[str, torch.Tensor] = {}
        with out.writing(len(hidden)) as states:
            # In turns of several sequences: ORT's threads spin for a while after each run, on the
            # cores that torch then needs.
            for part in hidden.turns():
                runs = [session.run(["hidden_out", *inside], self._feeds(index, x)) for x in part]
                for run in runs:
                    states.add(run[0])
                for name in dict.fromkeys(taps.values()):
                    if name == HIDDEN:
                        values = part
                    else:
                        at = 1 + inside.index(name)
                        values = np.concatenate([run[at] for run in runs])
                    x = torch.from_numpy(values).float()  # [sequences, length, K]
                    if name not in sums:
                        sums[name] = torch.zeros(x.shape[-1], x.shape[-1])
                    sinks, others = (
                        part.flatten(0, 1) for part in (x[:, :SINK_TOKENS], x[:, SINK_TOKENS:])
                    )
                    sums[name].addmm_(others.T, others).addmm_(sinks.T, sinks, alpha=sink_weight)
        return {linear: sums[name] for linear, name in taps.items()}

    def _tapped(self, path: Path, taps: Sequence[str]) -> Any:
        """A session whose graph has values of its inside as further outputs."""
        if not taps:
            return create_session(path, self.device)
        model = onnx.load(path, load_external_data=False)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps)
        tapped = path.with_name(f"{path.stem}.tapped.onnx")  # beside the weights, which it shares
        tapped.write_bytes(model.SerializeToString())
        try:
            return create_session(tapped, self.device)
        finally:
            tapped.unlink()

    def head(self, path: Path, hidden: States) -> None:
        """Loads a head graph and runs it on the last token of the first sequence."""
        session = create_session(path, self.device)
        logits = session.run(["logits"], {"hidden": hidden[:1][:, -1:]})[0]
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
    ratios, cosines = [], []
    for before, after in zip(x, y, strict=True):
        before, after = (h[SINK_TOKENS:].astype(np.float64) for h in (before, after))
        before_norm, after_norm = (np.linalg.norm(h, axis=-1) for h in (before, after))
        ratios.append(after_norm / before_norm)
        cosines.append(np.sum(before * after, -1) / (before_norm * after_norm))
    return float(np.mean(ratios)), float(np.mean(cosines))


def compensation(
    x: States, y: States, norm: Norm | None, block: Block, scale: float, rank: int
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
    gram = cross = torch.zeros(())
    for before, after in zip(x.turns(), y.turns(), strict=True):
        before, after = (h[:, SINK_TOKENS:] for h in (before, after))
        inputs = normed(before, norm, block)
        missing = torch.from_numpy(after - np.float32(scale) * before).float().flatten(0, 1)
        gram = gram + inputs.T @ inputs
        cross = cross + inputs.T @ missing
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    linear = torch.linalg.solve(gram, cross)  # [D, D], in x out
    best = _leading(cross.T @ linear, rank)  # directions of the predictions
    return (linear @ best).T.contiguous(), best.contiguous()


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal basis `[D, rank]` of the leading directions of a positive semidefinite matrix."""
    size = len(matrix)
    if size <= _EXACT_WIDTH:
        return torch.linalg.eigh(matrix).eigenvectors[:, -rank:]
    # Subspace iteration (Halko et al., arXiv 0909.4061): at 3072 in 1 % of the time of `eigh`.
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(size, 2 * rank, generator=generator)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    inside = torch.linalg.eigh(basis.T @ matrix @ basis).eigenvectors[:, -rank:]
    return basis @ inside


def relative_errors(reference: Hidden, outputs: dict[Action, Hidden]) -> dict[Action, float]:
    """||output - reference|| / ||reference|| over all tokens but the sinks."""
    norm = _squared(reference)
    return {
        action: (_squared(output, reference) / norm) ** 0.5 for action, output in outputs.items()
    }


def _squared(x: Hidden, y: Hidden | None = None) -> float:
    """Square of the norm of x, or of x - y, over all tokens but the sinks."""
    total = 0.0
    for index, states in enumerate(x):
        states = states[SINK_TOKENS:].astype(np.float64)
        if y is not None:
            states -= y[index, SINK_TOKENS:]
        total += float(np.square(states).sum())
    return total


def gram_of(hidden: States, norm: Norm | None, block: Block) -> torch.Tensor:
    """Sum of x x^T, `[D, D]`, of what a linear layer behind a norm reads."""
    total = torch.zeros(())
    for part in hidden.turns():
        inputs = normed(part, norm, block)
        total = total + inputs.T @ inputs
    return total


def normed(hidden: Hidden, norm: Norm | None, block: Block) -> torch.Tensor:
    """What a linear layer behind a norm reads, `[tokens, D]` float32."""
    x = torch.from_numpy(hidden).float().flatten(0, 1)
    return x if norm is None else norm(x, block)
