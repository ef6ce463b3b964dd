"""Continuous batching: generations that share their passes, and join and leave at every token.

Each has a slot: a sequence of one K/V cache. In each layer the slots that take the same action run
together, which costs little more than one of them alone: the weights are read once. A single
generation is the same with one slot.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dash_onnx.core.actions import ActionPath
from dash_onnx.core.errors import DashError
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.drafts import MAX_DRAFT_ROWS, MAX_DRAFT_TOKENS, DraftStats, best_length
from dash_onnx.runtime.generate import Generation, Piece, Request, Step, forced_plan
from dash_onnx.runtime.prefix import MIN_PREFIX, PrefixStore, copy_prefix
from dash_onnx.runtime.rows import Rows
from dash_onnx.runtime.sequence import PREFILL_CHUNK
from dash_onnx.runtime.slot import Slot, longest

_LOG = logging.getLogger(__name__)

SLOTS = 8
"""Default number of generations that run together."""

MAX_SLOTS = 256
"""Most slots: each takes a part of the K/V cache."""

_CHUNK = 32  # tokens of a prompt between two passes of running answers, at first
_MIN_CHUNK = 8
_WAIT = 2.0  # passes that such a chunk should take as long as


class Scheduler:
    """Runs requests together. Any thread may submit; one thread at a time runs steps.

    Attributes:
        reused: prompt tokens so far that did not run, because a slot or the store held them.
    """

    def __init__(self, rows: Rows, store: PrefixStore | None = None, slot: Slot | None = None):
        """See `Model.new_scheduler` and `run`.

        Args:
            rows: the sequences.
            store: keeps the K/V of slots that are given to another text.
            slot: the only one; None makes one for each sequence.
        """
        self._rows, self._store = rows, store
        self._slots = [slot] if slot else [Slot(n, state) for n, state in enumerate(rows.states)]
        self._waiting: deque[Request[Any]] = deque()
        self._given = 0  # slots assigned so far
        self._short = False  # whether prompts that end with their next part come first
        self.reused = 0
        self._wake = threading.Event()
        self._chunk, self._pass_s = _CHUNK, 0.0  # of a prompt, and of the last pass

    def submit(self, request: Request[Any]) -> None:
        """Adds a request; it runs as soon as a slot is free."""
        self._waiting.append(request)
        self._wake.set()

    def save(self) -> None:
        """Puts what all slots hold into the store."""
        if self._store is not None:
            for slot in self._slots:
                self._store.put(slot.state, slot.lasting, slot.cache_key or "")
            self._store.flush()

    def wait(self, seconds: float) -> None:
        """Waits until there is something to do, or a time has passed."""
        self._wake.wait(seconds)

    def step(self) -> bool:
        """Runs a part of one prompt, and one or more tokens of every running answer.

        Ctrl-C ends all running requests: what a pass has half written goes with them.

        Returns:
            Whether there was anything to do.
        """
        try:
            return self._step()
        except KeyboardInterrupt:
            ended = [(slot, slot.request) for slot in self._slots if slot.request is not None]
            for slot, _ in ended:
                self.free(slot)
            for _, request in ended:
                request.deliver(DashError("the scheduler was interrupted"))
            raise

    def _step(self) -> bool:
        self._wake.clear()
        for slot in self._slots:
            if slot.request is not None and slot.request.cancelled.is_set():
                self.free(slot)
        active = bool(self._waiting) or any(slot.request is not None for slot in self._slots)
        self._admit()
        for slot in self._slots:
            if slot.going is not None:
                self._guarded(slot, slot.going.follow)
        busy = [slot for slot in self._slots if slot.request is not None]
        prompts = [slot for slot in busy if not slot.answers]
        # In turns: short ones do not wait for all of a long one, nor a long one for many others.
        self._short = short = not self._short
        first = sorted(prompts, key=lambda s: (short and len(s.rest) > PREFILL_CHUNK, s.used))[:1]
        decoding, forced = self._decoding([slot for slot in busy if slot.answers])
        if not self._gather(decoding):
            self._gather(decoding + first)
        decoding, first = ([s for s in some if s.request is not None] for some in (decoding, first))
        shared = self._shared(first, decoding)
        for slot in forced if shared else forced + first:
            self._guarded(slot, lambda: self._prompt(slot, alone=not decoding))  # noqa: B023
        if decoding:
            together = sorted(decoding + first * bool(shared), key=lambda slot: slot.number)
            try:
                self._decode(together, shared)
            except Exception as error:
                for slot in together:
                    slot.state.truncate(len(slot.tokens))
                if len(together) == 1:
                    self._fail(together[0], error)
                else:  # one of them caused it: each runs alone, and the others go on
                    for slot in together:
                        self._guarded(slot, lambda: self._decode([slot]))  # noqa: B023
        self._rows.follow()
        return active

    def _admit(self) -> None:
        free = [slot for slot in self._slots if slot.request is None]
        while free and self._waiting:
            request = self._waiting.popleft()
            if request.cancelled.is_set():
                continue
            # The one that keeps most of the prompt; else an empty one, or the one used longest ago.
            slot = max(free, key=lambda slot: (slot.kept(request), not slot.tokens, -slot.used))
            free.remove(slot)
            self._given += 1
            slot.used, slot.request = self._given, request
            self._guarded(slot, lambda: self._begin(slot, request))  # noqa: B023

    def _gather(self, slots: list[Slot]) -> bool:
        """Moves the last of some slots to a free row between them, which their pass covers anyway.

        Returns:
            Whether it has.
        """
        numbers = sorted(slot.number for slot in slots)
        if not slots or not self._rows.together or numbers[-1] - numbers[0] < len(numbers):
            return False
        between = range(numbers[0], numbers[-1])
        free = [slot for slot in self._slots if slot.request is None and slot.number in between]
        if not free:
            return False
        last = max(slots, key=lambda slot: slot.number)
        self._guarded(last, lambda: last.exchange(min(free, key=lambda slot: slot.number)))
        return True

    def _begin(self, slot: Slot, request: Request[Any]) -> None:
        slot.started = time.perf_counter()
        common = slot.common(request)
        held, slot.tokens = slot.tokens, []  # until it is known what it holds
        if len(self._slots) > 1 or self._store is not None:
            common = self._restored(slot, request, common, held)
        slot.state.truncate(common)
        slot.tokens, slot.prompt = request.ids[:common].tolist(), len(request.ids)
        if slot.cache_key is not None:
            slot.cache_key = request.cache_key
        slot.state.reserve(len(request.ids))  # at once, not in steps as its parts run
        going = slot.going = Generation(slot.state, request)
        forced = np.array(going.take_forced(), np.int64)  # by a grammar, whatever is answered
        slot.rest, slot.plan = np.concatenate([request.ids[common:], forced]), request.plan
        request.reused = common
        self.reused += common

    def _restored(self, slot: Slot, request: Request[Any], common: int, held: list[int]) -> int:
        """Copies a longer prefix of the prompt from another slot or the store, if one has it.

        Returns:
            Tokens of the prompt that the slot holds now.
        """
        other = max(self._slots, key=lambda other: other.common(request))  # including running ones
        shared = other.common(request)
        shared = shared if shared >= common + MIN_PREFIX else 0
        if self._store is not None:
            if common < len(held):
                self._store.put(slot.state, held, slot.cache_key or "")
            most = max(common, shared)
            stored = self._store.restore(slot.state, request.ids, most, request.cache_key)
            if stored > most:
                return stored
        if shared:
            copy_prefix(other.state, slot.state, shared)
        return shared or common

    def _prompt(self, slot: Slot, *, alone: bool) -> None:
        """Runs a part of a prompt: a short one if answers wait for it."""
        assert slot.plan is not None and slot.going is not None
        if slot.going.count:
            slot.started = time.perf_counter()
        path, head, widened, groups = plan = slot.plan
        part = slot.rest[: PREFILL_CHUNK if alone else self._chunk]
        logits, started = None, time.perf_counter()
        if len(part) < len(slot.rest):
            with slot.state.widening(widened):
                slot.state.layers(part, FixedPath(path, head, groups))
        else:
            logits = slot.state.prefill(part, *plan)[None]
        if not alone and len(part) == self._chunk:
            self._adapt((time.perf_counter() - started) / max(self._pass_s, 1e-9))
        self._take(slot, part.tolist(), logits, path)

    def _adapt(self, passes: float) -> None:
        """Adapts how much of a prompt runs at once to the number of passes that it delays."""
        if passes > _WAIT * 1.5:
            self._chunk = max(self._chunk // 2, _MIN_CHUNK)
        elif passes < _WAIT / 1.5:
            self._chunk = min(self._chunk * 2, PREFILL_CHUNK)

    def _decode(self, slots: list[Slot], seq: int = 1) -> None:
        """Runs a pass of every answer: its last token, its draft, and the prompt part joining it.

        Args:
            slots: in the order of their numbers.
            seq: least tokens of each slot in the pass.
        """
        started = time.perf_counter()
        going = [slot.going for slot in slots if slot.going is not None]
        deciders = [one.decider for one in going]
        ahead = min(max(self._ahead(slots), seq - 1), self._room(slots))
        tokens = [slot.next_tokens(ahead) for slot in slots]
        # After the last certain token, and after each draft token.
        wanted = [
            max(len(ids) - max(len(slot.rest), 1) + 1, 0)
            for slot, ids in zip(slots, tokens, strict=True)
        ]
        numbers = [slot.number for slot in slots]
        logits, paths = self._rows.forward(numbers, tokens, deciders, wanted)
        self._pass_s = time.perf_counter() - started
        for slot, ids, own, path in zip(slots, tokens, logits, paths, strict=True):
            if slot.answers:
                slot.started = started
            self._guarded(slot, lambda: self._take(slot, ids, own, path))  # noqa: B023

    def _take(self, slot: Slot, ids: list[int], logits: Any, path: ActionPath) -> None:
        """Records that tokens have run; draws once all certain ones have."""
        assert slot.going is not None and slot.request is not None
        slot.rest = slot.rest[len(ids) :]
        if len(slot.rest):
            slot.tokens += ids
            return
        step = slot.going.take(logits, path)
        slot.tokens += slot.going.text[len(slot.tokens) : -1]
        held = slot.state.truncate(len(slot.tokens))
        if again := slot.tokens[held:]:  # states cannot forget only the rejected tokens
            del slot.tokens[held:]
            slot.state.layers(np.array(again, np.int64), slot.going.decider)
            slot.tokens += again
        if slot.going.forced:
            slot.rest = np.array([step.tokens[-1], *slot.going.take_forced()], np.int64)
            current, options = slot.request.current.policy, slot.request.options
            slot.plan = forced_plan(slot.state.sessions, current, options.prefill)
        self._tell(slot, step)

    def _ahead(self, slots: list[Slot]) -> int:
        """Draft tokens per answer that the next pass verifies; a prompt's tokens are certain."""
        stats = self._draft_stats(slots)
        if stats is None:
            return 0
        gains = []
        for slot in slots:
            found, certain = [1.0], min(max(len(slot.rest) - 1, 0), MAX_DRAFT_TOKENS)
            if slot.answers and slot.going is not None and slot.going.stats is not None:
                found = slot.going.look_ahead(slot.going.stats)
            gains.append([1.0 + n for n in range(certain)] + [certain + gain for gain in found])
        return best_length(gains, stats, longest(slots))

    def _shared(self, prompt: list[Slot], decoding: list[Slot]) -> int:
        """Tokens of each slot in a pass of the answers that a prompt's next part joins.

        Only if it runs as they do, in their precision, and if that yields more tokens per unit of
        time than a separate pass; else 0.
        """
        together = [*decoding, *prompt]
        stats = self._draft_stats(together) if prompt and decoding else None
        if stats is None:
            return 0
        (slot,) = prompt
        assert slot.request is not None and slot.plan is not None
        policy, widened = slot.request.current.policy, slot.state.sessions.widened
        if slot.plan[:3] != (policy.uniform, policy.head, widened):
            return 0
        context, answers = longest(together), len(decoding)
        part = min(len(slot.rest), self._chunk)
        seq = min(part, MAX_DRAFT_ROWS // len(together), self._room(together) + 1)
        if seq < 1:
            return 0
        apart = stats.cost(answers, context) + stats.cost(part, context)
        rate = (answers + seq) / stats.cost(len(together) * seq, context)
        return seq if rate > (answers + part) / apart else 0

    def _room(self, slots: list[Slot]) -> int:
        """Tokens of each that fit the context, in addition to one.

        Also of the slots between them, over whose rows their pass runs.
        """
        numbers = [slot.number for slot in slots]
        covered = [slot for slot in self._slots if min(numbers) <= slot.number <= max(numbers)]
        limit = slots[0].state.sessions.manifest.model.max_length
        return max(limit - longest(covered) - 1, 0)

    def _decoding(self, answers: list[Slot]) -> tuple[list[Slot], list[Slot]]:
        """Answers that run in the next pass, and those that first run forced tokens by themselves.

        A few such tokens join the pass, before draft tokens, if it may have several per answer.
        """
        alone = [slot for slot in answers if len(slot.rest)]
        if alone and self._draft_stats(answers) is not None:
            alone = [slot for slot in alone if len(slot.rest) > MAX_DRAFT_TOKENS]
        return [slot for slot in answers if slot not in alone], alone

    def _draft_stats(self, slots: list[Slot]) -> DraftStats | None:
        """Draft statistics for a pass of some answers; None if it has one token of each.

        Several tokens take one path: if actions are chosen for each token, each runs alone.
        """
        going = [slot.going for slot in slots if slot.going is not None]
        if (len(going) > 1 and not self._rows.ragged) or any(not one.uniform for one in going):
            return None
        return next((one.stats for one in going if one.stats is not None), None)

    def _tell(self, slot: Slot, step: Step) -> None:
        request, going = slot.request, slot.going
        assert request is not None and going is not None
        ms = (time.perf_counter() - slot.started) * 1e3
        for told in going.told(step, ms):
            piece = request.write(told)
            if piece.finish_reason is not None:
                self.free(slot)
            request.deliver(piece)
            if piece.finish_reason is not None:
                return

    def _guarded(self, slot: Slot, work: Callable[[], None]) -> None:
        """Runs `work` for a slot; an error ends its request, and no other."""
        try:
            work()
        except Exception as error:
            self._fail(slot, error)

    def _fail(self, slot: Slot, error: Exception) -> None:
        if (request := slot.request) is not None:
            self.free(slot)
            try:
                return request.deliver(error)
            except Exception as late:
                error = late
        _LOG.error("what takes the pieces of an answer failed", exc_info=error)

    def free(self, slot: Slot) -> None:
        """Ends a request; what its slot holds may serve the next one."""
        slot.tokens = slot.lasting
        slot.request, slot.going, slot.rest = None, None, slot.rest[:0]
        slot.state.release()
        length = min(slot.state.length, len(slot.tokens))
        if len(self._slots) > 1:
            # Passes of others may run over it, see `Part.rest`.
            limit = slot.state.sessions.manifest.model.max_length
            length = min(length, max(limit - MAX_DRAFT_TOKENS - 1, 0))
        del slot.tokens[slot.state.truncate(length) :]


def run(request: Request[Piece], slot: Slot) -> Iterator[Piece]:
    """Runs one request in a slot of its own.

    Args:
        request: whose pieces are yielded, not delivered.
        slot: with what its K/V cache holds, which serves any prompt.
    """
    pieces = deque[Piece | Exception]()
    request.deliver = pieces.append
    scheduler = Scheduler(Rows(slot.state), slot=slot)
    scheduler.submit(request)
    try:
        while scheduler.step():
            while pieces:
                piece = pieces.popleft()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
    finally:
        scheduler.free(slot)
