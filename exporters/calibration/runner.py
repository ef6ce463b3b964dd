"""Runs freshly written graphs over the calibration tokens, as a load test and for the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch

from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.rope import rotary_tables
from dash_onnx.exporters.architectures.base import ModelSpec
from dash_onnx.exporters.calibration.hidden_states import BATCH, HiddenStateFile, HiddenStates
from dash_onnx.exporters.calibration.tokens import SINK_TOKENS, Ids
from dash_onnx.exporters.graphs import HIDDEN, KVQuantization
from dash_onnx.runtime.ort import Device, create_session, has_device

_RANGES: dict[int, tuple[float, ...]] = {8: (1.5,), 4: tuple(np.arange(0.3, 1.41, 0.1))}
"""Candidate ranges as multiples of the largest K or V value of a channel, by bits: INT8 leaves
headroom for other text."""

_SINK_SHARE = 0.3
"""Weight of a sequence's first token, which often takes half of the attention (arXiv 2309.17453)
and has other keys and values than all that follow."""

_GOLDEN_RATIO = 0.618034  # its multiples, modulo 1, spread evenly, and share no period with RoPE
_GRAM_PARTS = 6  # parts of the columns of x^T x: only 21 of 6 x 6 blocks are computed


_KV = ["present_key", "present_value"]


@dataclass
class Runner:
    """Runs graphs of a model outside the runtime, each sequence from an empty K/V cache.

    It keeps what later layers read in addition to their input: the tokens, and shared K/V.
    """

    spec: ModelSpec
    device: Device

    def __post_init__(self) -> None:
        self._tokens: tuple[Path, Ids] | None = None
        self._shared: dict[int, HiddenStateFile | HiddenStates] = {}  # [sequences, 2, H_kv, S, d]

    @classmethod
    def on(cls, device: Device, spec: ModelSpec) -> Runner:
        """Without a GPU, runs graphs built for CUDA on the CPU: slow, but enough to calibrate."""
        return cls(spec, device if has_device(device) else "cpu")

    def embed(self, path: Path, ids: Ids) -> HiddenStates:
        """Token ids `[sequences, length]` -> hidden states."""
        self.reads(path, ids)
        session = create_session(path, self.device)
        return np.concatenate([session.run(["hidden"], {"input_ids": row[None]})[0] for row in ids])

    def reads(self, path: Path, ids: Ids) -> None:
        """Sets the tokens `[sequences, length]` of later runs, and the graph that embeds them."""
        self._tokens = path, ids

    def layer(
        self, index: int, path: Path, hidden: HiddenStates, *, keep: bool = True
    ) -> HiddenStates:
        """Output of a graph of one layer.

        Args:
            index: layer index.
            path: the graph.
            hidden: its input; if it has more sequences than there are tokens, the tokens repeat.
            keep: keep its K/V if later layers read them.
        """
        session, keep = create_session(path, self.device), keep and index in self._sources
        names = ["hidden_out", *(_KV if keep else [])]
        feeds = self._feeds_of(session, index)
        runs = [session.run(names, feeds(row, x)) for row, x in enumerate(hidden)]
        if keep:
            self._shared[index] = np.stack([np.concatenate(kv) for _, *kv in runs])
        return np.concatenate([run[0] for run in runs])

    @property
    def _sources(self) -> set[int | None]:
        """Layers whose K/V others read."""
        return {attention.source for attention in self.spec.attention}

    def layer_with_hessians(
        self,
        index: int,
        path: Path,
        hidden: HiddenStateFile,
        out: HiddenStateFile,
        inputs: Mapping[str, str],
        sink_weights: Mapping[str, float],
        held_out: int = 0,
    ) -> dict[str, torch.Tensor]:
        """Writes the output of a layer graph, and sums x x^T of the inputs of its linear layers.

        Args:
            index: layer index.
            path: its graph in full precision.
            hidden: its input.
            out: where its output is written.
            inputs: see `captured_inputs`.
            sink_weights: by linear layer, weights of the first tokens of each sequence in the sums.
            held_out: number of leading sequences that the sums leave out.

        Returns:
            The sums by linear layer, `[K, K]` float32.

        Raises:
            UnsupportedError: the output is not finite.
        """
        names = list(dict.fromkeys(inputs.values()))
        weights = {inputs[name]: sink_weights[name] for name in reversed(tuple(inputs))}
        captured = [name for name in names if name != HIDDEN]
        session = self._capturing_session(path, captured)
        feeds = self._feeds_of(session, index, hidden.path)
        shared = _KV if index in self._sources else []
        sums: dict[str, torch.Tensor] = {}

        def outputs() -> Iterator[HiddenStates]:
            # In batches: ORT's threads keep spinning after each run, on cores that torch needs.
            for number, batch in enumerate(hidden.batches()):
                rows = range(number * BATCH, number * BATCH + len(batch))
                runs = [
                    session.run([*captured, *shared, "hidden_out"], feeds(row, x))
                    for row, x in zip(rows, batch, strict=True)
                ]
                if shared:
                    kv = np.stack([np.concatenate(run[-3:-1]) for run in runs])
                    self._keep(index, hidden, rows, kv)
                for name in names:
                    at = None if name == HIDDEN else captured.index(name)
                    found = batch if at is None else np.concatenate([run[at] for run in runs])
                    x = torch.tensor(found, dtype=torch.float32)  # [sequences, length, K]
                    x[:, :SINK_TOKENS] *= weights[name] ** 0.5
                    if name not in sums:
                        sums[name] = torch.zeros(x.shape[-1], x.shape[-1])
                    unseen = max(held_out - rows.start, 0)
                    _add_upper(sums[name], x[unseen:].flatten(0, 1))
                found = np.concatenate([run[-1] for run in runs])
                _check_finite(found, f"layer {index}")
                yield found

        out.write(len(hidden), outputs())
        for total in sums.values():
            total.triu_().add_(total.triu(1).T)
        return {linear: sums[name] for linear, name in inputs.items()}

    def _capturing_session(self, path: Path, captured: Sequence[str]) -> Any:
        """A session whose graph has some internal values as additional outputs."""
        if not captured:
            return create_session(path, self.device)
        model = onnx.load(path, load_external_data=False)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in captured)
        return create_session(model.SerializeToString(), self.device, weights=path.parent)

    def kv_quantization(
        self,
        index: int,
        path: Path,
        hidden: HiddenStates,
        bits: Literal[4, 8],
        *,
        offset: bool,
        first: int = 0,
    ) -> KVQuantization:
        """How a quantized K/V cache loses least.

        The sequences stand at places spread over the context, half of them in its first eighth, as
        most conversations are far shorter: later, slowly rotating dimensions have values that they
        do not reach within the length of a sequence. Attention is the same at all places, because
        it depends on distances.

        Args:
            index: layer index.
            path: its graph in full precision, whose cache is not quantized.
            hidden: its input, `[sequences, length, D]`.
            bits: bits per value of the cache.
            offset: whether its keys may have an offset, see `KVQuantization`.
            first: which of the calibration's sequences is the first of `hidden`.
        """
        session = create_session(path, self.device)
        feeds = self._feeds_of(session, index)
        room = max(self.spec.facts.max_length - hidden.shape[1], 0)
        starts = [int((row * _GOLDEN_RATIO % 1) ** 3 * room) for row in range(len(hidden))]
        runs = [
            session.run(_KV, feeds(first + row, x, start))
            for row, (x, start) in enumerate(zip(hidden, starts, strict=True))
        ]
        keys, values = (np.concatenate(found).swapaxes(0, 1) for found in zip(*runs, strict=True))
        key_scale, key_offset = _least_error(keys, bits, offset=offset and bits == 4)
        value_scale, _ = _least_error(values, bits, offset=False)
        return KVQuantization(key_scale=key_scale, value_scale=value_scale, key_offset=key_offset)

    def head(self, path: Path, hidden: HiddenStateFile) -> None:
        """Loads a head graph and runs it on the last token of the first sequence.

        Raises:
            UnsupportedError: the logits are not finite.
        """
        session = create_session(path, self.device)
        logits = session.run(["logits"], {"hidden": hidden[:1][:, -1:]})[0]
        _check_finite(logits, "the LM head")

    def _keep(self, index: int, hidden: HiddenStateFile, rows: range, kv: HiddenStates) -> None:
        """Writes K/V of some sequences next to the hidden states, for a later process to find."""
        file = HiddenStateFile(_kv_path(hidden.path, index))
        if not rows.start:
            file.path.unlink(missing_ok=True)  # left by a process that was interrupted
            self._shared[index] = file
        file.append(len(hidden), kv)

    def _feeds_of(
        self, session: Any, index: int, beside: Path | None = None
    ) -> Callable[..., dict[str, np.ndarray]]:
        """Maps a sequence to all inputs of a layer's graph.

        The result takes the index of the sequence, its hidden states, and where its first token
        stands.

        Args:
            session: session of the graph.
            index: layer index.
            beside: a file in whose folder an earlier process may have kept K/V.
        """
        source, embed = self.spec.attention[index].source, None
        if source is not None and source not in self._shared and beside is not None:
            self._shared[source] = HiddenStateFile(_kv_path(beside, source))
        if self.spec.block.per_layer_width:
            assert self._tokens is not None
            embed = create_session(self._tokens[0], self.device)

        def feeds(row: int, x: HiddenStates, start: int = 0) -> dict[str, np.ndarray]:
            found = self._feeds(session, index, x, start)
            if embed is not None and self._tokens is not None:
                ids = self._tokens[1]
                ids = ids[row % len(ids)][None]
                found["per_layer"] = embed.run(["per_layer"], {"input_ids": ids})[0]
            if source is not None:
                kept = self._shared[source]
                row %= len(kept)
                (found["past_key"], found["past_value"]) = kept[row : row + 1].swapaxes(0, 1)
            return {port.name: found[port.name] for port in session.get_inputs()}

        return feeds

    def _feeds(
        self, session: Any, index: int, x: HiddenStates, start: int
    ) -> dict[str, np.ndarray]:
        ports = {port.name: port for port in session.get_inputs()}
        if not self.spec.attends(index):
            shapes = {name: port.shape[1:] for name, port in ports.items() if name != HIDDEN}
            states = {name: np.zeros((1, *shape), x.dtype) for name, shape in shapes.items()}
            return {HIDDEN: x[None], **states}
        length = x.shape[0]
        rope = self.spec.ropes[self.spec.attention[index].rope or 0]
        cos, sin = rotary_tables(rope, length, x.dtype.name, start)
        cache = np.zeros(0)
        if (past := ports.get("past_key")) is not None:
            stored = {"tensor(int8)": np.int8, "tensor(uint8)": np.uint8}.get(past.type, x.dtype)
            cache = np.zeros((1, past.shape[1], length, past.shape[-1]), stored)
        positions = np.arange(length)
        seen = positions <= positions[:, None]
        return {
            HIDDEN: x[None],
            "past_key": cache,
            "past_value": cache,
            "seqlens_k": np.array([length - 1], np.int32),
            "total_sequence_length": np.array(length, np.int32),
            "query_seqlens": np.array([length], np.int32),
            "start": np.zeros(1, np.int64),
            "positions": positions[None],
            "mask": np.where(seen, np.float32(0), np.float32(-np.inf))[None, None, None],
            "plain": np.array(False),
            "cos_cache": cos,
            "sin_cache": sin,
        }


def _check_finite(values: npt.NDArray, where: str) -> None:
    if not np.isfinite(values).all():
        remedy = "; FP16 cannot hold them: export with --device cpu"
        raise UnsupportedError(
            f"{where} gives values that are not finite{remedy * (values.dtype == np.float16)}"
        )


def _kv_path(states: Path, layer: int) -> Path:
    """File of the K/V of a layer that other layers read."""
    return states.with_name(f"kv-{layer:02d}.npy")


def _least_error(
    x: npt.NDArray[np.float32], bits: Literal[4, 8], *, offset: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Scale and offset of each channel, `[H_kv, 1, d]`, with the least squared error.

    With an offset, as keys have it, the mean error of all tokens costs nothing, as it moves all
    scores of a query alike.

    Args:
        x: keys or values, `[H_kv, sequences, tokens, d]`.
        bits: bits per value.
        offset: whether there may be one.
    """
    top, weight = 2 ** (bits - 1), np.full((x.shape[2], 1), 1.0, np.float32)
    weight[0] = max(_SINK_SHARE / (1 - _SINK_SHARE) * (len(weight) - 1), 1.0)
    weight /= weight.sum()
    mean, middle = x.mean((1, 2)), (x.max((1, 2)) + x.min((1, 2))) / 2
    best, least = np.zeros((2, *mean.shape), np.float32), np.full_like(mean, np.inf)
    for shift in (0 * mean, mean, middle) if offset else (0 * mean,):
        moved = x - shift[:, None, None]
        widest = np.maximum(np.abs(moved).max((1, 2)), 1e-6) / (top - 1)
        for share in _RANGES[bits]:
            scale = (widest * share)[:, None, None]
            error = np.clip(np.round(moved / scale), -top, top - 1) * scale - moved
            if offset:
                error -= (error * weight).sum(2, keepdims=True).mean(1, keepdims=True)
            loss = (np.square(error) * weight).sum((1, 2))
            best = np.where(loss < least, [widest * share, shift], best)
            least = np.minimum(loss, least)
    scale, shift = best.astype(np.float32)[:, :, None]
    return scale, shift if offset else None


def _add_upper(total: torch.Tensor, x: torch.Tensor) -> None:
    """Adds x^T x of `[tokens, K]` to the upper triangle of `[K, K]` and part of the lower."""
    width = -(-len(total) // _GRAM_PARTS)
    for start in range(0, len(total), width):
        total[start : start + width, start:].addmm_(x[:, start : start + width].T, x[:, start:])
