"""Runs of some consecutive tokens of a lane: their hidden buffers and their bindings."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dash_onnx.core.actions import Action, Path
from dash_onnx.core.contract import Ports
from dash_onnx.runtime.buffers import Buffer, Run, bound_run
from dash_onnx.runtime.scoring import Scoring

if TYPE_CHECKING:
    from dash_onnx.runtime.dispatch import Lane

Ids = npt.NDArray[np.int64]
Step = tuple[int, Action]
"""A layer and what it does."""


class Span:
    """Buffers and bindings for runs of `seq` tokens.

    Attributes:
        seq: how many.
        hidden: input of even and of odd layers, `[1, seq, D]`.
    """

    def __init__(self, lane: Lane, seq: int):
        sessions = lane.sessions
        dims, device = sessions.manifest.dims, sessions.device
        self.seq = seq
        # The lane owns its spans: a cycle would keep its K/V until the next full collection.
        self._lane = weakref.proxy(lane)
        self._tokens = Buffer((1, seq), "int64", device)
        shape = (1, seq, dims.hidden_size)
        self.hidden = (Buffer(shape, dims.dtype, device), Buffer(shape, dims.dtype, device))
        self._logits: Buffer | None = None
        self._heads: dict[Action, Run] = {}
        self._embed = self._bound(
            sessions.embed(), sessions.embed_ports, [self._tokens], [self.hidden[0]]
        )
        self._layers: list[dict[Action, Run]] = [{} for _ in sessions.manifest.layers]
        self._capacity = 0  # of the K/V buffers that the layers are bound to

    @property
    def final(self) -> Buffer:
        """Hidden states after the last layer, `[1, seq, D]`."""
        return self.hidden[len(self._layers) % 2]

    @property
    def logits(self) -> Buffer:
        """Logits `[1, seq, V]`."""
        if self._logits is None:
            sessions = self._lane.sessions
            dims = sessions.manifest.dims
            self._logits = Buffer((1, self.seq, dims.vocab_size), dims.dtype, sessions.device)
        return self._logits

    def run_layers(self, tokens: int | Ids, path: Path) -> None:
        """Runs embedding and layers; the hidden states end up in `final`."""
        self._start(tokens)
        for layer, action in enumerate(path):
            self._run_of(layer, action)()

    def run_scored(self, token: int, scoring: Scoring) -> None:
        """Like `run_layers`; the scorer decides for the layers after layer i while it runs."""
        self._start(token)
        path = scoring.path
        for layer, look in enumerate(scoring.decision_points):
            if look is None:
                self._run_of(layer, path[layer])()
                continue
            scoring.begin(look)
            self._run_of(layer, path[layer])()
            scoring.finish(look)

    def _run_of(self, layer: int, action: Action) -> Run:
        runs = self._layers[layer]
        return runs.get(action) or runs.setdefault(action, self._bind_layer(layer, action))

    def _start(self, tokens: int | Ids) -> None:
        self._rebind()
        self._tokens.write(tokens)
        self._embed()

    def _rebind(self) -> None:
        """Forgets the bindings of layers where the K/V buffers moved."""
        if self._capacity != self._lane.kv.capacity:
            self._capacity = self._lane.kv.capacity
            for runs in self._layers:
                runs.clear()

    def time_layers(
        self, token: int, steps: Sequence[Step], before: Sequence[Step], lead: Sequence[Step]
    ) -> list[float]:
        """See `Lane.time_token`; returns milliseconds: embedding, then each layer."""
        self._rebind()
        drain = self._lane.sessions.streams.drain
        for layer, action in before:
            self._run_of(layer, action)()
        drain()
        started = time.perf_counter()
        self._start(token)
        drain()
        clock = [time.perf_counter()]
        embed = clock[0] - started
        if lead:
            # The first layer that is timed may read either: neither may add up over the tokens.
            self.hidden[1].write(self.hidden[0].array)
            for layer, action in lead:
                self._run_of(layer, action)()
            drain()
            clock = [time.perf_counter()]
        for layer, action in steps:
            self._run_of(layer, action)()
            drain()
            clock.append(time.perf_counter())
        return [embed * 1e3, *((stop - start) * 1e3 for start, stop in pairwise(clock))]

    def time_scorer(self, token: int, steps: Sequence[Step], scoring: Scoring) -> float:
        """See `Lane.time_scorer`."""
        self._start(token)
        seconds = 0.0
        for layer, action in steps:
            run, look = self._run_of(layer, action), scoring.decision_points[layer]
            if look is None:
                run()
                continue
            started = time.perf_counter()
            scoring.begin(look)
            seconds += time.perf_counter() - started
            run()
            started = time.perf_counter()
            scoring.finish(look)
            seconds += time.perf_counter() - started
        return seconds * 1e3

    def run_head(self, precision: Action) -> None:
        """Runs the LM head on all tokens of the span."""
        run = self._heads.get(precision)
        if run is None:
            sessions = self._lane.sessions
            run = self._heads[precision] = self._bound(
                sessions.head(precision), sessions.head_ports, [self.final], [self.logits]
            )
        run()

    def _bind_layer(self, layer: int, action: Action) -> Run:
        lane, sessions = self._lane, self._lane.sessions
        kv = lane.kv
        key, value = kv.keys[layer], kv.values[layer]
        source, target = self.hidden[layer % 2], self.hidden[(layer + 1) % 2]
        rotary = kv.rotary[sessions.manifest.rope_of(layer)]
        inputs = [source, key, value, lane.seqlens, lane.total, lane.start, *rotary]
        return self._bound(
            sessions.layer(layer, action), sessions.layer_ports, inputs, [target, key, value]
        )

    def _bound(
        self, session: Any, ports: Ports, inputs: list[Buffer], outputs: list[Buffer]
    ) -> Run:
        streams = self._lane.sessions.streams
        run = bound_run(session, ports, inputs, outputs, streams.run_options)
        return streams.replayed(run) if self.seq == 1 else run
