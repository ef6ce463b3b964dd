"""What passes run on: buffers for S tokens of each of B sequences, and the graphs bound to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dash_onnx.core.actions import Action, Form
from dash_onnx.core.arrays import Ids
from dash_onnx.core.block import ATTENTIONS
from dash_onnx.core.contract import Ports
from dash_onnx.core.errors import DeviceError, first_line
from dash_onnx.core.forms import form_of
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.buffers import Buffer, Run
from dash_onnx.runtime.kv import CAPACITY, KVCache, mask_of
from dash_onnx.runtime.sessions import LoadedGraph, Sessions


@dataclass(frozen=True)
class Lengths:
    """Where the tokens of a pass are, as every layer reads it: written once per pass.

    Attributes:
        seqlens: tokens of each sequence after the pass, minus one, `[B]` int32.
        counts: valid tokens of the pass, `[B]` int32; only the CPU's graphs read it.
        start: tokens before the pass, `[B]` int64.
        total: tokens of the longest sequence after the pass, int32 scalar on the CPU.
    """

    seqlens: Buffer
    counts: Buffer
    start: Buffer
    total: Buffer

    @classmethod
    def new(cls, backend: Backend, batch: int) -> Lengths:
        """Those of B sequences."""
        counts, total = Buffer((batch,), "int32"), Buffer((), "int32")
        return cls(
            backend.buffer((batch,), "int32"), counts, backend.buffer((batch,), "int64"), total
        )

    def part(self, start: int, stop: int) -> Lengths:
        """Those of the sequences `start` to `stop`, in the same memory."""
        seqlens, counts, starts = (
            buffer.part(start, stop) for buffer in (self.seqlens, self.counts, self.start)
        )
        return Lengths(seqlens, counts, starts, self.total)

    def write(self, first: int, count: int) -> None:
        """Sets that all sequences have `count` tokens from position `first` on."""
        self.seqlens.write(first + count - 1)
        self.start.write(first)
        self.counts.write(count)


class Pass:
    """Buffers and bound graphs for passes of S tokens of each of B sequences.

    Attributes:
        seq: S.
        tokens: ids, `[B, S]` int64.
        positions: positions of the tokens, `[B, S]` int64.
        hidden: input of the even and of the odd layers, `[B, S, D]`.
        per_layer: what each layer reads from the tokens, `[B, S, L, P]`; None where none does.
        plain: whether the tokens attend by plain operators, bool scalar; None: see `see`. Passes of
            one token read that of the K/V cache.
        masks: by window, what the tokens see; set like `plain`.
        logits: `[B, S, V]`, once the LM head has run.
        heads: the LM head in each form, bound.
    """

    def __init__(
        self,
        sessions: Sessions,
        kv: KVCache,
        lengths: Lengths,
        seq: int,
        tensors: Sequence[Buffer] = (),
    ):
        """Allocates buffers.

        Args:
            sessions: sessions of the bundle.
            kv: K/V cache of the sequences.
            lengths: lengths of the sequences.
            seq: S.
            tensors: tokens, positions, both hidden states, and what layers read from the tokens, if
                another pass has them.
        """
        backend, dims = sessions.backend, sessions.manifest.dims
        per_layer = [] if dims.per_layer is None else [(kv.batch, seq, *dims.per_layer)]
        ids, shape = (kv.batch, seq), (kv.batch, seq, dims.hidden_size)
        tensors = tensors or [
            *(backend.buffer(ids, "int64") for _ in range(2)),
            *(backend.buffer(part, dims.dtype) for part in (shape, shape, *per_layer)),
        ]
        self.seq = seq
        self.tokens, self.positions, even, odd, *rest = self._tensors = tensors
        self.hidden, self.per_layer = (even, odd), rest[0] if rest else None
        self.plain: Buffer | None = None
        self.masks: dict[int | None, Buffer] = {}
        self.logits: Buffer | None = None
        self.heads: dict[Form, Run] = {}
        self._sessions, self._kv, self._lengths = sessions, kv, lengths
        self._forms: dict[tuple[Action, int, frozenset[Action]], Form] = {}
        self._layers: dict[tuple[int, int, Form, int], tuple[Run, ...]] = {}
        self._embed: Run | None = None
        sessions.bound[id(self)] = self

    def part(self, kv: KVCache, lengths: Lengths, start: int, stop: int) -> Pass:
        """The sequences `start` to `stop`, in the same memory."""
        tensors = [tensor.part(start, stop) for tensor in self._tensors]
        return Pass(self._sessions, kv, lengths, self.seq, tensors)

    def forget(self) -> None:
        """Forgets what depends on the K/V cache's memory."""
        self._layers.clear()
        self.plain = None
        self.masks.clear()

    def unbind(self) -> None:
        """Forgets all graphs, which it would keep in memory."""
        self._layers.clear()
        self.heads.clear()
        self._embed = None

    def see(self, longest: int, plain: bool | None = None) -> None:
        """Lets several tokens see those before them.

        Args:
            longest: tokens of the longest sequence.
            plain: whether by plain operators; None chooses the faster, until the K/V cache moves.
        """
        capacity = self._kv.capacity
        if self.plain is None:
            passes, self.plain = self._sessions.manifest.costs.passes, Buffer((), "bool")
            faster = passes is not None and passes.attends_plainly(self.seq, longest, capacity)
            self.plain.write(faster if plain is None else plain)
            size = self.seq if self.plain.array else 1  # the other attention reads none
            shape = (self._kv.batch, 1, 1, size, capacity)
            self.masks = {window: Buffer(shape, "float32") for window in self._kv.masks}
        if self.plain.array:
            for window, mask in self.masks.items():
                mask.write(mask_of(self.positions.array, capacity, window)[:, None, None])

    def see_as(self, whole: Pass, start: int, stop: int) -> None:
        """Lets the tokens see what those of sequences `start` to `stop` of a larger pass see."""
        if self.plain is None:
            self.plain = whole.plain
            self.masks = {window: mask.part(start, stop) for window, mask in whole.masks.items()}

    def embed(self, tokens: int | Ids) -> None:
        """Runs the token embedding."""
        self.tokens.write(tokens)
        run = self._embed
        if run is None:
            outputs = [self.hidden[0], *([] if self.per_layer is None else [self.per_layer])]
            run = self._embed = self.bound(self._sessions.embed(), [self.tokens], outputs)
        run()

    def form_of(self, action: Action, widened: frozenset[Action]) -> Form:
        """The graph that runs an action here, see `core.forms.form_of`."""
        context = int(self._lengths.total.array) - self.seq  # of the longest sequence
        key = action, context // CAPACITY, widened
        form = self._forms.get(key)
        if form is None:
            passes, rows = self._sessions.manifest.costs.passes, math.prod(self.tokens.shape)
            form = self._forms[key] = form_of(passes, action, rows, key[1] * CAPACITY, widened)
        return form

    def run(self, start: int, stop: int, form: Form) -> None:
        """Runs the layers `start` to `stop` in a form."""
        states = self._kv.states
        key = (start, stop, form, 0 if states is None else states.turn)
        for run in self._layers.get(key) or self._bind_layers(*key):
            run()

    def _bind_layers(self, start: int, stop: int, form: Form, turn: int) -> tuple[Run, ...]:
        """Binds the layers; `turn` is that of their states."""
        layers, sessions = range(start, stop), self._sessions
        graph = sessions.joined(layers, form)
        if graph is not None:
            runs: tuple[Run, ...] = (
                self._bind(layers, graph, sessions.manifest.names_joined(layers)),
            )
        else:
            each = ((layer, sessions.layer(layer, form)) for layer in layers)
            runs = tuple(self._bind(range(layer, layer + 1), one, [{}]) for layer, one in each)
        return self._layers.setdefault((start, stop, form, turn), runs)

    def _bind(self, layers: range, graph: LoadedGraph, names: Sequence[dict[str, str]]) -> Run:
        """Binds a graph of some layers; `names` are those of the ports where it has several."""
        manifest, kv, lengths = self._sessions.manifest, self._kv, self._lengths
        buffers = {
            "hidden_in": self.hidden[layers.start % 2],
            "hidden_out": self.hidden[layers.stop % 2],
            "seqlens_k": lengths.seqlens,
            "total_sequence_length": lengths.total,
            "query_seqlens": lengths.counts,
            "start": lengths.start,
            "positions": self.positions,
            "plain": self.plain or kv.plain,
            **({} if self.per_layer is None else {"per_layer": self.per_layer}),
        }
        for layer, called in zip(layers, names, strict=True):
            attention = manifest.attention[layer]
            if manifest.mixer_of(layer) not in ATTENTIONS:
                assert kv.states is not None
                own = kv.states.ports(layer)
            else:
                cos, sin = kv.rotary[manifest.rope_of(layer)]
                source = layer if attention.source is None else attention.source
                own = {
                    "past_key": kv.keys[source],
                    "past_value": kv.values[source],
                    "present_key": kv.keys[source],
                    "present_value": kv.values[source],
                    "mask": (self.masks or kv.masks)[attention.window],
                    "cos_cache": cos,
                    "sin_cache": sin,
                }
            buffers |= {called.get(name, name): buffer for name, buffer in own.items()}
        inputs = [buffers[port.name] for port in graph.ports.inputs]
        outputs = [buffers[port.name] for port in graph.ports.outputs]
        return self.bound(graph, inputs, outputs)

    def bound(self, graph: LoadedGraph, inputs: list[Buffer], outputs: list[Buffer]) -> Run:
        """Binds a graph of this pass."""
        backend = self._sessions.backend
        run = bound_run(graph.session, graph.ports, inputs, outputs, backend.run_options)
        return run if self.seq > 1 else backend.repeated(run)


