"""The fused bundle: the policy as one ONNX graph, with an `If` per layer, for any ORT client.

The graphs of the bundle become its branches, with the same weights; only the skip graph writes
its K/V with GroupQueryAttention as the others do, so that clients may share past and present
buffers or not. Decoding decides per token; a prompt runs at one precision.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dash_onnx.actions import SKIP, Action
from dash_onnx.budget import Budget, scorer_facts
from dash_onnx.bundle import Bundle, writing
from dash_onnx.contract import EMBED_PATH, head_path, layer_path
from dash_onnx.errors import UnsupportedError
from dash_onnx.exporters.graphs.build import INLINE_BYTES, IR_VERSION
from dash_onnx.manifest import Manifest
from dash_onnx.policy import ScoredPolicy, StaticPolicy, make_policy
from dash_onnx.rope import rotary_tables

MODEL = "model.onnx"
DATA = "model.onnx.data"
BUDGET = "dash_budget"
"""Optional graph input, float `[1]`: fraction of the full time per token."""

PATH = "dash_path"
"""Graph output, int64 `[L]`: index of each layer's action in the bundle's list of actions."""

_OPSET = 23  # of RMSNormalization; TensorScatter, which needs 24, is not used
_ALIGNMENT = 64  # bytes, of a tensor in the data file
_NEVER = 1e30  # cost of an action that must not be chosen
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


def fuse(
    bundle: Bundle, out: Path, policy: str = "", budget: Budget | None = None, *, overwrite: bool
) -> None:
    """Writes a folder that ONNX Runtime GenAI loads as it is.

    Args:
        bundle: exported for the CPU.
        out: written to a temporary sibling and renamed at the end.
        policy: `dash`, or one with the same path for every token; see `make_policy`.
        budget: of `dash`: the default of the graph's own input.
        overwrite: replace an existing fused folder.

    Raises:
        DashError: the policy cannot be fused, or `out` must not be written.
    """
    manifest = bundle.manifest
    if manifest.target.device != "cpu":
        raise UnsupportedError(
            f"this bundle is for {manifest.target.device}; fused graphs are built for the CPU: "
            "export again with --device cpu"
        )
    chosen = make_policy(policy, manifest, budget)
    if isinstance(chosen, ScoredPolicy):
        fixed, default = None, chosen.budget
    elif isinstance(chosen, StaticPolicy):
        fixed, default = chosen.uniform, 0.0
    else:
        raise UnsupportedError(f"policy {chosen.name!r} has no graph; fuse dash or a static one")
    with writing(out, overwrite=overwrite, marker=MODEL) as folder:
        with (folder / DATA).open("wb") as data:
            model = _Fusion(bundle, data, chosen.head, fixed, default).build()
        onnx.save(model, folder / MODEL)
        onnx.checker.check_model(folder / MODEL)
        for name in _TEXT_FILES:
            if name in bundle:
                shutil.copy(bundle.verified(name), folder / name)
        (folder / "genai_config.json").write_text(genai_config(bundle), "utf-8")


@dataclass
class _Fusion:
    """One fusion in progress.

    Attributes:
        data: the file of large weights, written front to back.
        head: precision of the LM head.
        fixed: the path of every token, or None where the scorer decides.
        default: budget of the scorer.
    """

    bundle: Bundle
    data: BinaryIO
    head: Action
    fixed: tuple[Action, ...] | None
    default: float
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def build(self) -> onnx.ModelProto:
        manifest = self.bundle.manifest
        facts = manifest.model
        self._positions(manifest)
        self._inline(EMBED_PATH, "embed", {"input_ids": "input_ids", "hidden": "hidden.0"})
        decisions = None if self.fixed else _Decisions(self, manifest)
        if decisions:
            decisions.prices(self.default)
        for layer in range(facts.num_layers):
            if decisions:
                decisions.look(layer)
            self._layer(layer, decisions)
        final = f"hidden.{facts.num_layers}"
        self._inline(head_path(self.head), "head", {"hidden": final, "logits": "logits"})
        inputs = [
            _info("input_ids", TensorProto.INT64, [1, "sequence_length"]),
            _info("attention_mask", TensorProto.INT64, [1, "total_sequence_length"]),
        ]
        outputs = [_info("logits", TensorProto.FLOAT, [1, "sequence_length", facts.vocab_size])]
        for layer in range(facts.num_layers):
            for kind in ("key", "value"):
                cache = [1, facts.num_kv_heads, "past_sequence_length", facts.head_dim]
                inputs.append(_info(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, cache))
                cache = [1, facts.num_kv_heads, "total_sequence_length", facts.head_dim]
                outputs.append(_info(f"present.{layer}.{kind}", TensorProto.FLOAT, cache))
        if decisions:
            inputs.append(_info(BUDGET, TensorProto.FLOAT, [1]))
            outputs.append(_info(PATH, TensorProto.INT64, [facts.num_layers]))
            decisions.report()
        graph = helper.make_graph(self.nodes, "dash", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dash-onnx"
        )

    def node(
        self, kind: str, inputs: Iterable[str], outputs: Sequence[str], **attributes: Any
    ) -> str:
        """Adds a node to the main graph; returns its first output."""
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), **attributes))
        return outputs[0]

    def constant(self, name: str, array: np.ndarray) -> str:
        """Adds an initializer to the main graph."""
        self.initializers.append(self._stored(numpy_helper.from_array(array, name)))
        return name

    def _positions(self, manifest: Manifest) -> None:
        """What every layer reads of the position; names as in the contract of layers."""
        length = manifest.model.max_length
        for index, rope in enumerate(manifest.ropes):
            tables = rotary_tables(rope, length, "float32")
            for name, table in zip(_rotary_names(index), tables, strict=True):
                self.constant(name, table)
        one = self.constant("one", np.array([1], np.int64))
        self.node("ReduceSum", ["attention_mask", one], ["valid"], keepdims=0)
        self.node("Sub", ["valid", one], ["last"])
        self.node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32)
        self.node("Shape", ["attention_mask"], ["mask_length"], start=1, end=2)
        self.node("Squeeze", ["mask_length"], ["total_length"])
        self.node("Cast", ["total_length"], ["total_sequence_length.0"], to=TensorProto.INT32)

    def _layer(self, layer: int, decisions: _Decisions | None) -> None:
        outputs = [f"hidden.{layer + 1}", f"present.{layer}.key", f"present.{layer}.value"]
        actions = [self.fixed[layer]] if self.fixed else []
        if decisions:
            actions = [action for action in decisions.branches if layer or action != SKIP]
        if len(actions) == 1:
            branch = self._branch(layer, actions[0], outputs)
            self.nodes += branch.node
            self.initializers += branch.initializer
        else:
            assert decisions is not None
            self.nodes.append(self._if(layer, actions, outputs, decisions))

    def _if(
        self, layer: int, actions: list[Action], outputs: list[str], decisions: _Decisions
    ) -> onnx.NodeProto:
        """An `If` for the last action, whose other branch chooses among the rest."""
        *rest, tested = actions
        inner = [f"{name}.not_{tested}" for name in outputs]
        if len(rest) == 1:
            otherwise = self._branch(layer, rest[0], inner)
        else:
            node = self._if(layer, rest, inner, decisions)
            otherwise = helper.make_graph([node], f"layer_{layer}_else", [], _outputs(inner))
        chosen = self._branch(layer, tested, [f"{name}.{tested}" for name in outputs])
        condition = decisions.condition(layer, tested)
        return helper.make_node(
            "If", [condition], outputs, then_branch=chosen, else_branch=otherwise
        )

    def _branch(self, layer: int, action: Action, outputs: Sequence[str]) -> onnx.GraphProto:
        model = self._load(layer_path(layer, action))
        if action == SKIP:
            _attend_to_write(model.graph, self.bundle.manifest)
        hidden, key, value = outputs
        cos, sin = _rotary_names(self.bundle.manifest.rope_of(layer))
        names = {
            "hidden_in": f"hidden.{layer}",
            "past_key": f"past_key_values.{layer}.key",
            "past_value": f"past_key_values.{layer}.value",
            "total_sequence_length": "total_sequence_length.0",
            "hidden_out": hidden,
            "present_key": key,
            "present_value": value,
            "seqlens_k": "seqlens_k",
            "cos_cache": cos,
            "sin_cache": sin,
        }
        _rename(model.graph, f"layer.{layer}.{action}.", names)
        graph = helper.make_graph(
            model.graph.node, f"layer_{layer}_{action}", [], _outputs(outputs)
        )
        graph.initializer.extend(model.graph.initializer)
        return graph

    def _inline(self, path: str, prefix: str, names: dict[str, str]) -> None:
        model = self._load(path)
        _rename(model.graph, f"{prefix}.", names)
        self.nodes += model.graph.node
        self.initializers += model.graph.initializer

    def inline_scorer(self, prefix: str, names: dict[str, str]) -> None:
        """Adds the scorer once more; its weights are shared under the names of the first."""
        model = self._load(scorer_facts(self.bundle.manifest).file)
        weights = {tensor.name: f"scorer.{tensor.name}" for tensor in model.graph.initializer}
        known = {tensor.name for tensor in self.initializers}
        _rename(model.graph, f"{prefix}.", {**names, **weights})
        self.nodes += model.graph.node
        new = [tensor for tensor in model.graph.initializer if tensor.name not in known]
        self.initializers += [self._stored(tensor) for tensor in new]

    def _load(self, path: str) -> onnx.ModelProto:
        """A graph of the bundle, its large weights moved to the fused data file."""
        file = self.bundle.verified(path)
        model = onnx.load(file, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            places = {entry.key: entry.value for entry in tensor.external_data}
            with (file.parent / places["location"]).open("rb") as source:
                source.seek(int(places.get("offset", 0)))
                self._append(tensor, source.read(int(places["length"])))
        return model

    def _stored(self, tensor: TensorProto) -> TensorProto:
        if len(tensor.raw_data) >= INLINE_BYTES:
            raw = tensor.raw_data
            tensor.ClearField("raw_data")
            self._append(tensor, raw)
        return tensor

    def _append(self, tensor: TensorProto, raw: bytes) -> None:
        self.data.write(bytes(-self.data.tell() % _ALIGNMENT))
        place = {"location": DATA, "offset": self.data.tell(), "length": len(raw)}
        self.data.write(raw)
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))


class _Decisions:
    """The scorer inside the graph.

    Attributes:
        branches: the actions that have a branch, from dear to cheap. The highest precision has
            none where INT8 stands for it: it would double the file for the dearest budgets.
    """

    def __init__(self, fusion: _Fusion, manifest: Manifest):
        self._fusion, self._manifest = fusion, manifest
        facts = scorer_facts(manifest)
        self._actions = facts.actions
        drop = facts.actions[:2] == ("full", "int8")
        self.branches = list(facts.actions[drop:])
        self._segments = facts.segments(manifest.model.num_layers)
        self._longest = facts.longest(manifest.model.num_layers)

    def prices(self, default: float) -> None:
        """From the budget to the price, as the policy table has it, and to every penalty."""
        f, facts = self._fusion, scorer_facts(self._manifest)
        costs = self._manifest.costs.in_units(self._actions)
        f.initializers.append(numpy_helper.from_array(np.array([default], np.float32), BUDGET))
        budgets = np.array([point.budget for point in facts.points], np.float32)
        logs = np.log(np.array([point.price for point in facts.points], np.float32))
        # Between rows the log price is linear: the sum of what each interval adds.
        width = np.maximum(np.diff(budgets), 1e-6)
        f.node("Sub", [BUDGET, f.constant("budgets", budgets[:-1])], ["above"])
        f.node("Div", ["above", f.constant("widths", width)], ["share"])
        zero = f.constant("zero.f", np.array(0, np.float32))
        unit = f.constant("one.f", np.array(1, np.float32))
        f.node("Clip", ["share", zero, unit], ["passed"])
        f.node("Mul", ["passed", f.constant("steps", np.diff(logs))], ["gained"])
        f.node("ReduceSum", ["gained"], ["climb"], keepdims=1)
        f.node("Add", ["climb", f.constant("lowest", logs[:1])], ["log_price.flat"])
        f.node("Exp", ["log_price.flat"], ["price"])
        shape = f.constant("pair", np.array([1, 1], np.int64))
        f.node("Reshape", ["log_price.flat", shape], ["log_price"])
        for number, (start, stop) in enumerate(self._segments):
            rows = np.zeros((self._longest, len(self._actions)), np.float32)
            rows[: stop - start] = costs[start:stop]
            if start == 0 and SKIP in self._actions:
                rows[0, self._actions.index(SKIP)] = _NEVER
            name = f.constant(f"costs.{number}", rows.reshape(1, -1))
            f.node("Mul", ["price", name], [f"penalty.{number}"])
        # A prompt of several tokens runs at the best precision that has a branch.
        f.node("Shape", ["input_ids"], ["length"], start=1, end=2)
        f.node("Equal", ["length", "one"], ["decoding"])
        best = self._actions.index(self.branches[0])
        f.constant("best", np.array([best], np.int64))
        for action in self.branches[1:]:
            f.constant(f"index.{action}", np.array([self._actions.index(action)], np.int64))
        f.constant("table", np.array([-1, len(self._actions)], np.int64))
        f.constant("flat", np.array([1, self._manifest.model.hidden_size], np.int64))
        f.constant("none", np.array([0], np.int64))
        f.constant("last_row", np.array([-1], np.int64))

    def look(self, layer: int) -> None:
        """Decides for the segment that begins after a layer, from that layer's input."""
        starts = [start for start, _ in self._segments]
        if layer == 0:
            self._decide(0, "hidden.0")
        if layer + 1 in starts:
            self._decide(starts.index(layer + 1), f"hidden.{layer}")

    def _decide(self, number: int, hidden: str) -> None:
        f, count = self._fusion, len(self._actions)
        start, stop = self._segments[number]
        f.node("Gather", [hidden, "last_row"], [f"seen.{number}.row"], axis=1)
        f.node("Reshape", [f"seen.{number}.row", "flat"], [f"seen.{number}"])
        segment = f.constant(f"segment.{number}", np.array([number], np.int64))
        row = "none"
        if number:
            base = f.constant(f"base.{number}", np.array([number * (count + 1)], np.int64))
            row = f.node("Add", [base, f"decided.{start - 1}"], [f"row.{number}"])
        f.inline_scorer(
            f"look.{number}",
            {
                "hidden": f"seen.{number}",
                "segment": segment,
                "row": row,
                "log_price": "log_price",
                "penalty": f"penalty.{number}",
                "total": f"total.{number}",
            },
        )
        f.node("Reshape", [f"total.{number}", "table"], [f"totals.{number}"])
        f.node("ArgMin", [f"totals.{number}"], [f"argmin.{number}"], axis=1, keepdims=0)
        f.node("Where", ["decoding", f"argmin.{number}", "best"], [f"decided_all.{number}"])
        names = [f"decided.{layer}" for layer in range(start, stop)]
        names += [f"unused.{number}.{at}" for at in range(self._longest - (stop - start))]
        f.node("Split", [f"decided_all.{number}"], names, num_outputs=self._longest)
        for action in self.branches[1:]:
            f.node("Equal", [f"decided_all.{number}", f"index.{action}"], [f"is_{action}.{number}"])
            flags = [name.replace("decided.", f"is_{action}.layer.") for name in names]
            flags = [name.replace("unused.", f"unused_{action}.") for name in flags]
            f.node("Split", [f"is_{action}.{number}"], flags, num_outputs=self._longest)

    def condition(self, layer: int, action: Action) -> str:
        """Name of the flag that a layer takes an action."""
        return f"is_{action}.layer.{layer}"

    def report(self) -> None:
        """The decisions as an output."""
        layers = range(self._manifest.model.num_layers)
        self._fusion.node("Concat", [f"decided.{layer}" for layer in layers], [PATH], axis=0)


