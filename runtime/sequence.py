"""A sequence, or several of one length: K/V cache, buffers, and the loop that runs its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field

import numpy as np

from dash_onnx.core.actions import Action, Form, Path
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.errors import ContextLengthError
from dash_onnx.core.forms import form_of, head_form_of
from dash_onnx.runtime.buffers import Buffer, Run, bound_run
from dash_onnx.runtime.deciders import Decider, FixedPath
from dash_onnx.runtime.guesses import MOST, MOST_ROWS
from dash_onnx.runtime.kv import CAPACITY, KVCache, KVPart, mask_of
from dash_onnx.runtime.sessions import LoadedGraph, Sessions

PREFILL_CHUNK = 512
"""Tokens of a prompt that run at once: bounds memory, long enough for full GEMM speed."""

_KEPT = 16  # tokens: bindings for longer passes go when their prompt has run
_SHARED_LOGITS = (MOST + 1, MOST_ROWS)  # rows of buffers for the logits of passes with guesses
_PREVIEWED = 32  # tokens: for each an INT2 head gathers 256 rows of the INT8 head


@dataclass
class _Pass:
    """Buffers and bound graphs for passes of S tokens of each of B sequences."""

    tokens: Buffer  # [B, S] int64
    positions: Buffer  # [B, S] int64
    hidden: tuple[Buffer, Buffer]  # [B, S, D]: input of the even and of the odd layers
    embed: Run
    layers: dict[tuple[int, int, Form], tuple[Run, ...]] = field(default_factory=dict)
    forms: dict[Action, Form] = field(default_factory=dict)  # of the layers
    plain: Buffer | None = None  # how passes of several tokens attend, see `KVCache`
    masks: dict[int | None, Buffer] = field(default_factory=dict)  # likewise
    logits: Buffer | None = None  # [B, S, V]
    heads: dict[Form, Run] = field(default_factory=dict)

    def forget(self) -> None:
        """Forgets what depends on the K/V cache's memory."""
        self.forms.clear()
        self.plain = None
        self.masks.clear()
        self.layers.clear()


