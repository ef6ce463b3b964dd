"""A sequence, or several of one length: K/V cache, buffers, and the loop that runs its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np

from dash_onnx.core.actions import Action, ActionPath, Form, LayerGroup
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.errors import ContextLengthError
from dash_onnx.core.forms import head_form_of
from dash_onnx.runtime.buffers import Buffer
from dash_onnx.runtime.deciders import Decider, FixedPath
from dash_onnx.runtime.drafts import MAX_DRAFT_ROWS, MAX_DRAFT_TOKENS, head_widened
from dash_onnx.runtime.kv import CAPACITY, KVCache
from dash_onnx.runtime.passes import Lengths, Pass
from dash_onnx.runtime.sessions import Sessions
from dash_onnx.runtime.states import LONG

PREFILL_CHUNK = 512
"""Tokens of a prompt that run at once: bounds memory, long enough for full GEMM speed."""

_KEPT = MAX_DRAFT_TOKENS + 1  # tokens: bindings for longer passes are dropped after their prompt
_SHARED_LOGITS = (MAX_DRAFT_TOKENS + 1, MAX_DRAFT_ROWS)  # rows of logits of passes with drafts
_PREVIEWED = 32  # tokens: for each an INT2 head gathers 256 rows of the INT8 head


class SequenceState:
    """K/V cache, buffers and bindings of one sequence; one generation at a time uses it.

    Or of a batch: B sequences of one length, whose tokens take the same path. Then ids and logits
    have a first dimension of B.

    `layers` is the decode loop, and `forward` adds the LM head. The parts (`advance`, `embed`,
    `run`, `head`) are public for those who time or rearrange them.
    """

    def __init__(self, sessions: Sessions, capacity: int = CAPACITY, batch: int = 1):
        """Allocates an empty cache; sequences share nothing but the sessions.

        Args:
            sessions: sessions of the bundle.
            capacity: tokens that its K/V cache has room for at first; it grows in steps.
            batch: number of sequences.
        """
        backend = sessions.backend
        self.sessions, self._lock = sessions, backend.lock
        self.num_layers = sessions.manifest.model.num_layers
        self.batch = batch
        with self._lock:
            self.kv = KVCache(sessions.manifest, backend, capacity, batch)
            self._lengths = Lengths.new(backend, batch)
        self._passes: dict[int, Pass] = {}
        self._logits_of: dict[int, Buffer] = {}  # by rows, shared by passes with drafts
        self._widened = sessions.widened  # actions that passes of several rows may run wide
        self._plain: bool | None = None  # whether passes attend by plain operators; None: if faster
        self._moves = self.kv.moves  # of the cache that the layers are bound to
        with self._lock:
            self._now = self._pass(1)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.kv.length

    @property
    def logits(self) -> Logits:
        """`[V]`, of the last single token of a sequence."""
        logits = self._passes[1].logits
        assert logits is not None
        return logits.array[0, -1]

    @property
    def output(self) -> Logits:
        """`[B, S, D]`: what the last layer returned for the pass that ran last."""
        return self._now.hidden[self.num_layers % 2].array

    @property
    def hidden(self) -> tuple[Buffer, Buffer]:
        """Input `[B, 1, D]` of the even and of the odd layers while one token runs."""
        return self._passes[1].hidden

    def truncate(self, length: int) -> int:
        """Forgets all tokens from position `length` on; see `KVCache` about states.

        Returns:
            Tokens that it holds now.
        """
        return self.kv.truncate(length)

    def forward(
        self, tokens: int | Ids, decider: Decider, *, every: bool = False
    ) -> tuple[Logits, ActionPath]:
        """Runs one token, or several at once that take the same path.

        Args:
            tokens: an id, ids `[S]` with S up to `PREFILL_CHUNK`, or `[B, S]`.
            decider: chooses each layer's action.
            every: return logits after every token, not only after the last one.

        Returns:
            Logits `[V]`, or `[S, V]` with `every` (the next call overwrites them), and the path.

        Raises:
            ContextLengthError: the tokens do not fit the context.
        """
        with self._lock:
            path = self.layers(tokens, decider)
            return self.head(decider.head, every=every), path

    def layers(self, tokens: int | Ids, decider: Decider) -> ActionPath:
        """Does what `forward` does, except for the LM head."""
        with self._lock:
            self.advance(1 if isinstance(tokens, int) else tokens.shape[-1])
            self.embed(tokens)
            decider.begin()
            for start, stop in decider.groups:
                decider.before(start)
                self.run(start, decider.action(start), stop)
                decider.after(start)
            return decider.end()

    def prefill(
        self,
        ids: Ids,
        path: ActionPath,
        head: Action,
        widened: frozenset[Action] = frozenset(),
        groups: tuple[LayerGroup, ...] = (),
        *,
        every: bool = False,
        chunk: int = PREFILL_CHUNK,
    ) -> Logits:
        """Runs a prompt of any length on one path, in chunks.

        Args:
            ids: `[S]` or `[B, S]`, at least one token.
            path: action of each layer.
            head: precision of the LM head.
            widened: actions that may run in the wide form, where it is faster.
            groups: the layers that run as one graph; empty takes the longest runs.
            every: return logits after every token, not only after the last one.
            chunk: tokens that run at once.

        Returns:
            Logits `[V]` (the next call overwrites them), or a copy `[S, V]` float32 with `every`.

        Raises:
            ContextLengthError: it does not fit the context.
        """
        if every and head == "int2":
            chunk = min(chunk, _PREVIEWED)
        decider, rows = FixedPath(path, head, groups), []
        self._check_room(self.length + ids.shape[-1])
        self.reserve(self.length + ids.shape[-1])  # at once, not in steps as its chunks run
        with self._lock, self.widening(widened):
            for start, stop in pairwise(self._cuts(ids.shape[-1], chunk)):
                self.layers(ids[..., start:stop], decider)
                if every:
                    rows.append(self.head(head, every=True).astype(np.float32))
            logits = np.concatenate(rows, -2) if every else self.head(head)
        self.release()
        self.sessions.settle()
        return logits

    def release(self) -> None:
        """Frees the memory of passes with many tokens."""
        for count in [count for count in self._passes if count > _KEPT]:
            del self._passes[count]
        if self._now.tokens.shape[1] > _KEPT:
            self._now = self._passes[1]

    def _cuts(self, count: int, chunk: int) -> list[int]:
        """Where the chunks of a prompt begin, and where the last one ends.

        States are kept before its last token, which runs again if the same prompt comes again.
        """
        cuts = {*range(0, count, chunk), count}
        if self.kv.states is not None and count > LONG:
            cuts.add(count - 1)
        return sorted(cuts)

    @contextmanager
    def widening(self, widened: frozenset[Action]) -> Iterator[None]:
        """Lets passes of several rows run these actions wide, instead of the usual ones."""
        usual, self._widened = self._widened, widened
        try:
            yield
        finally:
            self._widened = usual

    def advance(self, count: int) -> None:
        """Makes room in the K/V cache for the next `count` tokens, and sets their positions.

        Raises:
            ContextLengthError: they do not fit the context.
        """
        total = self.kv.length + count
        self._check_room(total)
        with self._lock:
            self.reserve(total)
            self.kv.begin(count)
            self._lengths.write(total - count, count)
            self._lengths.total.write(self.sessions.backend.longest(total, count, self.kv.capacity))
            self._now = self._passes.get(count) or self._pass(count)
            self._place(count)

    def _check_room(self, total: int) -> None:
        limit = self.sessions.manifest.model.max_length
        if total > limit:
            raise ContextLengthError(f"{total} tokens do not fit the context of {limit}")

    def reserve(self, total: int) -> None:
        """Makes room in the K/V cache for `total` tokens."""
        with self._lock:
            self.kv.reserve(total)
        if self.kv.moves != self._moves:
            self._moves = self.kv.moves
            for bound in self._bound():
                bound.forget()

    def _place(self, count: int) -> None:
        """Writes where the last `count` tokens are, and what they see."""
        now, kv = self._now, self.kv
        first, total = kv.length - count, kv.length
        now.positions.write(np.arange(first, total))
        if count > 1:
            now.see(total, self._plain)
            return
        if self._plain is None:
            kv.settle(total)
        kv.show(total)

    def attend(self, plain: bool) -> Buffer:
        """Makes all later passes attend by plain operators, or not: for timing both.

        Returns:
            The switch of the current pass, until the K/V cache moves; if it was true here, it may
            be changed.
        """
        self._plain = plain
        self.kv.plain.write(plain)
        for bound in self._bound():
            bound.forget()
        self._place(self._now.tokens.shape[1])
        return self._now.plain or self.kv.plain

    def embed(self, tokens: int | Ids) -> None:
        """Runs the token embedding on an id, or on as many ids as `advance` counted."""
        self._now.embed(tokens)

    def run(self, layer: int, action: Action, stop: int | None = None) -> None:
        """Runs one layer, or those until `stop` that take the same action.

        Hidden states ping-pong between two buffers.
        """
        self._now.run(layer, stop or layer + 1, self._now.form_of(action, self._widened))

    def run_form(self, layer: int, form: Form) -> None:
        """Runs one layer in a form."""
        self._now.run(layer, layer + 1, form)

    def head(self, precision: Action, *, every: bool = False, form: Form | None = None) -> Logits:
        """Runs the LM head on the last token, or on every one; logits `[V]` or `[S, V]`.

        Args:
            precision: the requested one.
            every: return logits of all tokens of the pass.
            form: None takes the fastest that is good enough.
        """
        now, sessions = self._now, self.sessions
        final = now.hidden[self.num_layers % 2]  # [B, S, D]
        seq = final.shape[1]
        if not every and seq > 1:
            now = self._passes[1]
            now.hidden[self.num_layers % 2].write(final.array[:, -1:])
            final, seq = now.hidden[self.num_layers % 2], 1
        rows, passes = self.batch * seq, sessions.manifest.costs.passes
        widened = self._widened
        if self.batch == 1 and rows > 1:
            widened = head_widened(widened, rows, sessions.has_wide_head())
        form = form or head_form_of(passes, precision, rows, widened)
        run = now.heads.get(form)
        if run is None:
            now.logits = now.logits or self._logits(seq)
            run = now.bound(sessions.head(form), [final], [now.logits])
            now.heads[form] = run
        run()
        assert now.logits is not None
        logits = now.logits.array if self.batch > 1 else now.logits.array[0]
        return logits if every else logits[..., -1, :]

    def head_of(self, hidden: Logits, precision: Action) -> Logits:
        """Runs the LM head on rows of any sequences.

        Args:
            hidden: `[S, D]`, outputs of the last layer.
            precision: the requested one.

        Returns:
            Logits `[S, V]`; the next pass of as many rows overwrites them.
        """
        rows = len(hidden)
        with self._lock:
            self._now = self._passes.get(rows) or self._pass(rows)
            self._now.hidden[self.num_layers % 2].write(hidden[None])
            return self.head(precision, every=True)

    def _bound(self) -> Iterable[Pass]:
        """All passes so far."""
        return self._passes.values()

    def _pass(self, seq: int) -> Pass:
        return self._passes.setdefault(seq, Pass(self.sessions, self.kv, self._lengths, seq))

    def _logits(self, seq: int) -> Buffer:
        dims, backend = self.sessions.manifest.dims, self.sessions.backend
        shape = (self.batch, seq, dims.vocab_size)
        fitting = [rows for rows in _SHARED_LOGITS if rows >= seq]
        if self.batch > 1 or seq == 1 or not fitting or backend.device != "cpu":
            return backend.buffer(shape, dims.dtype)
        rows = fitting[0]
        if rows not in self._logits_of:
            self._logits_of[rows] = backend.buffer((rows, dims.vocab_size), dims.dtype)
        return self._logits_of[rows].reshaped(shape)
