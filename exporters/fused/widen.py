"""Products with quantized weights as FP32 products, for clients whose MatMulNBits is slow.

Without a dedicated kernel, MatMulNBits dequantizes every weight for every token. A DequantizeLinear
of constants does so only once, when ONNX Runtime loads the graph, if the session has the option
`session.disable_quant_qdq`: the file stays as small, the memory does not. It is a single operator,
since each further one would need the memory of all weights again.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def widen(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Replaces every MatMulNBits by a DequantizeLinear and a product, in the same branch.

    ONNX Runtime does not pack weights that come from the enclosing graph.

    Returns:
        Constants that many products share, for the enclosing graph.
    """
    shared: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulNBits" and _can_widen(node):
            made, constants = _widened(node, stored)
            nodes += made
            shared += constants
        else:
            nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    return shared


def _facts(node: onnx.NodeProto) -> tuple[int, int, int, int, int]:
    """Rows N, columns K, blocks per row, columns per block, bits."""
    facts = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    rows, columns, size, bits = (facts[name] for name in ("N", "K", "block_size", "bits"))
    return rows, columns, math.ceil(columns / size), size, bits


def _can_widen(node: onnx.NodeProto) -> bool:
    """False if rows of 4-bit zero points end within a byte, unsupported by DequantizeLinear."""
    _, _, blocks, _, bits = _facts(node)
    return len(node.input) == 3 or bits == 8 or blocks % 2 == 0


def _widened(
    node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    rows, columns, blocks, size, bits = _facts(node)
    kind = TensorProto.UINT4 if bits == 4 else TensorProto.UINT8
    x, values, scales, *zeros = node.input
    shared: list[onnx.TensorProto] = []
    tensors = [stored[name] for name in (values, scales, *zeros)]
    if not zeros:  # half of the range everywhere
        name = f"wide.zeros.{bits}.{rows}.{blocks}"
        half = bytes([0x88 if bits == 4 else 0x80]) * math.ceil(rows * blocks * bits / 8)
        shared.append(helper.make_tensor(name, kind, (rows, blocks), half, raw=True))
        tensors.append(shared[0])
    # The same bytes: MatMulNBits packs values like the 4-bit types.
    for tensor, width in zip(tensors, (blocks * size, blocks, blocks), strict=True):
        tensor.dims[:] = (rows, width)
        if tensor.data_type == TensorProto.UINT8:
            tensor.data_type = kind
    wide = f"{node.output[0]}.wide"  # [N, K]
    names = [tensor.name for tensor in tensors]
    nodes = [helper.make_node("DequantizeLinear", names, [wide], axis=1, block_size=size)]
    if blocks * size != columns:
        names = [f"wide.{part}.{columns}" for part in ("start", "end", "axis")]
        for name, number in zip(names, (0, columns, 1), strict=True):
            shared.append(numpy_helper.from_array(np.array([number]), name))
        nodes.append(helper.make_node("Slice", [wide, *names], [f"{wide}.cut"]))
        wide = f"{wide}.cut"
    product = [x, wide], [node.output[0]]
    nodes.append(helper.make_node("FusedMatMul", *product, domain="com.microsoft", transB=1))
    return nodes, shared
