"""What all graphs share: declared ports, stored weights, linear layers, norms."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import GraphBuilder, OpBuilder

from dash_onnx.core.actions import WIDE, Form
from dash_onnx.core.block import Block
from dash_onnx.core.contract import Port, Ports, data_name
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures.base import Linear, Norm
from dash_onnx.exporters.graphs.wide import wide_product
from dash_onnx.exporters.quantize.blockwise import (
    Bits,
    Quantized,
    concatenate,
    packed,
    quantize,
    row_groups,
)
from dash_onnx.exporters.quantize.gptq import gptq

OPSET = 24
"""First opset with TensorScatter, which writes a skipped token's K/V in place."""

IR_VERSION = 11
"""Lowest version that allows the opset's types; clients refuse versions newer than they know."""

INLINE_BYTES = 1024  # smaller tensors stay inside the .onnx file
FOLDED = 1 << 27  # weights
INT2_BLOCK = 64
OFFSETS = ".offsets"
"""Suffix of the second product of a weight that has offsets."""

BITS: dict[Form, Bits] = {"int8": 8, "int4": 4, "int2": 2}
_ATTENTION = "qkv_proj", "in_proj", "o_proj"


@dataclass
class Graph:
    """A graph under construction.

    Attributes:
        ports: the declared inputs and outputs.
        target: what it is built for.
        block: what the model's layers compute.
        hessians: per linear layer, `[K, K]` sum of x x^T of its calibration inputs.
        fp32_kept: names of weights stored as FP32 because FP16 cannot hold them.
        folded: most weights in a full-precision product: above 1 GB of FP32, ORT 1.32 repeats the
            cast at every run.
    """

    name: str
    ports: Ports
    target: Target
    block: Block
    hessians: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fp32_kept: list[str] = field(default_factory=list)
    folded: int = FOLDED

    def __post_init__(self) -> None:
        opsets = {"": OPSET, "com.microsoft": 1}
        self.builder = GraphBuilder(
            ir.Graph([], [], nodes=[], opset_imports=opsets, name=self.name)
        )
        self.op = self.builder.op
        self.ms = self.builder.opset("com.microsoft")
        self.inputs = {
            port.name: self.builder.input(port.name, _dtype(port), list(port.shape))
            for port in self.ports.inputs
        }

    @property
    def dtype(self) -> ir.DataType:
        """Element type of activations."""
        return ir.DataType.FLOAT if self.target.dtype == "float32" else ir.DataType.FLOAT16

    def value(self, name: str) -> ir.Value:
        """A named output for an operator with several (graph outputs keep their port's name)."""
        return ir.Value(name=name)

    def tensor(self, name: str, array: np.ndarray) -> ir.Value:
        """A weight, stored unchanged."""
        return self.builder.initializer(ir.tensor(np.ascontiguousarray(array), name=name))

    def activation_tensor(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A small weight in the dtype of the activations (norms, biases, scales)."""
        if self.target.dtype == "float32":
            return self.tensor(name, tensor.float().numpy())
        if not fits_half(tensor):
            raise self._beyond_half(name)
        return self.tensor(name, tensor.half().numpy())

    def _beyond_half(self, name: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name}: {name} has values beyond FP16's range, which device cuda "
            "computes in; export with --device cpu"
        )

    def linear(
        self, x: ir.Value, linear: Linear, form: Form, block_size: int | None = None
    ) -> ir.Value:
        """X `[batch, seq, K]` -> `[batch, seq, N]` in a form; None: the target's block size."""
        precision = weight_precision(form, linear.name, self.target.ternary)
        if precision == WIDE:
            y = self.op.Mul(*wide_product(self, x, linear))
        elif precision == "full":
            products = [self.op.MatMul(x, weight) for weight in self._full_weights(linear)]
            y = products[0] if len(products) == 1 else self.op.Concat(*products, axis=-1)
        else:
            y = self.matmul_nbits(
                x, linear.name, self._quantized(linear, BITS[precision], block_size)
            )
        if linear.bias is not None:
            y = self.op.Add(y, self.activation_tensor(f"{linear.name}.bias", linear.bias))
        return y

    def _quantized(self, linear: Linear, bits: Bits, block_size: int | None) -> Quantized:
        """The source's own integers if it has them, else GPTQ with a Hessian, else rounding."""
        block = block_size or block_size_of(bits, self.target.block_size, linear.in_features)
        if stored := linear.stored(bits, block):
            return stored
        hessian = self.hessians.get(linear.name)
        if bits < 8 and hessian is not None:
            return gptq(linear.weight, hessian, block, bits)
        return quantize(linear.weight, bits, block)

    def split(self, x: ir.Value, sizes: Sequence[int], name: str) -> Sequence[ir.Value]:
        """Splits X along its last axis."""
        if len(sizes) == 1:
            return [x]
        outputs = [self.value(f"{name}.{number}") for number in range(len(sizes))]
        parts: Sequence[ir.Value] = self.op.Split(x, self.int64(*sizes), axis=-1, _outputs=outputs)
        return parts

    def matmul_nbits(self, x: ir.Value, name: str, weight: Quantized) -> ir.Value:
        """Product with a quantized weight.

        MatMulNBits has a fast kernel only for integer zero points. Block offsets multiply the sums
        of x over blocks, which additional rows of the same product compute: ones in their block,
        zero elsewhere.
        """
        if weight.offsets is None:
            return self._product(x, name, weight)
        (rows, blocks), size = weight.offsets.shape, weight.block_size
        sums = -(-blocks // size) * size  # kernels are slow for unaligned sizes
        ones = np.kron(np.eye(sums, blocks, dtype=np.float32), np.ones(size, np.float32))
        summing = packed(torch.from_numpy(ones + 8), torch.ones(sums, blocks), None, 4, size)
        product = self._product(
            x, name, concatenate([replace(weight, offsets=None), summing], rows + sums)
        )
        y, x_sums = self.split(product, [rows, sums], f"{name}.parts")
        # INT8 is precise enough: an offset is about as large as the quantization step.
        padded = np.pad(weight.offsets, [(0, 0), (0, sums - blocks)])
        offsets = quantize(torch.from_numpy(padded), 8, size)
        return self.op.Add(y, self._product(x_sums, f"{name}{OFFSETS}", offsets))

    def _product(self, x: ir.Value, name: str, weight: Quantized) -> ir.Value:
        scales = torch.from_numpy(weight.scales)
        inputs = [
            x,
            self.tensor(f"{name}.values", weight.values),
            self.activation_tensor(f"{name}.scales", scales),
        ]
        if weight.zero_points is not None:
            inputs.append(self.tensor(f"{name}.zero_points", weight.zero_points))
        return self.ms.MatMulNBits(
            *inputs,
            N=weight.shape[0],
            K=weight.shape[1],
            bits=weight.bits,
            block_size=weight.block_size,
            accuracy_level=self.target.accuracy_level,
        )

    def _full_weights(self, linear: Linear) -> list[ir.Value]:
        """The weight `[K, N]`, split along N into parts small enough for ORT to fold the cast."""
        name, rows, columns = f"{linear.name}.weight", *linear.weight.shape
        most = rows if self.target.dtype == "float16" else max(self.folded // columns, 1)
        parts = linear.weight.split(most)
        names = [name, *(f"{name}.{number}" for number in range(1, len(parts)))]
        return [self._full_weight(*part) for part in zip(names, parts, strict=True)]

    def _full_weight(self, name: str, weight: torch.Tensor) -> ir.Value:
        array = self.stored_half(name, weight).T  # [K, N], as MatMul wants it
        if self.target.dtype == "float16" or array.dtype == np.float32:
            return self.tensor(name, array)
        # ORT folds the cast at load: x86 CPUs have no FP16 MatMul kernel.
        return self.op.Cast(self.tensor(name, array), to=ir.DataType.FLOAT)

    def stored_half(self, name: str, weight: torch.Tensor) -> np.ndarray:
        """A weight as FP16; or as FP32, recorded in `fp32_kept`, if FP16 cannot hold it.

        Raises:
            UnsupportedError: FP16 cannot hold it, and the device computes in FP16.
        """
        if all(fits_half(rows) for rows in row_groups(weight)):
            return weight.half().numpy()
        if self.target.dtype == "float16":
            raise self._beyond_half(name)
        self.fp32_kept.append(name)
        return weight.float().numpy()

    def norm(
        self, x: ir.Value, name: str, norm: Norm | None, epsilon: float | None = None
    ) -> ir.Value:
        """Norm over the last axis, by default with the block's epsilon; x if there is no norm."""
        if norm is None:
            return x
        rms = self.block.norm == "rms"
        kernel = self.op.RMSNormalization if rms else self.op.LayerNormalization
        weights, outputs = self._norm_weights(name, norm), [self.value(f"{name}.out")]
        epsilon = self.block.norm_epsilon if epsilon is None else epsilon
        return kernel(x, *weights, axis=-1, epsilon=epsilon, _outputs=outputs)

    def norm_heads(self, x: ir.Value, name: str, norm: Norm | None, width: int) -> ir.Value:
        """Norm of queries or keys `[batch, seq, width]`: per head, or over all heads together."""
        size = width if norm is None else norm.weight.shape[0]
        if size == width:
            return self.norm(x, name, norm)
        heads = self.norm(self.op.Reshape(x, self.int64(0, 0, -1, size)), name, norm)
        return self.op.Reshape(heads, self.int64(0, 0, width))

    def add_norm(
        self, x: ir.Value, residual: ir.Value, name: str, norm: Norm | None
    ) -> tuple[ir.Value, ir.Value]:
        """Returns `norm(x + residual)` and `x + residual`, from one kernel."""
        if norm is None:
            total = self.op.Add(x, residual, _outputs=[self.value(f"{name}.sum")])
            return total, total
        rms = self.block.norm == "rms"
        kernel = self.ms.SkipSimplifiedLayerNormalization if rms else self.ms.SkipLayerNormalization
        weights = self._norm_weights(name, norm)
        outputs = [self.value(output) for output in (f"{name}.out", "", "", f"{name}.sum")]
        kernel(x, residual, *weights, epsilon=self.block.norm_epsilon, _outputs=outputs)
        return outputs[0], outputs[3]

    def _norm_weights(self, name: str, norm: Norm) -> list[ir.Value]:
        weights = [self.activation_tensor(name, norm.weight)]
        if norm.bias is not None:
            weights.append(self.activation_tensor(f"{name}.bias", norm.bias))
        return weights

    def either(
        self,
        condition: ir.Value,
        then: Callable[[], Sequence[ir.Value]],
        otherwise: Callable[[], Sequence[ir.Value]],
        names: Sequence[str],
    ) -> Any:
        """An `If` whose branches hold the nodes that two functions add; returns its values.

        Args:
            condition: a bool scalar.
            then: makes the values if the condition holds.
            otherwise: makes values of the same types if it does not.
            names: names of the results.
        """

        def branch(build: Callable[[], Sequence[ir.Value]], name: str) -> ir.Graph:
            def trace(op: OpBuilder) -> Sequence[ir.Value]:
                outside = self.builder, self.op, self.ms
                self.builder, self.op, self.ms = (
                    op.builder,
                    op,
                    op.builder.opset("com.microsoft"),
                )
                try:
                    return build()
                finally:
                    self.builder, self.op, self.ms = outside

            kind = ir.TensorType(self.dtype)
            outputs = [ir.Value(name=value, type=kind) for value in names]
            return self.builder.subgraph(trace, [], outputs, name=name)

        return self.op.If(
            condition,
            then_branch=branch(then, f"{names[0]}.then"),
            else_branch=branch(otherwise, f"{names[0]}.else"),
            _outputs=[self.value(name) for name in names],
        )

    def int64(self, *values: int) -> ir.Value:
        """A constant int64 vector."""
        return self.op.Constant(value_ints=list(values))

    def save(self, folder: Path, path: str, **outputs: ir.Value) -> list[str]:
        """Adds the declared outputs, writes graph and weights, and checks them with onnx.

        Unused inputs are removed.

        Returns:
            `fp32_kept`.
        """
        for node in self.builder.graph.all_nodes():
            # The builder adds a prefix to names, and restarts numbering in each branch.
            branch = "" if node.graph is self.builder.graph else f"{node.graph.name}."
            for value in node.outputs:
                value.name = branch + (value.name or "").removeprefix("v_")
        for port in self.ports.outputs:
            value = outputs.pop(port.name)
            value.dtype, value.shape = _dtype(port), ir.Shape(port.shape)
            self.builder.add_output(value, port.name)
        if outputs:
            raise ValueError(f"{self.name} declares no output {', '.join(outputs)}")
        declared = self.builder.graph.inputs
        declared[:] = [value for value in declared if value.uses()]
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        model = ir.Model(self.builder.graph, ir_version=IR_VERSION, producer_name="dash-onnx")
        try:
            ir.save(
                model,
                target,
                external_data=Path(data_name(path)).name,
                size_threshold_bytes=INLINE_BYTES,
            )
        except OSError as error:
            if error.errno is None:  # NumPy says only how much it has written
                told = os.strerror(errno.ENOSPC)
                raise OSError(errno.ENOSPC, told, str(target)) from error
            raise
        onnx.checker.check_model(target)
        return self.fp32_kept


def weight_precision(form: Form, name: str, ternary: bool) -> Form:
    """Form of a linear layer's weight: INT2 layers keep INT4 attention (decision 0106).

    Layers of ternary models do not need that.
    """
    return "int4" if form == "int2" and name in _ATTENTION and not ternary else form


def block_size_of(bits: Bits, block_size: int, columns: int) -> int:
    """Weights that share a scale: ONNX Runtime's 2-bit kernel is fast from 64 on."""
    larger = bits == 2 and columns % INT2_BLOCK == 0
    return max(block_size, INT2_BLOCK) if larger else block_size


def fits_half(tensor: torch.Tensor) -> bool:
    """Whether every value stays finite in FP16."""
    # In BF16 the limit would be rounded up to a value beyond it.
    return not tensor.numel() or float(tensor.abs().max()) <= torch.finfo(torch.float16).max


def _dtype(port: Port) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(port.dtype))
