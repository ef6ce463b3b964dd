"""Quantized weights mean to ORT what `dequantize` says, GGUF's too, and GPTQ earns its time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import LLAMA_BLOCK
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dash_onnx.core.contract import Port, Ports
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures.base import Linear, stack
from dash_onnx.exporters.graphs.graph import Graph
from dash_onnx.exporters.quantize.blockwise import (
    Bits,
    Quantized,
    dequantize,
    pack_levels,
    quantize,
    unpack_levels,
)
from dash_onnx.exporters.quantize.gptq import gptq
from dash_onnx.exporters.sources.gguf_blocks import unpack
from dash_onnx.runtime.ort import create_session

GENERATOR = torch.Generator().manual_seed(0)
RNG = np.random.default_rng(0)

Build = Callable[[Graph, ir.Value], ir.Value]


def run_product(
    folder: Path, x: torch.Tensor, rows: int, build: Build, *, block: int = 32, level: int = 0
) -> torch.Tensor:
    """What a graph of one product makes of x `[1, seq, K]`, `[1, seq, rows]`."""
    ports = Ports(
        (Port("x", "float32", (1, "seq", x.shape[-1])),), (Port("y", "float32", (1, "seq", rows)),)
    )
    graph = Graph("g", ports, Target("cpu", "float32", block, level), LLAMA_BLOCK, folded=2000)
    graph.save(folder, "g.onnx", y=build(graph, graph.inputs["x"]))
    found = create_session(folder / "g.onnx", "cpu").run(None, {"x": x.numpy()})[0]
    return torch.from_numpy(found)


@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 9))),
    st.sampled_from([2, 4, 8]),
)
def test_packing_is_undone_by_unpacking(values: np.ndarray, bits: Bits) -> None:
    values &= 2**bits - 1
    np.testing.assert_array_equal(
        unpack_levels(pack_levels(values, bits), bits, values.shape[1]), values
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("columns", [256, 96])  # 96: the last block of 128 is padded
def test_ort_computes_with_the_dequantized_weight(
    bits: Bits, block_size: int, columns: int, tmp_path: Path
) -> None:
    weight = torch.randn(24, columns, generator=GENERATOR)
    quantized = quantize(weight, bits, block_size)
    x = torch.randn(1, 5, columns, generator=GENERATOR)
    wanted = x @ dequantize(quantized).T
    for level, atol in ((0, 1e-4), (4, 0.02 * float(wanted.abs().max()))):  # exact, as shipped
        found = run_product(
            tmp_path,
            x,
            24,
            lambda graph, x: graph.matmul_nbits(x, "w", quantized),
            block=block_size,
            level=level,
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol)
    step = quantized.scales.max()
    assert (dequantize(quantized) - weight).abs().max() <= step * (0.51 if bits == 8 else 1.01)


def test_wide_products_in_full_precision_are_cut_and_compute_the_same(tmp_path: Path) -> None:
    weight = torch.randn(100, 64, generator=GENERATOR).half().float()
    x = torch.randn(1, 5, 64, generator=GENERATOR)
    kinds: list[str] = []

    def build(graph: Graph, x: ir.Value) -> ir.Value:
        y = graph.linear(x, Linear("w", weight), "full")
        kinds.extend(node.op_type for node in graph.builder.graph)
        return y

    torch.testing.assert_close(run_product(tmp_path, x, 100, build), x @ weight.T)
    assert kinds.count("MatMul") == 4  # 31 rows of 64 are 2,000 weights at most


def test_int8_gives_back_weights_that_were_int8_before() -> None:
    levels = torch.randint(-127, 128, (8, 64), generator=GENERATOR).float()
    levels[:, ::32] = 127  # llama.cpp's Q8_0 always uses the largest level
    scales = torch.rand(8, 2, generator=GENERATOR).half().float() + 0.01
    weight = levels * scales.repeat_interleave(32, 1)
    assert torch.equal(dequantize(quantize(weight, 8, 32)), weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_all_zero_blocks_stay_zero(bits: Bits) -> None:
    assert not dequantize(quantize(torch.zeros(4, 64), bits, 32)).any()


# GPTQ


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_gptq_loses_less_output_than_rounding(block_size: int, bits: Bits) -> None:
    weight = torch.randn(48, 256, generator=GENERATOR)
    # Correlated inputs of unequal size, as a language model has them.
    mix = torch.randn(256, 256, generator=GENERATOR) * torch.logspace(0, -2, 256)
    inputs = torch.randn(2000, 256, generator=GENERATOR) @ mix
    held_out = torch.randn(500, 256, generator=GENERATOR) @ mix

    def loss(quantized: Quantized) -> float:
        return float((held_out @ (dequantize(quantized) - weight).T).square().mean())

    rounded = loss(quantize(weight, bits, block_size))
    assert loss(gptq(weight, inputs.T @ inputs, block_size, bits)) < 0.6 * rounded


def test_gptq_rounds_a_block_alike_wherever_it_stands() -> None:
    weight = torch.randn(8, 128, generator=GENERATOR)
    inputs = torch.randn(500, 128, generator=GENERATOR) * torch.logspace(0, -2, 128)
    moved = torch.arange(128).view(4, 32)[[2, 0, 3, 1]].flatten()
    straight = dequantize(gptq(weight, inputs.T @ inputs, 32))
    inputs = inputs[:, moved]
    found = dequantize(gptq(weight[:, moved], inputs.T @ inputs, 32))
    torch.testing.assert_close(found, straight[:, moved], rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_rounds_the_weights_of_inputs_that_were_never_active(bits: Bits) -> None:
    """Other text may activate them."""
    weight = torch.randn(8, 64, generator=GENERATOR)
    inputs = torch.randn(64, 64, generator=GENERATOR)
    inputs[:, 10:20] = 0
    result = dequantize(gptq(weight, inputs.T @ inputs, 32, bits))
    assert torch.isfinite(result).all()
    unseen = weight[:, 10:20]
    assert (result[:, 10:20] - unseen).square().mean() < 0.25 * unseen.square().mean()


# GGUF's integers reach the graphs without a second rounding


def file_bytes(kind: Type, rows: int, columns: int) -> np.ndarray:
    """What a GGUF file holds of a random weight."""
    if kind != Type.Q4_K:
        weight = RNG.standard_normal((rows, columns)).astype(np.float32)
        return quants.quantize(weight, kind)
    data = RNG.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    # Bytes 4 to 15 hold a scale and a minimum for each of 8 blocks: alike, so that with a minimum
    # of 7.5 steps the weights lie around zero.
    data[..., 8:12] = data[..., 4:8]
    data[..., 12:16] = (data[..., 12:16] & 15) * 17
    step = RNG.random((rows, columns // 256, 1)).astype(np.float16)
    two = np.concatenate([step, step * np.float16(7.5)], -1)
    data[..., :4] = np.frombuffer(two.tobytes(), np.uint8).reshape(rows, -1, 4)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q8_0])
def test_integers_stand_for_what_gguf_dequantizes(kind: Type) -> None:
    data = file_bytes(kind, 6, 512)
    found = unpack(data, kind)
    assert found is not None
    np.testing.assert_array_equal(dequantize(found).numpy(), quants.dequantize(data, kind))


@pytest.mark.parametrize("kind", [Type.Q6_K, Type.Q5_0, Type.F16])
def test_types_of_more_levels_are_rounded_anew(kind: Type) -> None:
    assert unpack(np.zeros((2, 840), np.uint8), kind) is None


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q4_K])
@pytest.mark.parametrize("level", [0, 4])
def test_the_graph_multiplies_with_the_integers_of_the_file(
    kind: Type, level: int, tmp_path: Path
) -> None:
    data = file_bytes(kind, 40, 512)
    weight = torch.from_numpy(quants.dequantize(data, kind))
    linear = Linear("proj", weight, None, unpack(data, kind))
    x = torch.from_numpy(RNG.standard_normal((1, 5, 512)).astype(np.float32))
    found = run_product(
        tmp_path, x, 40, lambda graph, x: graph.linear(x, linear, "int4"), level=level
    )
    wanted = x @ weight.T
    error = float((found - wanted).norm() / wanted.norm())
    second_rounding = dequantize(quantize(weight, 4, 32)) - weight
    lost = float((x @ second_rounding.T).norm() / wanted.norm())
    # Level 4 rounds the activations to INT8; the offsets are INT8 at any level.
    assert error < (0.012 if level else 0.004)
    assert kind == Type.Q4_0 or lost > 5 * error


def test_stacked_parts_keep_their_integers_only_if_all_have_them() -> None:
    def part(kind: Type, keep: bool = True) -> Linear:
        data = file_bytes(kind, 4, 64)
        weight = torch.from_numpy(quants.dequantize(data, kind))
        return Linear("part", weight, None, unpack(data, kind) if keep else None)

    both = stack("both", part(Type.Q4_1), part(Type.Q4_1))
    stored = both.stored(4, 32)
    assert stored is not None
    np.testing.assert_array_equal(dequantize(stored).numpy(), both.weight.numpy())
    assert both.stored(8, 32) is None and both.stored(4, 64) is None
    assert stack("mixed", part(Type.Q4_1), part(Type.Q4_0)).packed is None
    assert stack("mixed", part(Type.Q4_1), part(Type.Q4_1, keep=False)).packed is None
