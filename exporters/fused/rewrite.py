"""What the graphs of the bundle need to become parts of a larger one."""

from __future__ import annotations

import onnx
from onnx import helper

from dash_onnx.core.manifest import Manifest

_STATE = ("past_key", "past_value", "seqlens_k", "total_sequence_length")


def group_attention(graph: onnx.GraphProto) -> None:
    """Leaves GroupQueryAttention alone where a graph may choose between two attentions.

    The other one is made for a buffer of full length; GroupQueryAttention also grows one. All rows
    of its pass are valid.
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
        if "query_seqlens" in node.input:  # the last one; without it all tokens are valid
            kept = [*node.input[:-1]]
            while not kept[-1]:
                kept.pop()
            node.input[:] = kept


def attend_to_write(graph: onnx.GraphProto, manifest: Manifest) -> None:
    """Lets GroupQueryAttention write the K/V of a skip graph, as it does in the other graphs.

    TensorScatter, which the skip graph has, needs a buffer of full length. Its output, the
    attention of the keys to themselves, is not used.
    """
    made = {name: node for node in graph.node for name in node.output}

    def written(present: str) -> str:
        """What a buffer receives before it is put into the order of heads."""
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