class SequenceState:
    """K/V cache, buffers and bindings of one sequence; one generation at a time uses it.

    Or of a batch: B sequences of one length, whose tokens take the same path. Then ids and logits
    have a first dimension of B. ONNX Runtime's attention runs several tokens of each at once only
    at their beginning, later one.

    `forward` is the decode loop. Its parts (`advance`, `embed`, `run`, `head`) are public for those
    who time or rearrange them.
    """

    def __init__(self, sessions: Sessions, capacity: int = CAPACITY, batch: int = 1):
        """Allocates an empty cache; sequences share nothing but the sessions.

        Args:
            sessions: of the bundle.
            capacity: tokens that its K/V cache has room for at first; it grows in steps.
            batch: sequences.
        """
        backend = sessions.backend
        self.sessions = sessions
        self.num_layers = sessions.manifest.model.num_layers
        self.batch = batch
        self.kv = KVCache(sessions.manifest, backend, capacity, batch)
        # Position state, read by every layer: written once per pass.
        self._seqlens = backend.buffer((batch,), "int32")
        self._total = Buffer((), "int32")  # GroupQueryAttention wants it on the CPU
        self._start = backend.buffer((batch,), "int64")
        self._counts = Buffer((batch,), "int32")  # of valid tokens; the CPU's graphs alone read it
        self._passes: dict[int, _Pass] = {}
        self._shared: dict[int, _Pass] = {}  # of several tokens, see `join`
        self._whole: tuple[SequenceState, int, int] | None = None  # that this is a part of
        self._logits_of: dict[int, Buffer] = {}  # by rows, shared by passes with guesses
        self._widened = sessions.widened  # actions that passes of several rows may run wide
        self._plain: bool | None = None  # how passes attend; None: as is faster
        self._moves = self.kv.moves  # of the cache that the layers are bound to
        self._now = self._pass(1)

    def part(self, start: int, stop: int) -> SequenceState:
        """Sequences `start` to `stop` of this batch, in its memory, with a length of their own.

        Raises:
            DeviceError: the device cannot.
        """
        part = copy(self)
        part.batch = stop - start
        part.kv = KVPart(self.kv, start, stop)
        part._seqlens, part._start, part._counts = (
            buffer.part(start, stop) for buffer in (self._seqlens, self._start, self._counts)
        )
        part._whole, part._shared = (self, start, stop), {}
        mine = self._passes[1]
        mine.logits = mine.logits or self._logits(1)
        tokens, positions, even, odd, logits = (
            buffer.part(start, stop)
            for buffer in (mine.tokens, mine.positions, *mine.hidden, mine.logits)
        )
        part._passes = {}
        part._now = part._pass(1, tokens, positions, (even, odd))
        part._now.logits = logits
        return part

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
    ) -> tuple[Logits, Path]:
        """Runs one token, or several at once that take the same path.

        Args:
            tokens: an id, ids `[S]` with S up to `PREFILL_CHUNK`, or `[B, S]`.
            decider: chooses each layer's action.
            every: logits after every token, not after the last one alone.

        Returns:
            Logits `[V]`, or `[S, V]` with `every` (the next call overwrites them), and the path.

        Raises:
            ContextLengthError: the tokens do not fit the context.
        """
        path = self.layers(tokens, decider)
        return self.head(decider.head, every=every), path

    def layers(self, tokens: int | Ids, decider: Decider) -> Path:
        """Does what `forward` does but for the LM head."""
        self.advance(1 if isinstance(tokens, int) else tokens.shape[-1])
        self.embed(tokens)
        decider.begin()
        for start, stop in decider.segments:
            decider.before(start)
            self.run(start, decider.action(start), stop)
            decider.after(start)
        return decider.end()

    def prefill(
        self,
        ids: Ids,
        path: Path,
        head: Action,
        widened: frozenset[Action] = frozenset(),
        joined: bool = True,
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
            joined: whether layers may run as one graph.
            every: logits after every token, not after the last one alone.
            chunk: tokens that run at once.

        Returns:
            Logits `[V]` (the next call overwrites them), or a copy `[S, V]` float32 with `every`.

        Raises:
            ContextLengthError: it does not fit the context.
        """
        if every and head == "int2":
            chunk = min(chunk, _PREVIEWED)
        decider, rows = FixedPath(path, head, joined=joined), []
        self._check_room(self.length + ids.shape[-1])
        self.reserve(self.length + ids.shape[-1])  # at once, not in steps as its chunks run
        with self.widening(widened):
            for start in range(0, ids.shape[-1], chunk):
                self.layers(ids[..., start : start + chunk], decider)
                if every:
                    rows.append(self.head(head, every=True).astype(np.float32))
            logits = np.concatenate(rows, -2) if every else self.head(head)
        for count in [count for count in self._passes if count > _KEPT]:
            del self._passes[count]
        self.sessions.settle()
        return logits

    @contextmanager
    def widening(self, widened: frozenset[Action]) -> Iterator[None]:
        """Lets passes of several rows run these actions wide, instead of the usual ones."""
        usual = self._widened
        self._widen(widened)
        try:
            yield
        finally:
            self._widen(usual)

    def _widen(self, widened: frozenset[Action]) -> None:
        if widened != self._widened:
            self._widened = widened
            for bound in (*self._passes.values(), *self._shared.values()):
                bound.forms.clear()

    def advance(self, count: int) -> None:
        """Makes room in the K/V cache for the next `count` tokens, and sets their positions.

        Raises:
            ContextLengthError: they do not fit the context.
        """
        total = self.kv.length + count
        self._check_room(total)
        self.reserve(total)
        self.kv.begin(count)
        self._seqlens.write(total - 1)
        self._total.write(self._longest(total, count))
        self._start.write(total - count)
        self._counts.write(count)
        self._now = self._passes.get(count) or self._pass(count)
        self._place(count)

    def _check_room(self, total: int) -> None:
        limit = self.sessions.manifest.model.max_length
        if total > limit:
            raise ContextLengthError(f"{total} tokens do not fit the context of {limit}")

    def reserve(self, total: int) -> None:
        """Makes room in the K/V cache for `total` tokens."""
        self.kv.reserve(total)
        if self.kv.moves != self._moves:
            self._moves = self.kv.moves
            for bound in (*self._passes.values(), *self._shared.values()):
                bound.forget()

    def _place(self, count: int) -> None:
        """Writes where the last `count` tokens are, and what they see."""
        now, kv = self._now, self.kv
        first, total = kv.length - count, kv.length
        now.positions.write(np.arange(first, total))
        if count > 1:
            self._see(total)
            return
        if self._plain is None:
            kv.settle(total)
        kv.show(total)

    def _see(self, longest: int) -> None:
        """Lets the tokens of a pass of several see those before them, and chooses how they attend.

        Args:
            longest: tokens of the longest sequence.
        """
        now, kv = self._now, self.kv
        count = now.tokens.shape[1]
        if now.plain is None:
            passes, now.plain = self.sessions.manifest.costs.passes, Buffer((), "bool")
            faster = passes is not None and passes.attends_plainly(count, longest, kv.capacity)
            now.plain.write(faster if self._plain is None else self._plain)
            size = count if now.plain.array else 1  # the other attention reads none
            shape = (self.batch, 1, 1, size, kv.capacity)
            now.masks = {window: Buffer(shape, "float32") for window in kv.masks}
        if now.plain.array:
            for window, mask in now.masks.items():
                mask.write(mask_of(now.positions.array, kv.capacity, window)[:, None, None])

    def _longest(self, total: int, count: int) -> int:
        """The sequence length that the graphs are told on the host."""
        return total

    def join(self, count: int, seq: int) -> None:
        """Takes part in a pass of the batch that this is a part of.

        Args:
            count: tokens of this sequence; makes room for them as `advance` does.
            seq: tokens of each sequence in the pass, which pads those that have fewer.

        Raises:
            ContextLengthError: they do not fit the context.
        """
        if seq == 1:
            self.advance(1)
            return
        first = self.kv.length
        self._check_room(first + seq)
        self.reserve(first + seq)
        self.kv.begin(count)
        self._join(first, count, seq)

    def rest(self, seq: int) -> None:
        """Lets a pass of `seq` tokens run over this part of a batch: what that writes is nothing.

        Its positions are the first ones after the valid ones, which stay as they are.
        """
        self.reserve(self.length + seq)
        self.kv.rest()
        self._join(self.length, 1, seq)
        if seq == 1:
            self.kv.show(self.length + 1)

    def _join(self, first: int, count: int, seq: int) -> None:
        self._seqlens.write(first + count - 1)
        self._start.write(first)
        self._counts.write(count)
        self._pass_of(seq).positions.write(np.arange(first, first + seq))

    def _pass_of(self, seq: int) -> _Pass:
        """The pass that the parts of a batch share, or this one's part of it."""
        if seq == 1:
            return self._passes[1]
        found = self._shared.get(seq)
        if found is None:
            if self._whole is None:
                found = self._new_pass(seq)
            else:
                whole, start, stop = self._whole
                mine = whole._pass_of(seq)
                tokens, positions, even, odd = (
                    buffer.part(start, stop)
                    for buffer in (mine.tokens, mine.positions, *mine.hidden)
                )
                found = self._new_pass(seq, tokens, positions, (even, odd))
            self._shared[seq] = found
        return found

    def follow(self, seq: int) -> None:
        """Takes the pass of `seq` tokens for which a larger part of the batch has agreed."""
        now = self._now = self._pass_of(seq)
        if now.plain is None and self._whole is not None and seq > 1:
            whole, start, stop = self._whole
            mine = whole._pass_of(seq)
            now.plain = mine.plain
            now.masks = {window: mask.part(start, stop) for window, mask in mine.masks.items()}

    def attend(self, plain: bool) -> Buffer:
        """Attends by plain operators, or not, until the K/V cache moves: for those who time it.

        Returns:
            What tells the pass that runs now. Where it said true here, it may change.
        """
        self._plain = plain
        self.kv.plain.write(plain)
        for bound in self._passes.values():
            bound.forget()
        self._place(self._now.tokens.shape[1])
        return self._now.plain or self.kv.plain

    def agree(self, longest: int, seq: int) -> None:
        """Takes positions that the parts of a batch have set, for a pass of `seq` tokens of each.

        Args:
            longest: tokens of the longest sequence.
            seq: tokens of each sequence in the pass.
        """
        self.reserve(longest)
        self._total.write(longest)
        if seq == 1:
            self.kv.settle(longest)
            self._now = self._passes[1]
            return
        if self._whole is not None:
            whole, _, _ = self._whole
            whole._now = whole._pass_of(seq)
            whole._see(longest)
        self.follow(seq)

    def embed(self, tokens: int | Ids) -> None:
        """Runs the token embedding on an id, or on as many ids as were advanced by."""
        self._now.tokens.write(tokens)
        self._now.embed()

    def run(self, layer: int, action: Action, stop: int | None = None) -> None:
        """Runs one layer, or those until `stop` that take the same action.

        Hidden states ping-pong between two buffers.
        """
        self.run_form(layer, self._now.forms.get(action) or self._form(action), stop)

    def run_form(self, layer: int, form: Form, stop: int | None = None) -> None:
        """Likewise in a form."""
        key = (layer, stop or layer + 1, form)
        for run in self._now.layers.get(key) or self._bind_layers(*key):
            run()

    def _form(self, action: Action) -> Form:
        """The graph that runs an action in passes like the one that runs now."""
        passes, rows = self.sessions.manifest.costs.passes, self._now.tokens.array.size
        form = form_of(passes, action, rows, self.kv.capacity, self._widened)
        return self._now.forms.setdefault(action, form)

    def head(self, precision: Action, *, every: bool = False, form: Form | None = None) -> Logits:
        """Runs the LM head on the last token, or on every one; logits `[V]` or `[S, V]`.

        Args:
            precision: that is asked for.
            every: of all tokens of the pass.
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
        form = form or head_form_of(passes, precision, rows, self._widened)
        run = now.heads.get(form)
        if run is None:
            now.logits = now.logits or self._logits(seq)
            run = self._bound(seq, sessions.head(form), [final], [now.logits])
            now.heads[form] = run
        run()
        assert now.logits is not None
        logits = now.logits.array if self.batch > 1 else now.logits.array[0]
        return logits if every else logits[..., -1, :]

    def head_of(self, hidden: Logits, precision: Action) -> Logits:
        """Runs the LM head on rows of any sequences.

        Args:
            hidden: `[S, D]`, outputs of the last layer.
            precision: that is asked for.

        Returns:
            Logits `[S, V]`; the next pass of as many rows overwrites them.
        """
        rows = len(hidden)
        self._now = self._passes.get(rows) or self._pass(rows)
        self._now.hidden[self.num_layers % 2].write(hidden[None])
        return self.head(precision, every=True)

    def _pass(
        self,
        seq: int,
        tokens: Buffer | None = None,
        positions: Buffer | None = None,
        hidden: tuple[Buffer, Buffer] | None = None,
    ) -> _Pass:
        return self._passes.setdefault(seq, self._new_pass(seq, tokens, positions, hidden))

    def _new_pass(
        self,
        seq: int,
        tokens: Buffer | None = None,
        positions: Buffer | None = None,
        hidden: tuple[Buffer, Buffer] | None = None,
    ) -> _Pass:
        sessions = self.sessions
        backend, dims = sessions.backend, sessions.manifest.dims
        tokens = tokens or backend.buffer((self.batch, seq), "int64")
        positions = positions or backend.buffer((self.batch, seq), "int64")
        shape = (self.batch, seq, dims.hidden_size)
        hidden = hidden or (backend.buffer(shape, dims.dtype), backend.buffer(shape, dims.dtype))
        embed = self._bound(seq, sessions.embed(), [tokens], [hidden[0]])
        return _Pass(tokens, positions, hidden, embed)

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

    def _bind_layers(self, start: int, stop: int, form: Form) -> tuple[Run, ...]:
        layers, sessions = range(start, stop), self.sessions
        graph = sessions.joined(layers, form)
        if graph is not None:
            runs: tuple[Run, ...] = (
                self._bind(layers, graph, sessions.manifest.names_joined(layers)),
            )
        else:
            each = ((layer, sessions.layer(layer, form)) for layer in layers)
            runs = tuple(self._bind(range(layer, layer + 1), one, [{}]) for layer, one in each)
        return self._now.layers.setdefault((start, stop, form), runs)

    def _bind(self, layers: range, graph: LoadedGraph, names: Sequence[dict[str, str]]) -> Run:
        """Binds a graph of some layers, whose ports have other names where it has several."""
        manifest, kv, now = self.sessions.manifest, self.kv, self._now
        source, target = now.hidden[layers.start % 2], now.hidden[layers.stop % 2]
        buffers = {
            "hidden_in": source,
            "hidden_out": target,
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
            "query_seqlens": self._counts,
            "start": self._start,
            "positions": now.positions,
            "plain": now.plain or kv.plain,
        }
        for layer, called in zip(layers, names, strict=True):
            if manifest.mixer_of(layer) != "attention":
                assert kv.states is not None
                states = kv.states.ports(layer)
                buffers |= {called.get(name, name): buffer for name, buffer in states.items()}
                continue
            cos, sin = kv.rotary[manifest.rope_of(layer)]
            own = {
                "past_key": kv.keys[layer],
                "past_value": kv.values[layer],
                "present_key": kv.keys[layer],
                "present_value": kv.values[layer],
                "mask": (now.masks or kv.masks)[manifest.attention[layer].window],
                "cos_cache": cos,
                "sin_cache": sin,
            }
            buffers |= {called.get(name, name): buffer for name, buffer in own.items()}
        inputs = [buffers[port.name] for port in graph.ports.inputs]
        outputs = [buffers[port.name] for port in graph.ports.outputs]
        return self._bound(source.shape[1], graph, inputs, outputs)

    def _bound(
        self, seq: int, graph: LoadedGraph, inputs: list[Buffer], outputs: list[Buffer]
    ) -> Run:
        """Binds a graph of a pass of `seq` tokens."""
        run_options = self.sessions.backend.run_options
        return bound_run(graph.session, graph.ports, inputs, outputs, run_options)
