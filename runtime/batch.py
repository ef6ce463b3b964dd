"""Continuous batching: generations that share their passes, and join and leave at every token.

The rows of one K/V cache are sequences of different lengths. In each layer the rows that take the
same action run together, which costs little more than one of them alone: the weights are read once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

import numpy as np

from dash_onnx.core.actions import SKIP, Action, Path, each_alone, path_letters
from dash_onnx.core.arrays import Ids, Logits, common_length
from dash_onnx.core.errors import DashError, PolicyError
from dash_onnx.runtime.deciders import Decider, FixedPath
from dash_onnx.runtime.generate import (
    Chunk,
    CurrentPolicy,
    Generation,
    TextWriter,
)
from dash_onnx.runtime.kv import CAPACITY
from dash_onnx.runtime.prefix import LEAST, PrefixStore, copy_prefix
from dash_onnx.runtime.sequence import PREFILL_CHUNK, SequenceState
from dash_onnx.runtime.sessions import PromptPlan, Sessions

_LOG = logging.getLogger(__name__)

ROWS = 8
"""Sequences that run together unless told otherwise."""

_CHUNK = 32  # tokens of a prompt between two passes of running answers, which wait for them,
_LEAST_CHUNK = 8  # as many as take about twice the time of such a pass
_WAIT = 2.0

Deliver = Callable[[Chunk | Exception], None]
"""Takes the chunks of a generation, and what ended it before its time."""


class BatchDecoder:
    """The decode loop of several rows.

    Attributes:
        rows: the sequences; each may run alone, as for its prompt.
    """

    def __init__(self, sessions: Sessions, rows: int, capacity: int = CAPACITY):
        """Allocates an empty cache for them.

        Args:
            sessions: of the bundle.
            rows: how many.
            capacity: tokens that each has room for at first; it doubles when one is full.

        Raises:
            DeviceError: the device runs no batches.
        """
        self._whole = sessions.new_sequence(capacity, rows)
        self.rows = [self._whole.part(row, row + 1) for row in range(rows)]
        self._parts = {(row, row + 1): state for row, state in enumerate(self.rows)}

    def forward(
        self, rows: Sequence[int], tokens: Sequence[int], deciders: Sequence[Decider]
    ) -> tuple[list[Logits], list[Path]]:
        """Runs one token of each of some rows.

        Args:
            rows: numbers, ascending.
            tokens: an id for each.
            deciders: likewise.

        Returns:
            Logits `[V]` of each (the next call overwrites them), and paths.

        Raises:
            ContextLengthError: a row's context is full.
        """
        for row in rows:
            self.rows[row].advance(1)
        first, stop = rows[0], rows[-1] + 1
        for row in set(range(first, stop)).difference(rows):
            self.rows[row].rest()
        whole = self._part(first, stop)
        ids = np.zeros((stop - first, 1), np.int64)
        ids[np.array(rows) - first, 0] = tokens
        whole.agree(max(self.rows[row].length for row in rows))
        whole.embed(ids)
        for decider in deciders:
            decider.begin()
        key = tuple(rows)
        same = {decider.segments for decider in deciders}
        segments = same.pop() if len(same) == 1 else each_alone(whole.num_layers)
        for layer, stop in segments:
            for decider in deciders:
                decider.before(layer)
            actions = tuple([decider.action(layer) for decider in deciders])
            for first, last, action in calls(key, actions):
                self._part(first, last).run(layer, action, stop)
            for decider in deciders:
                decider.after(layer)
        for start, end, head in calls(key, tuple([decider.head for decider in deciders])):
            self._part(start, end).head(head)
        paths = [decider.end() for decider in deciders]
        return [self.rows[row].logits for row in rows], paths

    def _part(self, start: int, stop: int) -> SequenceState:
        part = self._parts.get((start, stop))
        if part is None:
            part = self._parts[start, stop] = self._whole.part(start, stop)
        part.reserve(0)  # follows the cache where it has moved
        return part


@lru_cache(1 << 14)
def calls(rows: tuple[int, ...], actions: tuple[Action, ...]) -> list[tuple[int, int, Action]]:
    """Ranges of rows that run together, in order, so that each row's own action comes last.

    The action of most rows runs on all from their first to their last one: others between them are
    run again, which costs less than another call. A skipped row runs alone: it costs little, and
    its graph rotates the keys of all rows by the position of the first.

    Args:
        rows: numbers, ascending.
        actions: of each.
    """
    pairs = [*zip(rows, actions, strict=True)]
    counts, ranges, most = Counter(action for action in actions if action != SKIP), [], SKIP
    if counts:
        most, _ = counts.most_common(1)[0]
        own = [row for row, action in pairs if action == most]
        ranges.append((own[0], own[-1] + 1, most))
    for action, group in groupby(pairs, lambda pair: pair[1]):
        members = [row for row, _ in group]
        if action == SKIP:
            ranges += [(row, row + 1, SKIP) for row in members]
        elif action != most:
            ranges.append((members[0], members[-1] + 1, action))
    return ranges


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
        return common_length(np.asarray(self.lasting, np.int64), request.ids[:-1])

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
        row.rest = request.ids[common:]
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
            self._tell(row, row.going.draw(logits), path)

    def _adapt(self, passes: float) -> None:
        """Changes how much of a prompt runs at once, by the passes that could have run instead."""
        if passes > _WAIT * 1.5:
            self._chunk = max(self._chunk // 2, _LEAST_CHUNK)
        elif passes < _WAIT / 1.5:
            self._chunk = min(self._chunk * 2, PREFILL_CHUNK)

    def _decode(self, rows: list[_Row]) -> None:
        started = time.perf_counter()
        for row in rows:
            row.started = started
        numbers = [row.number for row in rows]
        going = [row.going for row in rows if row.going is not None]
        last = [one.text[-1] for one in going]
        logits, paths = self._decoder.forward(numbers, last, [one.decider for one in going])
        self._pass_s = time.perf_counter() - started
        for row, token in zip(rows, last, strict=True):
            row.tokens.append(token)
        for row, one, own, path in zip(rows, going, logits, paths, strict=True):
            self._guarded([row], lambda: self._tell(row, one.draw(own), path))  # noqa: B023

    def _tell(self, row: _Row, token: int, path: Path) -> None:
        assert row.request is not None and row.going is not None
        ms = (time.perf_counter() - row.started) * 1e3
        chunk = row.request.writer.add(row.going.tell(token, path, ms))
        deliver = row.request.deliver
        if chunk.finish_reason is not None:
            self._free(row)
        deliver(chunk)

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