_STATE = ("past_key", "past_value", "seqlens_k", "total_sequence_length")


def _attend_to_write(graph: onnx.GraphProto, manifest: Manifest) -> None:
    """Lets GroupQueryAttention write the K/V of a skip graph, as it does in the other graphs.

    Its output, the attention of the keys to themselves, is not used.
    """
    made = {name: node for node in graph.node for name in node.output}

    def written(present: str) -> str:
        """What a buffer receives before it is rotated and put into the order of heads."""
        name = made[present].input[1]
        for kind in ("Transpose", "Reshape", "RotaryEmbedding"):
            if (node := made[name]).op_type == kind:
                name = str(node.input[0])
        return name

    key, value = written("present_key"), written("present_value")
    rotates = any(node.op_type == "RotaryEmbedding" for node in graph.node)
    needed = [key, value, "hidden_out"]
    for name in needed:  # grows
        needed += [other for other in made[name].input if other in made and other not in needed]
    kept = [node for node in graph.node if any(name in needed for name in node.output)]
    heads = manifest.model.num_kv_heads
    tables = ["cos_cache", "sin_cache"] if rotates else []
    kept.append(
        helper.make_node(
            "GroupQueryAttention",
            [key, key, value, *_STATE, *tables],
            ["unused", "present_key", "present_value"],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=heads,
            do_rotary=int(rotates),
        )
    )
    del graph.node[:]
    graph.node.extend(kept)


