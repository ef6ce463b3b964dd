"""The dispatch of one sequence: token by token, layer by layer, across prebuilt bindings."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from dash_onnx.core.actions import Action, Path
from dash_onnx.core.errors import ContextLengthError
from dash_onnx.runtime.buffers import Buffer, bind_input, bind_output
from dash_onnx.runtime.kv import KVCache
from dash_onnx.runtime.scoring import Scoring
from dash_onnx.runtime.sessions import Sessions
from dash_onnx.runtime.span import Ids, Span, Step

PREFILL_CHUNK = 512
"""Tokens of a prompt that run at once: bounds memory, long enough for full GEMM speed."""

Logits = npt.NDArray[np.float32]

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
            self._single = Span(self, 1)
        self._scoring: Scoring | None = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.kv.length

    def truncate(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        self.kv.truncate(length)

    @_in_turn
    def decode_scored(self, token: int, multiplier: float, head: Action) -> tuple[Logits, Path]:
        """Runs one token, the scorer deciding layer by layer.

        Args:
            token: its id.
            multiplier: nats per `Costs.unit_ms`.
            head: precision of the LM head.

        Returns:
            Logits `[V]` of the next token (the next call overwrites them), and the path taken.

        Raises:
            ContextLengthError: the context is full.
            PolicyError: the bundle has no scorer.
        """
        span, scoring = self._single, self._scorer()
        scoring.set_multiplier(multiplier)
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
        scoring.set_multiplier(1.0)
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

    def _chunks(self, ids: Ids, path: Path) -> Iterator[Span]:
        span = self._single
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            self._advance(len(chunk))
            if span.seq != len(chunk):
                span = Span(self, len(chunk)) if len(chunk) > 1 else self._single
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
