"""GGUF's integers reach the graphs without a second rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA_BLOCK
from gguf import GGMLQuantizationType as Type
from gguf import quants

from dash_onnx.core.contract import Port, Ports
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures.base import Linear, stack
from dash_onnx.exporters.graphs.build import Graph
from dash_onnx.exporters.quantize import dequantize, quantize
from dash_onnx.exporters.sources.blocks import unpack
from dash_onnx.runtime.ort import create_session

RNG = np.random.default_rng(0)


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
    ports = Ports((Port("x", "float32", (1, "seq", 512)),), (Port("y", "float32", (1, "seq", 40)),))
    graph = Graph("g", ports, Target("cpu", "float32", 32, level), LLAMA_BLOCK)
    graph.save(tmp_path, "g.onnx", y=graph.linear(graph.inputs["x"], linear, "int4"))
    x = torch.from_numpy(RNG.standard_normal((1, 5, 512)).astype(np.float32))
    got = create_session(tmp_path / "g.onnx", "cpu").run(None, {"x": x.numpy()})[0]
    wanted = (x @ weight.T).numpy()
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    second_rounding = dequantize(quantize(weight, 4, 32)) - weight
    lost = float((x @ second_rounding.T).norm() / np.linalg.norm(wanted))
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
