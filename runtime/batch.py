"""Continuous batching: generations that share their passes, and join and leave at every token.

The rows of one K/V cache are sequences of different lengths. In each layer the rows that take the
same action run together, which costs little more than one of them alone: the weights are read once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dash_onnx.core.actions import path_letters
from dash_onnx.core.arrays import Ids, common_length
from dash_onnx.core.errors import DashError, PolicyError
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.generate import Chunk, CurrentPolicy, Generation, Step
from dash_onnx.runtime.prefix import LEAST, PrefixStore, copy_prefix
from dash_onnx.runtime.rows import BatchDecoder
from dash_onnx.runtime.sequence import PREFILL_CHUNK, SequenceState
from dash_onnx.runtime.sessions import PromptPlan, Sessions
from dash_onnx.runtime.writer import TextWriter

_LOG = logging.getLogger(__name__)

ROWS = 8
"""Sequences that run together unless told otherwise."""

_CHUNK = 32  # tokens of a prompt between two passes of running answers, which wait for them,
_LEAST_CHUNK = 8  # as many as take about twice the time of such a pass
_WAIT = 2.0

Deliver = Callable[[Chunk | Exception], None]
"""Takes the chunks of a generation, and what ended it before its time."""


@dataclass(eq=False)
class Request:
    """A generation that waits for a row, or has one.

    Attributes:
        ids: the prompt `[S]`.
        current: its policy, which may change between tokens.
        generation: begins its generation in a sequence.
        writer: makes its chunks.
        plan: how its prompt runs.
        deliver: takes them; called by the thread that runs the batch.
        cancelled: set from any thread: it ends before its next token.
        first: the policy that it began with.
        quality: how its prompt runs, and its answer, as that may be a part of the next prompt.
            Where two are equal, one may use the other's K/V.
    """

    ids: Ids
    current: CurrentPolicy
    generation: Callable[[SequenceState], Generation]
    writer: TextWriter
    plan: PromptPlan
    deliver: Deliver
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        path, head, widened, _ = self.plan
        self.first = self.current.policy
        later = "" if self.first.uniform == path else self.first.quality
        wide = "wide" if widened else ""
        self.quality = " ".join(filter(None, (path_letters(path), head, wide, later)))


@dataclass(eq=False)
class _Row:
    """A sequence, what its K/V cache holds, and who has it."""

    number: int
    state: SequenceState
    tokens: list[int] = field(default_factory=list)
    quality: str = ""  # of the request that it holds
    used: int = 0  # when it was last given away
    request: Request | None = None
    going: Generation | None = None
    rest: Ids = field(default_factory=lambda: np.zeros(0, np.int64))  # of the prompt, not run yet
    started: float = 0.0

    def common(self, request: Request) -> int:
        """How many tokens of a prompt it holds; the last one runs again: it gives the logits."""
        if self.quality != request.quality:
            return 0
        common = common_length(np.asarray(self.lasting, np.int64), request.ids[:-1])
        return self.state.kv.place(common)

    @property
    def lasting(self) -> list[int]:
        """The tokens whose K/V serve later requests: none that another budget wrote."""
        request = self.request
        if request is not None and request.current.policy is not request.first:
            return self.tokens[: len(request.ids)]
        return self.tokens


class Batch:
    """Runs requests together. Any thread may submit; one thread at a time runs steps.

    Attributes:
        reused: tokens of prompts so far that did not run, because a row or the store held them.
    """

    def __init__(self, sessions: Sessions, rows: int = ROWS, store: PrefixStore | None = None):
        """Allocates rows; see `BatchDecoder`.

        Args:
            sessions: of the bundle.
            rows: generations at once.
            store: keeps what rows hold that are given to another text.
        """
        self._sessions, self._store = sessions, store
        if not 1 <= rows <= 256:
            raise PolicyError(f"rows={rows} must be in 1..256")
        self._decoder = BatchDecoder(sessions, rows)
        self._rows = [_Row(number, state) for number, state in enumerate(self._decoder.rows)]
        self._waiting: deque[Request] = deque()
        self._given = 0  # rows, so far
        self.reused = 0
        self._wake = threading.Event()
        self._chunk, self._pass_s = _CHUNK, 0.0  # of a prompt, and of the last pass

    def submit(self, request: Request) -> None:
        """Adds a request; it runs as soon as a row is free."""
        self._waiting.append(request)
        self._wake.set()

    def save(self) -> None:
        """Puts what all rows hold into the store."""
        if self._store is not None:
            for row in self._rows:
                self._store.put(row.state, row.tokens, row.quality)
            self._store.flush()

    def wait(self, seconds: float) -> None:
        """Waits until there is something to do, or a time has passed."""
        self._wake.wait(seconds)

    def step(self) -> bool:
        """A part of one prompt, and a token of every running answer.

        Returns:
            Whether there was anything to do.
        """
        self._wake.clear()
        for row in self._rows:
            if row.request is not None and row.request.cancelled.is_set():
                self._free(row)
        self._admit()
        busy = [row for row in self._rows if row.request is not None]
        decoding = [row for row in busy if not len(row.rest)]
        prompts = [row for row in busy if len(row.rest)]
        if prompts:
            oldest = min(prompts, key=lambda row: row.used)
            self._guarded([oldest], lambda: self._prompt(oldest, alone=not decoding))
        if decoding:
            try:
                self._decode(decoding)
            except Exception:  # of one of them: those that run alone go on
                for row in decoding:
                    row.state.truncate(len(row.tokens))
                    self._guarded([row], lambda: self._decode([row]))  # noqa: B023
        return bool(busy)

    def _admit(self) -> None:
        free = [row for row in self._rows if row.request is None]
        while free and self._waiting:
            request = self._waiting.popleft()
            if request.cancelled.is_set():
                continue
            # The row that holds most of the prompt, else the one that was not used for longest.
            row = max(free, key=lambda row: (row.common(request), -row.used))
            free.remove(row)
            self._given += 1
            row.used, row.request = self._given, request
            self._guarded([row], lambda: self._begin(row, request))  # noqa: B023

    def _begin(self, row: _Row, request: Request) -> None:
        row.started = time.perf_counter()
        common = row.common(request)
        other = max(self._rows, key=lambda other: other.common(request))  # one that runs, too
        shared = other.common(request)
        shared = shared if shared >= common + LEAST else 0
        held, row.tokens = row.tokens, []  # until it is known what it holds
        if self._store is not None:
            if common < len(held):
                self._store.put(row.state, held, row.quality)
            most = max(common, shared)
            stored = self._store.restore(row.state, request.ids, most, request.quality)
            if stored > most:
                common, shared = stored, 0
        if shared:
            copy_prefix(other.state, row.state, shared)
            common = shared
        row.state.truncate(common)
        row.tokens, row.quality = request.ids[:common].tolist(), request.quality
        row.state.reserve(len(request.ids))  # at once, not by doubling as its parts run
        row.going = request.generation(row.state)
        forced = np.array(row.going.take_forced(), np.int64)  # by a grammar, whatever is answered
        row.rest = np.concatenate([request.ids[common:], forced])
        self.reused += common

    def _prompt(self, row: _Row, *, alone: bool) -> None:
        """Runs a part of a prompt: a short one where answers wait for it."""
        assert row.request is not None and row.going is not None
        path, head, widened, joined = plan = row.request.plan
        part, rest = np.split(row.rest, [PREFILL_CHUNK if alone else self._chunk])
        started = time.perf_counter()
        if len(rest):
            with row.state.widening(widened):
                row.state.layers(part, FixedPath(path, head, joined=joined))
        else:
            logits = row.state.prefill(part, *plan)
        if not alone and len(part) == self._chunk:
            self._adapt((time.perf_counter() - started) / max(self._pass_s, 1e-9))
        row.tokens += part.tolist()
        row.rest = rest
        if not len(rest):
            forced = row.going.text[len(row.request.ids) :]
            self._tell(row, Step([*forced, row.going.draw(logits)], path))

    def _adapt(self, passes: float) -> None:
        """Changes how much of a prompt runs at once, by the passes that could have run instead."""
        if passes > _WAIT * 1.5:
            self._chunk = max(self._chunk // 2, _LEAST_CHUNK)
        elif passes < _WAIT / 1.5:
            self._chunk = min(self._chunk * 2, PREFILL_CHUNK)

    def _decode(self, rows: list[_Row]) -> None:
        """A token of every answer; of several that are forced or guessed in a pass of its own.

        Guesses are made for an answer that runs alone: rows are cheapest for many answers.
        """
        started = time.perf_counter()
        for row in rows:
            row.started = started
        alone = [row for row in rows if len(rows) == 1 or (row.going and row.going.forced)]
        for row in alone:
            self._guarded([row], lambda: self._step(row))  # noqa: B023
        if not (rows := [row for row in rows if row not in alone]):
            return
        numbers = [row.number for row in rows]
        going = [row.going for row in rows if row.going is not None]
        last = [one.text[-1] for one in going]
        logits, paths = self._decoder.forward(numbers, last, [one.decider for one in going])
        self._pass_s = time.perf_counter() - started
        for row, token in zip(rows, last, strict=True):
            row.tokens.append(token)
        for row, one, own, path in zip(rows, going, logits, paths, strict=True):
            self._guarded([row], lambda: self._tell(row, Step([one.draw(own)], path)))  # noqa: B023

    def _step(self, row: _Row) -> None:
        assert row.going is not None
        last = row.going.text[-1]
        step = row.going.step()
        row.tokens += [last, *step.tokens[:-1]]
        self._tell(row, step)

    def _tell(self, row: _Row, step: Step) -> None:
        assert row.request is not None and row.going is not None
        ms = (time.perf_counter() - row.started) * 1e3
        writer, deliver = row.request.writer, row.request.deliver
        for told in row.going.told(step, ms):
            chunk = writer.add(told)
            if chunk.finish_reason is not None:
                self._free(row)
            deliver(chunk)
            if chunk.finish_reason is not None:
                return

    def _guarded(self, rows: list[_Row], work: Callable[[], None]) -> None:
        """Does something for rows; what goes wrong ends their requests, and no others."""
        try:
            work()
        except Exception as error:
            if not isinstance(error, DashError):
                _LOG.exception("a pass failed")
            for row in rows:
                if (request := row.request) is not None:
                    self._free(row)
                    request.deliver(error)

    def _free(self, row: _Row) -> None:
        """Ends a request; what its row holds may serve the next one."""
        row.tokens = row.lasting
        row.request, row.going = None, None
        row.rest = row.rest[:0]
        # A row at rest needs a position to write nothing to; see `SequenceState.rest`.
        limit = row.state.sessions.manifest.model.max_length - 1
        row.state.truncate(min(row.state.length, len(row.tokens), limit))
        del row.tokens[row.state.length :]
