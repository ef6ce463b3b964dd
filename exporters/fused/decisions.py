"""The scorer inside the graph: from the budget to a flag per layer and action."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from dash_onnx.actions import SKIP, Action
from dash_onnx.budget import scorer_facts
from dash_onnx.contract import scorer_ports
from dash_onnx.exporters.fused.names import BUDGET, PATH
from dash_onnx.manifest import Manifest
from dash_onnx.runtime.ort import create_session

if TYPE_CHECKING:
    from dash_onnx.exporters.fused.facts import FusedFacts
    from dash_onnx.exporters.fused.fusion import Fusion

_NEVER = 1e30  # cost of an action that must not be chosen


class Decisions:
    """The scorer inside the graph.

    Attributes:
        branches: the actions that have a branch: those that are decided between, and the one of
            prompts. The one that the default budget takes most often is the last, whose branch
            lies in the outermost `If`: each further one costs 7 microseconds.
    """

    def __init__(self, fusion: Fusion, manifest: Manifest, facts: FusedFacts):
        self._fusion, self._manifest = fusion, manifest
        scorer = scorer_facts(manifest)
        self._actions = scorer.actions
        assert facts.prompt is not None and facts.budgets is not None
        self._prompt, self._dearest = facts.prompt, facts.runs[0]
        default = facts.budgets.default
        shares = min(scorer.points, key=lambda row: abs(row.budget - default)).shares
        known = [a for a in scorer.actions if a in facts.runs or a == facts.prompt]
        self.branches = sorted(known, key=lambda action: shares.get(action, 0.0))
        self._segments = scorer.segments(manifest.model.num_layers)
        self._longest = scorer.longest(manifest.model.num_layers)

    def prices(self) -> None:
        """From the budget to the price, as the policy table has it, and to every penalty."""
        f, facts = self._fusion, scorer_facts(self._manifest)
        costs = self._manifest.costs.in_units(self._actions)
        budgets = np.array([point.budget for point in facts.points], np.float32)
        logs = np.log(np.array([point.price for point in facts.points], np.float32))
        # Between rows the log price is linear: the sum of what each interval adds.
        width = np.maximum(np.diff(budgets), 1e-6)
        f.node("Sub", [BUDGET, f.constant("budgets", budgets[:-1])], ["above"])
        f.node("Div", ["above", f.constant("widths", width)], ["share"])
        zero = f.constant("zero.f", np.array(0, np.float32))
        unit = f.constant("one.f", np.array(1, np.float32))
        f.node("Clip", ["share", zero, unit], ["passed"])
        f.node("MatMul", ["passed", f.constant("steps", np.diff(logs)[:, None])], ["climb"])
        f.node("Add", ["climb", f.constant("lowest", logs[:1])], ["log_price.flat"])
        f.node("Exp", ["log_price.flat"], ["price"])
        shape = f.constant("pair", np.array([1, 1], np.int64))
        f.node("Reshape", ["log_price.flat", shape], ["log_price"])
        for number, (start, stop) in enumerate(self._segments):
            rows = np.zeros((self._longest, len(self._actions)), np.float32)
            rows[: stop - start] = costs[start:stop]
            rows[:, : self._actions.index(self._dearest)] = _NEVER
            if start == 0 and SKIP in self._actions:
                rows[0, self._actions.index(SKIP)] = _NEVER
            name = f.constant(f"costs.{number}", rows.reshape(1, -1))
            f.node("Mul", ["price", name], [f"penalty.{number}"])
        # Several tokens are a prompt, which runs at one precision.
        f.node("Shape", ["input_ids"], ["length"], start=1, end=2)
        f.node("Equal", ["length", "one"], ["decoding"])
        f.constant("prompt", np.array([self._actions.index(self._prompt)], np.int64))
        for action in self.branches[1:]:
            f.constant(f"index.{action}", np.array([self._actions.index(action)], np.int64))
        for at in range(self._longest):
            f.constant(f"at.{at}", np.array([at], np.int64))
        f.constant("table", np.array([-1, len(self._actions)], np.int64))
        f.constant("flat", np.array([1, self._manifest.model.hidden_size], np.int64))
        f.constant("last_row", np.array([-1], np.int64))

    def look(self, layer: int) -> None:
        """Decides for the segment that begins after a layer, from that layer's input."""
        starts = [start for start, _ in self._segments]
        if layer == 0:
            values = self._fusion.constant("values.0", self._first_values())
            self._fusion.node("Add", [values, "penalty.0"], ["total.0"])
            self._decide(0)
        if layer + 1 in starts:
            self._look(starts.index(layer + 1), f"hidden.{layer}")
            self._decide(starts.index(layer + 1))

    def _first_values(self) -> np.ndarray:
        """The predicted KL of every action of the first segment, `[1, longest * A]`.

        The same for every token, so that no graph needs to compute it.
        """
        facts = scorer_facts(self._manifest)
        session = create_session(self._fusion.bundle.verified(facts.file), "cpu")
        ports = scorer_ports(self._manifest.dims, len(self._actions), self._longest)
        nothing = {
            port.name: np.zeros([int(n) for n in port.shape], port.dtype) for port in ports.inputs
        }
        values: np.ndarray = session.run(["total"], nothing)[0]
        return values

    def _look(self, number: int, hidden: str) -> None:
        f, count = self._fusion, len(self._actions)
        before, after = self._segments[number - 1]
        f.node("Gather", [hidden, "last_row"], [f"seen.{number}.row"], axis=1)
        f.node("Reshape", [f"seen.{number}.row", "flat"], [f"seen.{number}"])
        segment = f.constant(f"segment.{number}", np.array([number], np.int64))
        last = f"at.{after - before - 1}"
        f.node("Gather", [f"decided.{number - 1}", last], [f"previous.{number}"])
        base = f.constant(f"base.{number}", np.array([number * (count + 1)], np.int64))
        row = f.node("Add", [base, f"previous.{number}"], [f"row.{number}"])
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

    def _decide(self, number: int) -> None:
        f = self._fusion
        start, stop = self._segments[number]
        f.node("Reshape", [f"total.{number}", "table"], [f"totals.{number}"])
        f.node("ArgMin", [f"totals.{number}"], [f"argmin.{number}"], axis=1, keepdims=0)
        f.node("Where", ["decoding", f"argmin.{number}", "prompt"], [f"decided.{number}"])
        commonest = self.branches[-1]
        f.node("Equal", [f"decided.{number}", f"index.{commonest}"], [f"is_{commonest}.{number}"])
        flags = [_flag(layer, commonest) for layer in range(start, stop)]
        flags += [f"{flags[0]}.unused.{at}" for at in range(self._longest - (stop - start))]
        f.node("Split", [f"is_{commonest}.{number}"], flags, num_outputs=self._longest)

    def condition(self, layer: int, action: Action) -> tuple[list[onnx.NodeProto], str]:
        """The flag that a layer takes an action, and the nodes that it needs where it is read.

        That of the commonest action needs none: every token reads it, of every layer.
        """
        flag = _flag(layer, action)
        if action == self.branches[-1]:
            return [], flag
        number = max(n for n, (start, _) in enumerate(self._segments) if start <= layer)
        at = layer - self._segments[number][0]
        nodes = [
            helper.make_node("Gather", [f"decided.{number}", f"at.{at}"], [f"{flag}.decided"]),
            helper.make_node("Equal", [f"{flag}.decided", f"index.{action}"], [flag]),
        ]
        return nodes, flag

    def report(self) -> None:
        """The decisions as an output, without what fills up the shorter segments."""
        numbers = range(len(self._segments))
        self._fusion.node("Concat", [f"decided.{number}" for number in numbers], ["all"], axis=0)
        places = [
            number * self._longest + at
            for number, (start, stop) in enumerate(self._segments)
            for at in range(stop - start)
        ]
        self._fusion.constant("places", np.array(places, np.int64))
        self._fusion.node("Gather", ["all", "places"], [PATH])


def _flag(layer: int, action: Action) -> str:
    return f"is_{action}.layer.{layer}"
