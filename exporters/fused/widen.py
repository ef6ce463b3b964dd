"""Products with quantized weights in standard operators, for clients whose MatMulNBits is slow.

Without a kernel of its own MatMulNBits converts every weight for every token. Here the conversion
is a constant part of the graph, which ONNX Runtime computes once, when it loads: the file stays as
small, the memory does not, and sums are FP32 ones.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_KINDS = {4: TensorProto.UINT4, 8: TensorProto.UINT8}


def widen(
    graph: onnx.GraphProto,
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Replaces every MatMulNBits by a MatMul; its weights leave the graph.

    Returns:
        Nodes and initializers that make the weights, for the graph around it.
    """
    nodes: list[onnx.NodeProto] = []
    moved: list[onnx.TensorProto] = []
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for at, node in enumerate(graph.node):
        if node.op_type == "MatMulNBits":
            made, tensors, product = _widened(node, stored)
            nodes += made
            moved += tensors
            graph.node[at].CopyFrom(product)
    names = {tensor.name for tensor in moved}
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return nodes, moved


def _widened(
    node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], onnx.NodeProto]:
    facts = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    rows, columns, bits, size = (facts[name] for name in ("N", "K", "bits", "block_size"))
    blocks = math.ceil(columns / size)
    x, values, scales, *zeros = node.input
    name = node.output[0]
    nodes: list[onnx.NodeProto] = []
    tensors = [stored[values], stored[scales]]

    def then(kind: str, *inputs: str, **attributes: object) -> str:
        output = f"{name}.wide.{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(array: np.ndarray) -> str:
        label = f"{name}.wide.constant.{len(tensors)}"
        tensors.append(numpy_helper.from_array(array, label))
        return label

    def cut(value: str, length: int) -> str:
        ends = [constant(np.array([number], np.int64)) for number in (0, length, 1)]
        return then("Slice", value, *ends)

    # The same bytes: MatMulNBits packs as the types of four bits do.
    _retype(stored[values], _KINDS[bits], rows, blocks, size)
    _retype(stored[scales], stored[scales].data_type, rows, blocks, 1)
    wide = then("Cast", values, to=TensorProto.FLOAT)
    if zeros:
        tensors.append(stored[zeros[0]])
        padded = blocks + blocks % 2 if bits == 4 else blocks  # rows begin at whole bytes
        _retype(stored[zeros[0]], _KINDS[bits], rows, padded, 1)
        zero = then("Cast", zeros[0], to=TensorProto.FLOAT)
        if padded != blocks:
            zero = cut(zero, blocks)
    else:
        zero = constant(np.array(2 ** (bits - 1), np.float32))
    wide = then("Mul", then("Sub", wide, zero), scales)
    wide = then("Reshape", wide, constant(np.array([rows, blocks * size], np.int64)))
    if blocks * size != columns:
        wide = cut(wide, columns)
    wide = then("Transpose", wide, perm=[1, 0])
    return nodes, tensors, helper.make_node("MatMul", [x, wide], [name])


def _retype(tensor: onnx.TensorProto, kind: int, *dims: int) -> None:
    tensor.data_type = kind
    tensor.dims[:] = dims
