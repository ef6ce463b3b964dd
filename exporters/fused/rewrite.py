"""Rewrites that let the graphs of the bundle become parts of a larger graph."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import TensorProto, helper

from dash_onnx.core.manifest import Manifest

_ROWS = 16
"""Longest pass, in tokens, in which every row may be sampled; a longer one is a prompt."""

_STATE = ("past_key", "past_value", "seqlens_k", "total_sequence_length")


def group_attention(graph: onnx.GraphProto) -> None:
    """Keeps only GroupQueryAttention in a graph that can choose between two implementations.

    The other one needs a buffer of full length; GroupQueryAttention can also grow one. All rows of
    a pass are valid.
    """
    for number, node in enumerate(graph.node):
        if node.op_type == "If" and "present_key" in node.output:
            (branch,) = (a.g for a in node.attribute if a.name == "else_branch")
            names = {o.name: name for o, name in zip(branch.output, node.output, strict=True)}
            for inner in branch.node:
                inner.output[:] = [names.get(name, name) for name in inner.output]
            del graph.node[number]
            for offset, inner in enumerate(branch.node):
                graph.node.insert(number + offset, inner)
            break
    for node in graph.node:
        if "query_seqlens" in node.input:  # the last input; without it all tokens are valid
            kept = [*node.input[:-1]]
            while not kept[-1]:
                kept.pop()
            node.input[:] = kept


def names_read(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """All that nodes read, including the nodes of their subgraphs."""
    names: set[str] = set()
    for node in nodes:
        names.update(node.input)
        for attribute in node.attribute:
            names |= names_read(attribute.g.node)
    return names


def attend_to_write(graph: onnx.GraphProto, manifest: Manifest) -> None:
    """Lets GroupQueryAttention write the K/V of a skip graph, as it does in the other graphs.

    TensorScatter in the skip graph needs a buffer of full length. The output of
    GroupQueryAttention, the attention of the keys to themselves, is not used.
    """
    made = {name: node for node in graph.node for name in node.output}

    def written(present: str) -> str:
        """The value written to a buffer, before it is rearranged by heads."""
        name = made[present].input[1]
        for kind in ("Transpose", "Reshape"):
            if (node := made[name]).op_type == kind:
                name = str(node.input[0])
        return name

    key, value = written("present_key"), written("present_value")
    rotates = made[key].op_type == "RotaryEmbedding"
    if rotates:
        key = str(made[key].input[0])
    needed = [key, value, "hidden_out"]
    for name in needed:  # grows in the loop
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


def rescore_last(graph: onnx.GraphProto) -> None:
    """Lets an LM head that rescores do so only for the last row if a pass is a prompt.

    Clients sample from no other row of a prompt, and rescoring every row takes a large part of the
    time and most of the memory of a long prompt.
    """
    nodes = [*graph.node]
    end = next((at for at, node in enumerate(nodes) if node.op_type == "ScatterElements"), None)
    if end is None:
        return
    preview, result = nodes[end].input[0], nodes[end].output[0]
    start = next(at for at, node in enumerate(nodes) if preview in node.output) + 1
    rescoring = nodes[start : end + 1]
    normed = next(node.input[0] for node in rescoring if node.op_type == "Unsqueeze")

    def copied(names: dict[str, str]) -> list[onnx.NodeProto]:
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in rescoring]
        for node in copies:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        return copies

    def number(name: str, value: int) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value_ints=[value])

    def branch(name: str, inside: list[onnx.NodeProto]) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(inside[-1].output[0], TensorProto.FLOAT, None)
        return helper.make_graph(inside, name, [], [output])

    own = {name: f"{name}.last" for node in rescoring for name in node.output}
    own |= {name: f"{name}.last" for name in (preview, normed)}
    ends = ["rescore.before", "rescore.end", "rescore.axis"]
    last = [
        *map(number, ends, (-1, 2**31 - 1, 1)),
        *(helper.make_node("Slice", [name, *ends], [own[name]]) for name in (preview, normed)),
        *copied(own),
        helper.make_node("Add", ["rescore.count", "rescore.before"], ["rescore.row"]),
        helper.make_node("Shape", [own[result]], ["rescore.shape"]),
        helper.make_node("Expand", ["rescore.row", "rescore.shape"], ["rescore.rows"]),
        helper.make_node(
            "ScatterElements", [preview, "rescore.rows", own[result]], [f"{result}.some"], axis=1
        ),
    ]
    branches = {
        "then_branch": branch("rescore_last", last),
        "else_branch": branch("rescore_all", copied({result: f"{result}.all"})),
    }
    nodes[start : end + 1] = [
        helper.make_node("Shape", [preview], ["rescore.count"], start=1, end=2),
        number("rescore.most", _ROWS),
        helper.make_node("Greater", ["rescore.count", "rescore.most"], ["rescore.many"]),
        helper.make_node("If", ["rescore.many"], [result], **branches),
    ]
    del graph.node[:]
    graph.node.extend(nodes)
