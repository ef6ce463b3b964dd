"""A sequence, or several of one length: K/V cache, buffers, and the loop that runs its tokens."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dash_onnx.core.actions import Action, Path
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.contract import Ports
from dash_onnx.core.errors import ContextLengthError
from dash_onnx.runtime.buffers import Buffer, Run, bound_run
from dash_onnx.runtime.deciders import Decider, FixedPath
from dash_onnx.runtime.kv import CAPACITY, KVCache, KVPart
from dash_onnx.runtime.planner import MOST
from dash_onnx.runtime.sessions import Sessions

PREFILL_CHUNK = 512
"""Tokens of a prompt that run at once: bounds memory, long enough for full GEMM speed."""

_KEPT = 16  # tokens: bindings for longer passes go when their prompt has run
_PREVIEWED = 32  # tokens: for each an INT2 head gathers 256 rows of the INT8 head


@dataclass
class _Pass:
    """Buffers and bound graphs for passes of S tokens of each of B sequences."""

    tokens: Buffer  # [B, S] int64
    hidden: tuple[Buffer, Buffer]  # [B, S, D]: input of the even and of the odd layers
    embed: Run
    layers: list[dict[Action, Run]]
    logits: Buffer | None = None  # [B, S, V]
    heads: dict[Action, Run] = field(default_factory=dict)


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
            capacity: tokens that its K/V cache has room for at first; it doubles when full.
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
        self._guessed: Buffer | None = None  # logits that passes with guesses share
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
        tokens, even, odd, logits = (
            buffer.part(start, stop) for buffer in (mine.tokens, *mine.hidden, mine.logits)
        )
        part._passes = {}
        part._now = part._pass(1, tokens, (even, odd))
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

    def truncate(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        self.kv.truncate(length)

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
        for layer in range(self.num_layers):
            decider.before(layer)
            self.run(layer, decider.action(layer))
            decider.after(layer)
        return decider.end()

    def prefill(
        self,
        ids: Ids,
        path: Path,
        head: Action,
        *,
        every: bool = False,
        chunk: int = PREFILL_CHUNK,
    ) -> Logits:
        """Runs a prompt of any length on one path, in chunks.

        Args:
            ids: `[S]` or `[B, S]`, at least one token.
            path: action of each layer.
            head: precision of the LM head.
            every: logits after every token, not after the last one alone.
            chunk: tokens that run at once.

        Returns:
            Logits `[V]` (the next call overwrites them), or a copy `[S, V]` float32 with `every`.

        Raises:
            ContextLengthError: it does not fit the context.
        """
        if every and head == "int2":
            chunk = min(chunk, _PREVIEWED)
        decider, rows = FixedPath(path, head), []
        for start in range(0, ids.shape[-1], chunk):
            self.layers(ids[..., start : start + chunk], decider)
            if every:
                rows.append(self.head(head, every=True).astype(np.float32))
        logits = np.concatenate(rows, -2) if every else self.head(head)
        for count in [count for count in self._passes if count > _KEPT]:
            del self._passes[count]
        return logits

    def advance(self, count: int) -> None:
        """Makes room in the K/V cache for the next `count` tokens, and sets their positions.

        Raises:
            ContextLengthError: they do not fit the context.
        """
        total = self.kv.length + count
        limit = self.sessions.manifest.model.max_length
        if total > limit:
            raise ContextLengthError(f"{total} tokens do not fit the context of {limit}")
        self.reserve(total)
        self.kv.length = total
        self._seqlens.write(total - 1)
        self._total.write(self._longest(total, count))
        self._start.write(total - count)
        self._now = self._passes.get(count) or self._pass(count)

    def reserve(self, total: int) -> None:
        """Makes room in the K/V cache for `total` tokens."""
        self.kv.reserve(total)
        if self.kv.moves != self._moves:
            self._moves = self.kv.moves
            for bound in self._passes.values():
                for runs in bound.layers:
                    runs.clear()

    def _longest(self, total: int, count: int) -> int:
        """The sequence length that the graphs are told on the host."""
        return total

    def rest(self) -> None:
        """Lets a pass of the batch that it is a part of run over it: what that writes is nothing.

        Its position is the first one after the valid ones, so that they stay as they are.
        """
        self.reserve(self.length + 1)
        self._seqlens.write(self.length)
        self._start.write(self.length)

    def agree(self, longest: int) -> None:
        """Takes positions that the parts of a batch have set, of which the longest is told."""
        self.reserve(longest)
        self._total.write(longest)
        self._now = self._passes[1]

    def embed(self, tokens: int | Ids) -> None:
        """Runs the token embedding on an id, or on as many ids as were advanced by."""
        self._now.tokens.write(tokens)
        self._now.embed()

    def run(self, layer: int, action: Action) -> None:
        """Runs one layer: hidden states ping-pong between two buffers."""
        runs = self._now.layers[layer]
        (runs.get(action) or runs.setdefault(action, self._bind_layer(layer, action)))()

    def head(self, precision: Action, *, every: bool = False) -> Logits:
        """Runs the LM head on the last token, or on every one; logits `[V]` or `[S, V]`."""
        now, sessions = self._now, self.sessions
        final = now.hidden[self.num_layers % 2]  # [B, S, D]
        seq = final.shape[1]
        if not every and seq > 1:
            now = self._passes[1]
            now.hidden[self.num_layers % 2].write(final.array[:, -1:])
            final, seq = now.hidden[self.num_layers % 2], 1
        run = now.heads.get(precision)
        if run is None:
            now.logits = now.logits or self._logits(seq)
            run = now.heads[precision] = self._bound(
                seq, sessions.head(precision), sessions.head_ports, [final], [now.logits]
            )
        run()
        assert now.logits is not None
        logits = now.logits.array if self.batch > 1 else now.logits.array[0]
        return logits if every else logits[..., -1, :]

    def _pass(
        self, seq: int, tokens: Buffer | None = None, hidden: tuple[Buffer, Buffer] | None = None
    ) -> _Pass:
        sessions = self.sessions
        backend, dims = sessions.backend, sessions.manifest.dims
        tokens = tokens or backend.buffer((self.batch, seq), "int64")
        shape = (self.batch, seq, dims.hidden_size)
        hidden = hidden or (backend.buffer(shape, dims.dtype), backend.buffer(shape, dims.dtype))
        embed = self._bound(seq, sessions.embed(), sessions.embed_ports, [tokens], [hidden[0]])
        layers: list[dict[Action, Run]] = [{} for _ in range(self.num_layers)]
        return self._passes.setdefault(seq, _Pass(tokens, hidden, embed, layers))

    def _logits(self, seq: int) -> Buffer:
        dims, backend = self.sessions.manifest.dims, self.sessions.backend
        shape = (self.batch, seq, dims.vocab_size)
        if self.batch > 1 or not 1 < seq <= MOST + 1 or backend.device != "cpu":
            return backend.buffer(shape, dims.dtype)
        if self._guessed is None:
            self._guessed = backend.buffer((MOST + 1, dims.vocab_size), dims.dtype)
        return self._guessed.reshaped(shape)

    def _bind_layer(self, layer: int, action: Action) -> Run:
        sessions, kv, hidden = self.sessions, self.kv, self._now.hidden
        key, value = kv.keys[layer], kv.values[layer]
        source, target = hidden[layer % 2], hidden[(layer + 1) % 2]
        rotary = kv.rotary[sessions.manifest.rope_of(layer)]
        inputs = [source, key, value, self._seqlens, self._total, self._start, *rotary]
        session, ports = sessions.layer(layer, action), sessions.layer_ports
        return self._bound(source.shape[1], session, ports, inputs, [target, key, value])

    def _bound(
        self, seq: int, session: Any, ports: Ports, inputs: list[Buffer], outputs: list[Buffer]
    ) -> Run:
        """Binds a graph of a pass of `seq` tokens."""
        return bound_run(session, ports, inputs, outputs, self.sessions.backend.run_options)
