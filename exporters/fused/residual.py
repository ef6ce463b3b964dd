"""The hidden state between layers as two summands, which the next norm adds in its own kernel.

A layer ends with a sum and the next begins with a norm of it. In one graph one operator does both,
as in the graphs of ONNX Runtime GenAI's model builder.
"""

from __future__ import annotations

import onnx
from onnx import helper


def split_sum(graph: onnx.GraphProto) -> None:
    """Puts `residual_out` and `update_out` in the place of `hidden_out`, which is their sum."""
    made = {name: node for node in graph.node for name in node.output}
    last = made["hidden_out"]
    if last.op_type == "Add" and all(name in made for name in last.input):
        names = dict(zip(last.input, ("residual_out", "update_out"), strict=True))
        graph.node.remove(last)
    else:
        names = {"hidden_out": "residual_out"}
        zeros = helper.make_node("Sub", ["residual_out", "residual_out"], ["update_out"])
        graph.node.append(zeros)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def add_sum(graph: onnx.GraphProto, hidden: str) -> None:
    """Lets a graph read `residual_in` and `update_in`, whose sum is its input `hidden`."""
    inputs, nodes = ["update_in", "residual_in"], list(graph.node)
    adds = helper.make_node("Add", inputs, [hidden])
    for index, node in enumerate(nodes):
        if node.op_type == "RMSNormalization" and node.input[0] == hidden:
            adds = helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [*inputs, node.input[1]],
                [node.output[0], "", "", hidden],
                domain="com.microsoft",
                epsilon={one.name: one.f for one in node.attribute}["epsilon"],
            )
            del nodes[index]
            break
    del graph.node[:]
    graph.node.extend([adds, *nodes])