def _rotary_names(rope: int) -> tuple[str, str]:
    """Names of the tables of a rotary embedding; the first as in the contract of layers."""
    suffix = f".{rope}" if rope else ""
    return f"cos_cache{suffix}", f"sin_cache{suffix}"


def _rename(graph: onnx.GraphProto, prefix: str, names: dict[str, str]) -> None:
    """Renames every value: by `names`, the others with a prefix."""

    def renamed(name: str) -> str:
        return name and names.get(name, prefix + name)

    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        node.name = prefix + node.name if node.name else ""
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)


def _info(name: str, kind: int, shape: list) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _outputs(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]


def genai_config(bundle: Bundle) -> str:
    """The configuration that ONNX Runtime GenAI reads beside the graph."""
    facts = bundle.manifest.model
    stored = json.loads(bundle.verified("generation_config.json").read_text("utf-8"))
    eos = stored.get("eos_token_id")
    decoder = {
        "session_options": {"log_id": "dash-onnx", "provider_options": []},
        "filename": MODEL,
        "head_size": facts.head_dim,
        "hidden_size": facts.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": facts.num_heads,
        "num_hidden_layers": facts.num_layers,
        "num_key_value_heads": facts.num_kv_heads,
    }
    model = {
        "type": "llama",
        "bos_token_id": stored.get("bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": stored.get("pad_token_id", eos[0] if isinstance(eos, list) else eos),
        "context_length": facts.max_length,
        "vocab_size": facts.vocab_size,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "max_length": facts.max_length,
        "min_length": 0,
        "num_beams": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    return json.dumps({"model": model, "search": search}, indent=2) + "\n"
