"""The scorer inside the graph: from the budget to a flag per layer and action."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.core.budget import fixed_at, multiplier_of, scorer_facts, used_actions
from dash_onnx.core.contract import layer_path
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.fused.facts import BUDGET, PATH
from dash_onnx.runtime.devices import open_backend
from dash_onnx.runtime.sessions import Sessions

if TYPE_CHECKING:
    from dash_onnx.exporters.fused.facts import FusedFacts
    from dash_onnx.exporters.fused.fusion import Fusion

_NEVER = 1e30  # cost of an action that must not be chosen
_STEP = 1e-6  # least distance of two budgets
_TOGETHER = 5  # most layers tested together for the most common action
_SMALL = 8 << 20  # bytes of a layer; larger ones hide the cost of an `If`, and would fill memory


class Decisions:
    """The scorer inside the graph.

    Attributes:
        branches: the actions that have a branch: those that are decided between, and that of
            prompts. The precision that is most common at the default budget is the last, whose
            branch is in the outermost `If`: each further level costs 7 microseconds.
        groups: layers that are tested together for the most common action.
    """

    def __init__(self, fusion: Fusion, manifest: Manifest, facts: FusedFacts):
        self._fusion, self._manifest = fusion, manifest
        scorer = scorer_facts(manifest)
        self._actions = scorer.actions
        assert facts.prompt is not None and facts.budgets is not None
        self._prompt, self._highest = facts.prompt, facts.runs[0]
        self._default, self._points = facts.budgets.default, scorer.points
        self._budget = np.array([self._default], np.float32)
        shares = min(scorer.points, key=lambda row: abs(row.budget - self._default)).shares
        known = [a for a in scorer.actions if a in facts.runs or a == facts.prompt]
        self.branches = sorted(known, key=lambda a: (a != SKIP, shares.get(a, 0.0)))
        self._layers = manifest.model.num_layers
        self._segments = scorer.segments(self._layers)
        self._costs = self._layer_costs()
        self.groups = self._groups()

    def _groups(self) -> list[range]:
        """Splits the layers into groups; a layer whose input the scorer reads is its own group."""
        layers, common = self._layers, self.branches[-1]
        size = self._manifest.graph_bytes(layer_path(layers - 1, common), common)
        small = self._fusion.client.multiplies_blocks and size <= _SMALL
        groups = []
        for start, stop in self._segments:
            end = stop if stop == layers else stop - 1
            count = -(-(end - start) // (_TOGETHER if small else 1))
            borders = np.linspace(start, end, count + 1, dtype=int).tolist()
            groups += [
                range(*pair) for pair in pairwise([*borders, *([stop] if end < stop else [])])
            ]
        return [group for group in groups if group]

    def begin(self) -> None:
        """What follows from the budget: multiplier, penalties, decisions of the first segment.

        For a decoded token at the default budget they are constants.
        """
        f = self._fusion
        # Several tokens are a prompt, which runs at one precision.
        f.node("Shape", ["input_ids"], ["length"], start=1, end=2)
        f.node("Equal", ["length", "one"], ["decoding"])
        f.node("Equal", [BUDGET, f.constant("usual.budget", self._budget)], ["usual"])
        f.node("And", ["decoding", "usual"], ["known"])
        f.constant("prompt", np.array([self._actions.index(self._prompt)], np.int64))
        for action in self.branches:
            f.constant(f"index.{action}", np.array([self._actions.index(action)], np.int64))
        for layer in range(self._layers):
            f.constant(f"at.{layer}", np.array([layer], np.int64))
        f.constant("last_row", np.array(-1, np.int64))
        values, (multiplier, _) = self._first_values(), multiplier_of(self._default, self._points)
        penalty = np.float32(multiplier) * self._costs
        penalty += self._barred(self._default)
        decided = (values + penalty).argmin(1)
        common = decided == self._actions.index(self.branches[-1])
        known = {
            "penalty": penalty,
            "decided.0": decided,
            **{
                self.flag(group): common[group.start : group.stop].all()[None]
                for group in self._of(0)
            },
        }
        nodes = f.apart(lambda: self._ask(values))
        for node in nodes:
            for side in (node.input, node.output):
                side[:] = [f"{name}.asked" if name in known else name for name in side]
        asked = helper.make_graph(
            nodes, "asked", [], [_value(n, a, "asked") for n, a in known.items()]
        )
        usual = helper.make_graph(
            [],
            "usual",
            [],
            [_value(name, array, "usual") for name, array in known.items()],
            [numpy_helper.from_array(array, f"{name}.usual") for name, array in known.items()],
        )
        f.node("If", ["known"], list(known), then_branch=usual, else_branch=asked)

    def _ask(self, values: np.ndarray) -> None:
        """From any budget to its multiplier by the policy table, and on to the decisions."""
        f = self._fusion
        self._multiplier()
        f.node("Add", [f.constant("values.0", values), "penalty"], ["total.0"])
        f.node("ArgMin", ["total.0"], ["action.0"], axis=1, keepdims=0)
        self._decide(0)

    def _multiplier(self) -> None:
        f, points = self._fusion, scorer_facts(self._manifest).points
        knots = [(points[0].budget, math.log(points[0].multiplier))]
        for a, b in pairwise(points):
            if a.head != b.head:  # see `multiplier_of`
                middle = (a.budget + b.budget) / 2
                knots += [
                    (middle, math.log(a.multiplier)),
                    (middle + _STEP, math.log(b.multiplier)),
                ]
            knots.append((b.budget, math.log(b.multiplier)))
        budgets, logs = np.array(knots, np.float32).T
        # The log multiplier is linear between rows: the sum of the contributions of all intervals.
        width = np.maximum(np.diff(budgets), _STEP)
        f.node("Sub", [BUDGET, f.constant("budgets", budgets[:-1])], ["above"])
        f.node("Div", ["above", f.constant("widths", width)], ["share"])
        zero = f.constant("zero.f", np.array(0, np.float32))
        unit = f.constant("one.f", np.array(1, np.float32))
        f.node("Clip", ["share", zero, unit], ["passed"])
        f.node("MatMul", ["passed", f.constant("steps", np.diff(logs)[:, None])], ["climb"])
        f.node("Add", ["climb", f.constant("lowest", logs[:1])], ["log_multiplier"])
        f.node("Exp", ["log_multiplier"], ["multiplier"])
        f.node("Mul", ["multiplier", f.constant("costs", self._costs)], ["weighed"])
        # The actions that are used are constant between two rows.
        budgets = np.array([point.budget for point in points], np.float32)
        middles = [(a.budget + b.budget) / 2 for a, b in pairwise(points)] or [points[0].budget]
        barred = np.stack([self._barred(budget) for budget in middles])
        f.node("Greater", [BUDGET, f.constant("borders", budgets[1:-1])], ["beyond"])
        f.node("Cast", ["beyond"], ["intervals"], to=TensorProto.INT64)
        f.node("ReduceSum", ["intervals"], ["interval"], keepdims=0)
        f.node("Gather", [f.constant("barred", barred), "interval"], ["barred.now"])
        f.node("Add", ["weighed", "barred.now"], ["penalty"])

    def _layer_costs(self) -> np.ndarray:
        """Costs of the actions of every layer `[L, A]`, in units."""
        rows = np.array(self._manifest.costs.in_units(self._actions), np.float32)
        rows[:, : self._actions.index(self._highest)] = _NEVER
        if SKIP in self._actions:
            rows[0, self._actions.index(SKIP)] = _NEVER
        return rows

    def _barred(self, budget: float) -> np.ndarray:
        """Costs `[L, A]` that leave a layer only the actions that it uses at a budget."""
        barred = np.full_like(self._costs, _NEVER)
        usual = used_actions(budget, scorer_facts(self._manifest).points)
        for layer, action in enumerate(fixed_at(budget, self._manifest)):
            for used in usual if action is None else (action,):
                barred[layer, max(map(self._actions.index, (used, self._highest)))] = 0
        return barred

    def decide_after(self, layer: int) -> None:
        """Decides the segment that begins after a layer, from that layer's input."""
        starts = [start for start, _ in self._segments]
        if layer + 1 not in starts:
            return
        f, number = self._fusion, starts.index(layer + 1)
        f.node("Gather", [f"hidden.{layer}", "last_row"], [f"seen.{number}"], axis=1)
        f.inline_scorer(
            f"scorer.{number}",
            {
                "hidden": f"seen.{number}",
                "penalty": "penalty",
                "total": f"total.{number}",
                "action": f"action.{number}",
            },
        )
        self._decide(number)

    def _first_values(self) -> np.ndarray:
        """The predicted KL of every action `[L, A]`, valid for the layers of the first segment.

        They are the same for every token, so the graph does not compute them.
        """
        scorer = Sessions(self._fusion.bundle, open_backend("cpu")).scorer()
        nothing = {
            port.name: np.zeros([int(n) for n in port.shape], port.dtype)
            for port in scorer.ports.inputs
        }
        return scorer.session.run(["total"], nothing)[0]

    def _decide(self, number: int) -> None:
        f = self._fusion
        f.node("Where", ["decoding", f"action.{number}", "prompt"], [f"decided.{number}"])
        f.node("Equal", [f"decided.{number}", f"index.{self.branches[-1]}"], [f"common.{number}"])
        groups = self._of(number)
        members = np.zeros((self._layers, len(groups)), np.float32)
        for column, group in enumerate(groups):
            members[group.start : group.stop, column] = 1
        f.node("Cast", [f"common.{number}"], [f"common.{number}.f"], to=TensorProto.FLOAT)
        members_name = f.constant(f"members.{number}", members)
        f.node("MatMul", [f"common.{number}.f", members_name], [f"counts.{number}"])
        sizes = f.constant(f"sizes.{number}", members.sum(0))
        f.node("Equal", [f"counts.{number}", sizes], [f"together.{number}"])
        flags = [self.flag(group) for group in groups]
        f.node("Split", [f"together.{number}"], flags, num_outputs=len(flags))

    def _of(self, number: int) -> list[range]:
        """The groups of a segment."""
        start, stop = self._segments[number]
        return [group for group in self.groups if start <= group.start < stop]

    def flag(self, group: range) -> str:
        """Name of the flag for whether all layers of a group take the most common action."""
        return f"together.{group.start}.{group.stop}"

    def condition(self, layer: int, action: Action) -> tuple[list[onnx.NodeProto], str]:
        """Nodes that compute, where it is read, whether a layer takes an action, and that flag."""
        flag = f"is_{action}.layer.{layer}"
        number = max(n for n, (start, _) in enumerate(self._segments) if start <= layer)
        nodes = [
            helper.make_node("Gather", [f"decided.{number}", f"at.{layer}"], [f"{flag}.decided"]),
            helper.make_node("Equal", [f"{flag}.decided", f"index.{action}"], [flag]),
        ]
        return nodes, flag

    def report(self) -> None:
        """Outputs the decisions, each taken from the decision point of its segment."""
        numbers = range(len(self._segments))
        self._fusion.node("Concat", [f"decided.{number}" for number in numbers], ["all"], axis=0)
        places = [
            number * self._layers + layer
            for number, (start, stop) in enumerate(self._segments)
            for layer in range(start, stop)
        ]
        self._fusion.constant("places", np.array(places, np.int64))
        self._fusion.node("Gather", ["all", "places"], [PATH])


def _value(name: str, array: np.ndarray, branch: str) -> onnx.ValueInfoProto:
    """An output of a branch."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(f"{name}.{branch}", kind, array.shape)
