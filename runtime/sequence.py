"""A sequence, or several of one length: K/V cache, buffers, and the loop that runs its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dash_onnx.core.actions import Action, Form, Path
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.errors import ContextLengthError
from dash_onnx.core.forms import form_of, head_form_of
from dash_onnx.runtime.buffers import Buffer, Run, bound_run
from dash_onnx.runtime.deciders import Decider, FixedPath
from dash_onnx.runtime.guesses import MOST
from dash_onnx.runtime.kv import CAPACITY, KVCache, KVPart, mask_of
from dash_onnx.runtime.sessions import LoadedGraph, Sessions
from dash_onnx.runtime.states import LONG

PREFILL_CHUNK = 512
"""Tokens of a prompt that run at once: bounds memory, long enough for full GEMM speed."""

_KEPT = 16  # tokens: bindings for longer passes go when their prompt has run
_PREVIEWED = 32  # tokens: for each an INT2 head gathers 256 rows of the INT8 head


@dataclass
class _Pass:
    """Buffers and bound graphs for passes of S tokens of each of B sequences."""

    tokens: Buffer  # [B, S] int64
    positions: Buffer  # [B, S] int64
    hidden: tuple[Buffer, Buffer]  # [B, S, D]: input of the even and of the odd layers
    embed: Run
    layers: dict[tuple[int, int, Form, int], tuple[Run, ...]] = field(default_factory=dict)
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
        self._passes: dict[int, _Pass] = {}
        self._guessed: list[Buffer] = []  # logits that passes with guesses share, in all parts
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
        part._seqlens, part._start = self._seqlens.part(start, stop), self._start.part(start, stop)
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
            for start, stop in pairwise(self._cuts(ids.shape[-1], chunk)):
                self.layers(ids[..., start:stop], decider)
                if every:
                    rows.append(self.head(head, every=True).astype(np.float32))
            logits = np.concatenate(rows, -2) if every else self.head(head)
        for count in [count for count in self._passes if count > _KEPT]:
            del self._passes[count]
        self.sessions.settle()
        return logits

    def _cuts(self, count: int, chunk: int) -> list[int]:
        """Where the parts of a prompt begin that run at once, and where the last one ends.

        States are kept before its last token, which runs again for who asks once more.
        """
        cuts = {*range(0, count, chunk), count}
        if self.kv.states is not None and count > LONG:
            cuts.add(count - 1)
        return sorted(cuts)

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
            for bound in self._passes.values():
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
            for bound in self._passes.values():
                bound.forget()

    def _place(self, count: int) -> None:
        """Writes where the last `count` tokens are, and what they see."""
        now, kv = self._now, self.kv
        first, total = kv.length - count, kv.length
        now.positions.write(np.arange(first, total))
        if count > 1:
            self._place_several(first, total)
            return
        if self._plain is None:
            kv.settle(total)
        kv.show(total)

    def _place_several(self, first: int, total: int) -> None:
        now, kv, count = self._now, self.kv, total - first
        if now.plain is None:
            passes, now.plain = self.sessions.manifest.costs.passes, Buffer((), "bool")
            faster = passes is not None and passes.attends_plainly(count, total, kv.capacity)
            now.plain.write(faster if self._plain is None else self._plain)
            size = count if now.plain.array else 1  # the other attention reads none
            shape = (self.batch, 1, 1, size, kv.capacity)
            now.masks = {window: Buffer(shape, "float32") for window in kv.masks}
        if now.plain.array:
            for window, mask in now.masks.items():
                mask.write(mask_of(first, total, kv.capacity, window))

    def _longest(self, total: int, count: int) -> int:
        """The sequence length that the graphs are told on the host."""
        return total

    def rest(self) -> None:
        """Lets a pass of the batch that it is a part of run over it: what that writes is nothing.

        Its position is the first one after the valid ones, so that they stay as they are.
        """
        self.reserve(self.length + 1)
        self.kv.rest()
        self._seqlens.write(self.length)
        self._start.write(self.length)
        self._passes[1].positions.write(self.length)
        self.kv.show(self.length + 1)

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

    def agree(self, longest: int) -> None:
        """Takes positions that the parts of a batch have set, of which the longest is told."""
        self.reserve(longest)
        self.kv.settle(longest)
        self._total.write(longest)
        self._now = self._passes[1]

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
        for run in self._now.layers.get((*key, self.kv.turn)) or self._bind_layers(*key):
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

    def _pass(
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
        return self._passes.setdefault(seq, _Pass(tokens, positions, hidden, embed))

    def _logits(self, seq: int) -> Buffer:
        dims, backend = self.sessions.manifest.dims, self.sessions.backend
        shape = (self.batch, seq, dims.vocab_size)
        if self.batch > 1 or not 1 < seq <= MOST + 1 or backend.device != "cpu":
            return backend.buffer(shape, dims.dtype)
        if not self._guessed:
            self._guessed.append(backend.buffer((MOST + 1, dims.vocab_size), dims.dtype))
        return self._guessed[0].reshaped(shape)

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
        return self._now.layers.setdefault((start, stop, form, self.kv.turn), runs)

    def _bind(self, layers: range, graph: LoadedGraph, names: Sequence[dict[str, str]]) -> Run:
        """Binds a graph of some layers, whose ports have other names where it has several."""
        manifest, kv, now = self.sessions.manifest, self.kv, self._now
        source, target = now.hidden[layers.start % 2], now.hidden[layers.stop % 2]
        buffers = {
            "hidden_in": source,
            "hidden_out": target,
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
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
