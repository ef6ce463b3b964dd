"""Quantized weights mean to ORT what `dequantize` says, and GPTQ earns its time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import LLAMA_BLOCK
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dash_onnx.core.contract import Port, Ports
from dash_onnx.core.facts import Target
from dash_onnx.exporters.gptq import gptq
from dash_onnx.exporters.graphs.build import Graph
from dash_onnx.exporters.quantize import dequantize, pack4, quantize, unpack4
from dash_onnx.runtime.ort import create_session

GENERATOR = torch.Generator().manual_seed(0)


@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(0, 15)
    )
)
def test_packing_is_undone_by_unpacking(values: np.ndarray) -> None:
    np.testing.assert_array_equal(unpack4(pack4(values), values.shape[1]), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("columns", [256, 96])  # 96: the last block of 128 is padded
def test_ort_computes_with_the_dequantized_weight(
    bits: int, block_size: int, columns: int, tmp_path: object
) -> None:
    weight = torch.randn(24, columns, generator=GENERATOR)
    quantized = quantize(weight, bits, block_size)
    ports = Ports(
        (Port("x", "float32", (1, "seq", columns)),), (Port("y", "float32", (1, "seq", 24)),)
    )
    graph = Graph("g", ports, Target("cpu", "float32", block_size, 0), LLAMA_BLOCK)
    graph.save(tmp_path, "g.onnx", y=graph.matmul_nbits(graph.inputs["x"], "w", quantized))
    x = torch.randn(1, 5, columns, generator=GENERATOR)
    session = create_session(tmp_path / "g.onnx", "cpu")  # type: ignore[operator]
    got = session.run(None, {"x": x.numpy()})[0]
    wanted = x @ dequantize(quantized).T
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-4)
    step = quantized.scales.max()
    assert (dequantize(quantized) - weight).abs().max() <= step * (0.51 if bits == 8 else 1.01)


def test_int8_gives_back_weights_that_were_int8_before() -> None:
    levels = torch.randint(-127, 128, (8, 64), generator=GENERATOR).float()
    levels[:, ::32] = 127  # llama.cpp's Q8_0 always uses the largest level
    scales = torch.rand(8, 2, generator=GENERATOR).half().float() + 0.01
    weight = levels * scales.repeat_interleave(32, 1)
    assert torch.equal(dequantize(quantize(weight, 8, 32)), weight)


def test_all_zero_blocks_stay_zero() -> None:
    for bits in (4, 8):
        assert not dequantize(quantize(torch.zeros(4, 64), bits, 32)).any()  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_gptq_loses_less_output_than_rounding(block_size: int) -> None:
    weight = torch.randn(48, 256, generator=GENERATOR)
    # Correlated inputs of unequal size, as a language model has them.
    mix = torch.randn(256, 256, generator=GENERATOR) * torch.logspace(0, -2, 256)
    inputs = torch.randn(2000, 256, generator=GENERATOR) @ mix
    held_out = torch.randn(500, 256, generator=GENERATOR) @ mix

    def loss(quantized: object) -> float:
        return float((held_out @ (dequantize(quantized) - weight).T).square().mean())  # type: ignore[arg-type]

    rounded = loss(quantize(weight, 4, block_size))
    assert loss(gptq(weight, inputs.T @ inputs, block_size)) < 0.6 * rounded


def test_gptq_rounds_a_block_alike_wherever_it_stands() -> None:
    weight = torch.randn(8, 128, generator=GENERATOR)
    inputs = torch.randn(500, 128, generator=GENERATOR) * torch.logspace(0, -2, 128)
    moved = torch.arange(128).view(4, 32)[[2, 0, 3, 1]].flatten()
    straight = dequantize(gptq(weight, inputs.T @ inputs, 32))
    inputs = inputs[:, moved]
    found = dequantize(gptq(weight[:, moved], inputs.T @ inputs, 32))
    torch.testing.assert_close(found, straight[:, moved], rtol=0, atol=1e-4)


def test_gptq_survives_inputs_that_are_never_active() -> None:
    inputs = torch.randn(64, 64, generator=GENERATOR)
    inputs[:, 10:20] = 0
    result = dequantize(gptq(torch.randn(8, 64, generator=GENERATOR), inputs.T @ inputs, 32))
    assert torch.isfinite(result).all()