def bound_run(
    session: Any,
    ports: Ports,
    inputs: Sequence[Buffer],
    outputs: Sequence[Buffer],
    run_options: Any = None,
) -> Run:
    """Binds every port of a graph to a buffer, once; returns a function that runs it repeatedly.

    A port whose sizes are all known takes as much of its buffer, in its own shape. The function
    raises a DeviceError if ORT fails, for example on a device without free memory.
    """
    binding = session.io_binding()
    for bind_port, side, buffers in (
        (binding.bind_input, ports.inputs, inputs),
        (binding.bind_output, ports.outputs, outputs),
    ):
        for port, buffer in zip(side, buffers, strict=True):
            known = tuple(size for size in port.shape if isinstance(size, int))
            shape = known if len(known) == len(port.shape) else buffer.shape
            bind_port(port.name, buffer.device, 0, buffer.dtype.type, shape, buffer.pointer)

    def run() -> None:
        try:
            session.run_with_iobinding(binding, run_options)
        except Exception as error:  # ORT raises types of its C extension, without a common base
            raise DeviceError(f"ONNX Runtime cannot run a graph: {first_line(error)}") from None

    # The binding holds raw addresses: the function must keep the buffers alive.
    run.buffers = (inputs, outputs)  # type: ignore[attr-defined]
    return run
