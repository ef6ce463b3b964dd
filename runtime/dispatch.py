"""The dispatch of one sequence: token by token, layer by layer, across prebuilt bindings."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from dash_onnx.actions import Action, Path
from dash_onnx.contract import Ports
from dash_onnx.errors import ContextLengthError
from dash_onnx.runtime.buffers import Buffer, Run, bind_input, bind_output, bound_run
from dash_onnx.runtime.kv import KVCache
from dash_onnx.runtime.scoring import Scoring
from dash_onnx.runtime.sessions import Sessions

PREFILL_CHUNK = 512
"""Tokens of a prompt that run at once: bounds memory, long enough for full GEMM speed."""

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Step = tuple[int, Action]
"""A layer and what it does."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _in_turn(method: Callable[Concatenate[Lane, _P], _R]) -> Callable[Concatenate[Lane, _P], _R]:
    """Marks what uses the device: it waits until no other lane does, where that matters."""

    @functools.wraps(method)
    def called(lane: Lane, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with lane.sessions.streams.turn:
            return method(lane, *args, **kwargs)

    return called


class Lane:
    """One sequence in flight: its K/V cache, its hidden buffers and its bindings.

    A lane belongs to one generation at a time; lanes share nothing but the sessions
    and, where CUDA graphs are recorded, the turn.
    """

    def __init__(self, sessions: Sessions):
        """Allocates an empty cache; binds nothing yet."""
        self.sessions = sessions
        with sessions.streams.turn:
            self.kv = KVCache(sessions.manifest, sessions.device)
            # Position state, read by every layer: written once per run.
            self.seqlens = Buffer((1,), "int32", sessions.device)
            self.total = Buffer((), "int32")  # GroupQueryAttention wants it on the CPU
            self.start = Buffer((1,), "int64", sessions.device)
            self._single = _Span(self, 1)
        self._scoring: Scoring | None = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.kv.length

    def truncate(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        self.kv.truncate(length)

    @_in_turn
    def decode_scored(self, token: int, price: float, head: Action) -> tuple[Logits, Path]:
        """Runs one token, the scorer deciding layer by layer.

        Args:
            token: its id.
            price: nats per `Costs.unit_ms`.
            head: precision of the LM head.

        Returns:
            Logits `[V]` of the next token (the next call overwrites them), and the path taken.

        Raises:
            ContextLengthError: the context is full.
            PolicyError: the bundle has no scorer.
        """
        span, scoring = self._single, self._scorer()
        scoring.set_price(price)
        self._advance(1)
        span.run_scored(token, scoring)
        span.run_head(head)
        return span.logits.array[0, 0], tuple(scoring.path)

    @_in_turn
    def decode(self, token: int, path: Path, head: Action) -> Logits:
        """Runs one token on a given path.

        Args:
            token: its id.
            path: the action of each layer.
            head: precision of the LM head.

        Returns:
            Logits `[V]` of the next token; the next call overwrites them.

        Raises:
            ContextLengthError: the context is full.
        """
        self._advance(1)
        span = self._single
        span.run_layers(token, path)
        span.run_head(head)
        return span.logits.array[0, 0]

    @_in_turn
    def assume(self, count: int) -> None:
        """Counts tokens as cached without running them: timing does not depend on their values."""
        self._advance(count)

    @_in_turn
    def time_token(
        self,
        token: int,
        steps: Sequence[Step],
        head: Action | None,
        before: Sequence[Step] = (),
        lead: Sequence[Step] = (),
    ) -> list[float]:
        """Times the parts of a token, of which some layers and the head may be left out.

        Args:
            token: its id.
            steps: the layers that are timed.
            head: precision of the LM head; None leaves it out.
            before: layers that run before the embedding and are not timed.
            lead: layers that run after it and are not timed.

        Returns:
            Milliseconds of the embedding, each layer, and the head if there is one.
        """
        self._advance(1)
        times = self._single.time_layers(token, steps, before, lead)
        if head is None:
            return times
        started = time.perf_counter()
        self._single.run_head(head)
        self.sessions.streams.drain()
        return [*times, (time.perf_counter() - started) * 1e3]

    @_in_turn
    def time_scorer(self, token: int, steps: Sequence[Step]) -> float:
        """Runs some layers, the scorer deciding in vain; returns its milliseconds."""
        scoring = self._scorer()
        scoring.set_price(1.0)
        self._advance(1)
        return self._single.time_scorer(token, steps, scoring)

    def _scorer(self) -> Scoring:
        if self._scoring is None:
            self._scoring = Scoring(self.sessions, self._single.hidden)
        return self._scoring

    @_in_turn
    def prefill(self, ids: Ids, path: Path, head: Action) -> Logits:
        """Runs a prompt, the same path for all of its tokens.

        Args:
            ids: `[S]`, at least one.

        Returns:
            Logits `[V]` after the last token; the next call overwrites them.

        Raises:
            ContextLengthError: it does not fit the context.
        """
        for span in self._chunks(ids, path):
            last = span
        if last is self._single:
            last.run_head(head)
            return last.logits.array[0, 0]
        ports, logits = self.sessions.head_ports, self._single.logits
        session = self.sessions.head(head)
        binding = session.io_binding()
        width = self.sessions.manifest.model.hidden_size
        start = (last.seq - 1) * width  # only the last token needs the LM head
        bind_input(binding, ports.inputs[0], last.final, (1, 1, width), start)
        bind_output(binding, ports.outputs[0], logits)
        session.run_with_iobinding(binding, self.sessions.streams.run_options)
        return logits.array[0, 0]

    @_in_turn
    def prefill_all(self, ids: Ids, path: Path, head: Action) -> Logits:
        """Like `prefill`, but returns the logits of every token, `[S, V]` float32."""
        rows = []
        for span in self._chunks(ids, path):
            span.run_head(head)
            rows.append(span.logits.array[0].astype(np.float32))  # a copy
        return np.concatenate(rows)

    def _chunks(self, ids: Ids, path: Path) -> Iterator[_Span]:
        span = self._single
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            self._advance(len(chunk))
            if span.seq != len(chunk):
                span = _Span(self, len(chunk)) if len(chunk) > 1 else self._single
            span.run_layers(chunk, path)
            yield span

    def _advance(self, count: int) -> None:
        total = self.kv.length + count
        limit = self.sessions.manifest.model.max_length
        if total > limit:
            raise ContextLengthError(f"{total} tokens do not fit the context of {limit}")
        self.kv.reserve(total)
        self.kv.length = total
        self.seqlens.write(total - 1)
        # A recording keeps what it read on the host: the bound that holds for all its launches.
        recordable = count == 1 and self.sessions.streams.graphs
        self.total.write(self.kv.capacity if recordable else total)
        self.start.write(total - count)


class _Span:
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
        for layer, look in enumerate(scoring.looks):
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
            run, look = self._run_of(layer, action), scoring.looks[layer]
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
