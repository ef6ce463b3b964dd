"""The fused graph: the bundle's graphs inlined, an `If` per layer where the scorer decides."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import (
    load_external_data_for_tensor,
    set_external_data,
    uses_external_data,
)

from dash_onnx.core.actions import SKIP, WIDE, WIDENED, Action, Form
from dash_onnx.core.budget import scorer_facts
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import EMBED_PATH, head_path, layer_path, rotary_names
from dash_onnx.core.errors import BundleError
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.rope import rotary_tables
from dash_onnx.exporters.fused.clients import Client
from dash_onnx.exporters.fused.decisions import Decisions
from dash_onnx.exporters.fused.facts import BUDGET, DATA, PATH, FusedFacts
from dash_onnx.exporters.fused.rewrite import (
    attend_to_write,
    group_attention,
    names_read,
    rescore_last,
)
from dash_onnx.exporters.fused.widen import widen
from dash_onnx.exporters.graphs.graph import INLINE_BYTES, IR_VERSION
from dash_onnx.runtime.compose import rename

_OPSET = 23  # of RMSNormalization; TensorScatter, which needs 24, is not used
_ALIGNMENT = 64  # bytes; alignment of a tensor in the data file


@dataclass
class Fusion:
    """One fusion in progress.

    Attributes:
        data: the file of large weights, written front to back.
        client: the program that the graph is for.
        head: precision of the LM head.
        facts: holds the path of every token, or the budgets of the scorer.
    """

    bundle: Bundle
    data: BinaryIO
    client: Client
    head: Action
    facts: FusedFacts
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    _loaded: dict[str, onnx.ModelProto] = field(default_factory=dict)

    def build(self) -> onnx.ModelProto:
        """The whole graph."""
        manifest = self.bundle.manifest
        facts = manifest.model
        self._positions(manifest)
        embed = self._load(EMBED_PATH).graph
        self._inline(embed, "embed", {"input_ids": "input_ids", "hidden": "hidden.0"})
        self._turned("past")
        decisions = None
        if self.facts.budgets:
            decisions = Decisions(self, manifest, self.facts)
            decisions.begin()
            if not self.client.feeds_budget:
                default = np.array([self.facts.budgets.default], np.float32)
                self.initializers.append(numpy_helper.from_array(default, BUDGET))
            for group in decisions.groups:
                decisions.decide_after(group.start)
                self._decided(group, decisions)
        if self.facts.path and self.facts.prompt:
            self.node("Shape", ["input_ids"], ["length"], start=1, end=2)
            self.node("Greater", ["length", "one"], ["many"])
        for layer, action in enumerate(self.facts.path or ()):
            if self.facts.prompt and action in WIDENED:
                self._widened(layer, action)
            else:
                self._fixed(layer, action)
        self._turned("present")
        final = f"hidden.{facts.num_layers}"
        head = self._load(head_path(self.head)).graph
        rescore_last(head)
        self._inline(head, "head", {"hidden": final, "logits": "logits"})
        ports = self._ports(decisions is not None)
        if decisions:
            decisions.report()
        read = names_read(self.nodes)  # ONNX Runtime warns of weights that nothing reads
        initializers = [tensor for tensor in self.initializers if tensor.name in read]
        graph = helper.make_graph(self.nodes, "dash", *ports, initializers)
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dash-onnx"
        )

    def node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        """Adds a node to the main graph."""
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))

    def _ports(self, decides: bool) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """Inputs and outputs of the graph."""
        facts = self.bundle.manifest.model
        ids, mask = [1, "sequence_length"], [1, "total_sequence_length"]
        inputs = [_int64("input_ids", ids), _int64("attention_mask", mask)]
        if self.client.position_ids:
            inputs.append(_int64("position_ids", ids))
        outputs = [_float("logits", [*ids, facts.vocab_size])]
        manifest = self.bundle.manifest
        for layer in manifest.attending:
            for part in ("key", "value"):
                for side, name, length in (
                    (inputs, "past_key_values", "past_sequence_length"),
                    (outputs, "present", "total_sequence_length"),
                ):
                    shape = [1, facts.num_kv_heads, length, facts.head_dim]
                    side.append(_float(f"{name}.{layer}.{part}", shape))
        for layer, mixer in enumerate(manifest.mixers):
            for state, sizes in manifest.dims.state_shapes(mixer).items():
                shape = [1, *(reversed(sizes) if state == "conv" else sizes)]
                inputs.append(_float(f"past.{layer}.{state}", shape))
                outputs.append(_float(f"present.{layer}.{state}", shape))
        if decides:
            inputs.append(_float(BUDGET, [1]))
            outputs.append(_int64(PATH, [facts.num_layers]))
        return inputs, outputs

    def apart(self, build: Callable[[], None]) -> list[onnx.NodeProto]:
        """Collects the nodes that a function adds, for a branch instead of the main graph."""
        before, self.nodes = self.nodes, []
        build()
        added, self.nodes = self.nodes, before
        return added

    def constant(self, name: str, array: np.ndarray) -> str:
        """Adds an initializer to the main graph."""
        self.initializers.append(self._stored(numpy_helper.from_array(array, name)))
        return name

    def _positions(self, manifest: Manifest) -> None:
        """Computes the positions that every layer reads; names as in the contract of layers."""
        length = manifest.model.max_length
        for index, rope in enumerate(manifest.ropes):
            tables = rotary_tables(rope, length, "float32")
            for name, table in zip(rotary_names(index), tables, strict=True):
                self.constant(name, table)
        one = self.constant("one", np.array([1], np.int64))
        self.node("ReduceSum", ["attention_mask", one], ["valid"], keepdims=0)
        self.node("Sub", ["valid", one], ["last"])
        self.node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32)
        self.node("Shape", ["attention_mask"], ["mask_length"], start=1, end=2)
        self.node("Squeeze", ["mask_length"], ["total_length"])
        self.node("Cast", ["total_length"], ["total_sequence_length.0"], to=TensorProto.INT32)
        if manifest.block.reads_positions:
            self.node("Shape", ["input_ids"], ["count"], start=1, end=2)
            self.node("Sub", ["valid", "count"], ["before"])
            self.node("Squeeze", ["before"], ["first"])
            self.node("Squeeze", ["valid"], ["end"])
            step = self.constant("step", np.array(1, np.int64))
            self.node("Range", ["first", "end", step], ["positions.0"])
            axis = self.constant("axis", np.array([0], np.int64))
            self.node("Unsqueeze", ["positions.0", axis], ["positions"])

    def _made_by(self, layer: int) -> list[str]:
        """Values that a layer produces: the hidden state, and its K/V or states."""
        return [f"hidden.{layer + 1}", *(name for _, name in self._kept(layer, "present"))]

    def _kept(self, layer: int, side: str) -> list[tuple[str, str]]:
        """The K/V or states that a layer reads (`past`) or writes (`present`): port and value."""
        if (mixer := self.bundle.manifest.mixer_of(layer)) == "attention":
            name = "past_key_values" if side == "past" else "present"
            return [(f"{side}_{part}", f"{name}.{layer}.{part}") for part in ("key", "value")]
        kept = [(f"{side}_conv", f"{side}_conv.{layer}")]
        if mixer == "gated_delta":
            kept.append((f"{side}_recurrent", f"{side}.{layer}.recurrent"))
        return kept

    def _turned(self, side: str) -> None:
        """Transposes between GenAI's convolution states, `[1, channels, kernel - 1]`, and ours."""
        for layer, mixer in enumerate(self.bundle.manifest.mixers):
            if mixer != "attention":
                names = [f"{side}.{layer}.conv", f"{side}_conv.{layer}"]
                theirs, own = names if side == "past" else reversed(names)
                self.node("Transpose", [theirs], [own], perm=[0, 2, 1])

    def _fixed(self, layer: int, action: Action) -> None:
        """Adds a layer whose action is the same for every token."""
        branch = self._branch(layer, action, f"hidden.{layer}", self._made_by(layer))
        self.nodes += branch.node
        self.initializers += branch.initializer

    def _widened(self, layer: int, action: Action) -> None:
        """Adds a layer that runs in the wide form if a pass has several tokens."""
        hidden, outputs = f"hidden.{layer}", self._made_by(layer)
        branches = {
            f"{side}_branch": self._branch(layer, form, hidden, [f"{o}.{side}" for o in outputs])
            for side, form in (("then", WIDE), ("else", action))
        }
        self.node("If", ["many"], outputs, **branches)

    def _decided(self, group: range, decisions: Decisions) -> None:
        """Adds a group: one branch if all layers take the most common action, else an `If` each."""
        actions, flag = decisions.branches, decisions.flag(group)
        if len(actions) == 1:
            for layer in group:
                self._fixed(layer, actions[0])
            return
        if len(group) == 1:
            (layer,) = group
            self.nodes += self._if(layer, f"hidden.{layer}", self._made_by(layer), decisions, flag)
            return
        together = helper.make_graph([], f"layers_{group.start}_together", [], [])
        nodes: list[onnx.NodeProto] = []
        one = other = f"hidden.{group.start}"
        for layer in group:
            names = [f"{name}.together" for name in self._made_by(layer)]
            branch = self._branch(layer, actions[-1], one, names)
            together.node.extend(branch.node)
            together.initializer.extend(branch.initializer)
            together.output.extend(branch.output[1:])
            one = names[0]
            names = [f"{name}.apart" for name in self._made_by(layer)]
            nodes += self._if(layer, other, names, decisions)
            other = names[0]
        together.output.extend(_outputs([one]))
        present = [name for layer in group for name in self._made_by(layer)[1:]]
        apart = _outputs([*(f"{name}.apart" for name in present), other])
        branches = {
            "then_branch": together,
            "else_branch": helper.make_graph(nodes, f"layers_{group.start}_apart", [], apart),
        }
        self.node("If", [flag], [*present, f"hidden.{group.stop}"], **branches)

    def _if(
        self,
        layer: int,
        hidden: str,
        outputs: list[str],
        decisions: Decisions,
        flag: str = "",
        actions: Sequence[Action] = (),
    ) -> list[onnx.NodeProto]:
        """Nests an `If` per action: it tests the last one, and its else branch tests the rest.

        Args:
            layer: layer index.
            hidden: its input.
            outputs: hidden state, and K/V or states.
            decisions: the decisions to test.
            flag: flag for whether the last action is taken, if there is one already.
            actions: actions to choose between; if empty, all that the layer may take.
        """
        *rest, tested = actions or [a for a in decisions.branches if layer or a != SKIP]
        if not rest:
            only = self._branch(layer, tested, hidden, outputs)
            self.initializers += only.initializer
            return list(only.node)
        inner = [f"{name}.not_{tested}" for name in outputs]
        if len(rest) == 1:
            otherwise = self._branch(layer, rest[0], hidden, inner)
        else:
            nodes = self._if(layer, hidden, inner, decisions, actions=rest)
            otherwise = helper.make_graph(nodes, f"layer_{layer}_else", [], _outputs(inner))
        chosen = self._branch(layer, tested, hidden, [f"{name}.{tested}" for name in outputs])
        nodes = []
        if not flag:
            nodes, flag = decisions.condition(layer, tested)
        branches = {"then_branch": chosen, "else_branch": otherwise}
        return [*nodes, helper.make_node("If", [flag], outputs, **branches)]

    def _branch(
        self, layer: int, form: Form, before: str, outputs: Sequence[str]
    ) -> onnx.GraphProto:
        model = self._load(layer_path(layer, form))
        if form == SKIP and layer in self.bundle.manifest.attending:
            attend_to_write(model.graph, self.bundle.manifest)
        group_attention(model.graph)
        hidden, *kept = outputs
        written = [port for port, _ in self._kept(layer, "present")]
        cos, sin = rotary_names(self.bundle.manifest.rope_of(layer))
        names = {
            "hidden_in": before,
            **dict(self._kept(layer, "past")),
            **dict(zip(written, kept, strict=True)),
            "total_sequence_length": "total_sequence_length.0",
            "hidden_out": hidden,
            "seqlens_k": "seqlens_k",
            "positions": "positions",
            "cos_cache": cos,
            "sin_cache": sin,
        }
        self._adopt(model.graph, f"{hidden}.{form}.", names)
        graph = helper.make_graph(model.graph.node, f"layer_{layer}_{form}", [], _outputs(outputs))
        for tensor in model.graph.initializer:
            outside = uses_external_data(tensor) and not self.client.data_in_branches
            (self.initializers if outside else graph.initializer).append(tensor)
        return graph

    def _adopt(self, graph: onnx.GraphProto, prefix: str, names: dict[str, str]) -> None:
        """Renames a graph's values and rewrites the products that are slow in the client."""
        rename(graph, prefix, names)
        if not self.client.multiplies_blocks:
            self._add(widen(graph))

    def _inline(self, graph: onnx.GraphProto, prefix: str, names: dict[str, str]) -> None:
        self._adopt(graph, f"{prefix}.", names)
        self.nodes += graph.node
        self.initializers += graph.initializer

    def inline_scorer(self, prefix: str, names: dict[str, str]) -> None:
        """Adds the scorer once more; its weights are shared under the names of the first."""
        model = self._load(scorer_facts(self.bundle.manifest).file)
        weights = {tensor.name: f"scorer.{tensor.name}" for tensor in model.graph.initializer}
        rename(model.graph, f"{prefix}.", {**names, **weights})
        self.nodes += model.graph.node
        self._add(model.graph.initializer)

    def _add(self, tensors: Iterable[TensorProto]) -> None:
        """Adds the initializers that the main graph does not have yet."""
        known = {tensor.name for tensor in self.initializers}
        added = {tensor.name: tensor for tensor in tensors if tensor.name not in known}
        self.initializers += map(self._stored, added.values())

    def _load(self, path: str) -> onnx.ModelProto:
        """Loads a graph of the bundle and moves its large weights to the fused data file, once."""
        if (known := self._loaded.get(path)) is not None:
            return copy.deepcopy(known)
        file = self.bundle.verified(path)
        model = onnx.load(file, load_external_data=False)
        for tensor in model.graph.initializer:
            if uses_external_data(tensor):
                try:
                    load_external_data_for_tensor(tensor, str(file.parent))
                except onnx.checker.ValidationError as error:  # onnx refuses hard links
                    raise BundleError(f"cannot read {file}: {error}") from None
                self._append(tensor)
        self._loaded[path] = copy.deepcopy(model)
        return model

    def _stored(self, tensor: TensorProto) -> TensorProto:
        if len(tensor.raw_data) >= INLINE_BYTES:
            self._append(tensor)
        return tensor

    def _append(self, tensor: TensorProto) -> None:
        """Moves a tensor's data to the end of the data file."""
        self.data.write(bytes(-self.data.tell() % _ALIGNMENT))
        set_external_data(tensor, DATA, self.data.tell(), len(tensor.raw_data))
        self.data.write(tensor.raw_data)
        tensor.ClearField("raw_data")


def _int64(name: str, shape: list) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, shape)


def _float(name: str, shape: list | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _outputs(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    return [_float(name, None) for name in names]
