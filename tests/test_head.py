"""The LM heads, and the INT4 head's second look at the likeliest tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import BundleError
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.export.check import check
from dash_onnx.exporters.graphs import looks_twice
from dash_onnx.exporters.quantize.blockwise import Quantized, dequantize
from dash_onnx.exporters.sources import open_source
from dash_onnx.exporters.train.dequantized import DequantizedModel
from dash_onnx.runtime.ort import create_session

TOKENS, EXACT = 5, 64


def head_weight(folder: Path, precision: str, bits: int) -> torch.Tensor:
    """The `[V, D]` weight of a head as its file holds it."""
    file = folder / f"head/{precision}.onnx"
    arrays = {
        tensor.name: numpy_helper.to_array(tensor, str(file.parent))
        for tensor in onnx.load(file, load_external_data=False).graph.initializer
    }
    values, scales = arrays["lm_head.values"], arrays["lm_head.scales"]
    block = 8 * values.shape[2] // bits
    shape = (values.shape[0], values.shape[1] * block)
    return dequantize(
        Quantized(values, scales, arrays.get("lm_head.zero_points"), shape, bits, block)
    )


@pytest.fixture(scope="module")
def folder(tiny_with: Callable[..., Path]) -> Path:
    return tiny_with()


@pytest.fixture(scope="module")
def hidden() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(1, TOKENS, 64)).astype(np.float32)


def logits_of(folder: Path, precision: str, hidden: np.ndarray) -> torch.Tensor:
    session = create_session(folder / f"head/{precision}.onnx", "cpu")
    return torch.from_numpy(session.run(["logits"], {"hidden": hidden})[0][0])


def test_the_likeliest_logits_of_the_int4_head_are_those_of_the_int8_head(
    folder: Path, hidden: np.ndarray
) -> None:
    exact, found = (logits_of(folder, name, hidden) for name in ("int8", "int4"))
    model = DequantizedModel(Bundle(folder), ("int8", "int4"), torch.float32)
    normed = model.final(torch.from_numpy(hidden[0]))
    preview = normed @ head_weight(folder, "int4", 4).T
    _, likely = preview.topk(EXACT)
    chosen = torch.zeros_like(preview, dtype=torch.bool).scatter(-1, likely, True)
    torch.testing.assert_close(found[chosen], exact[chosen], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[~chosen], preview[~chosen], rtol=1e-4, atol=1e-4)
    assert (found - exact).abs().max() > 0.01
    assert torch.equal(found.argmax(-1), exact.argmax(-1))
    torch.testing.assert_close(
        model.logits(model.final(torch.from_numpy(hidden[0])), "int4"), found, rtol=1e-4, atol=1e-4
    )


def test_both_heads_share_the_exact_weights(folder: Path, tmp_path: Path) -> None:
    """They lie in one file, which is checked when either head is loaded."""
    sizes = [(folder / f"head/{name}.onnx.data").stat().st_size for name in ("int8", "int4")]
    assert sizes[1] < 0.7 * sizes[0]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = copy / "head/int8.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match=r"int8.onnx.data does not match its SHA-256"):
        dash_onnx.load(copy).generate("the keeper", policy="int4", max_new_tokens=1)


@pytest.mark.parametrize("options", [{"variants": ("int4",)}, {"variants": ("full", "int4")}])
def test_without_an_int8_head_the_int4_head_looks_once(
    options: dict, tiny_with: Callable[..., Path]
) -> None:
    out = tiny_with(**options)
    assert not looks_twice(out / "head/int4.onnx")
    model = dash_onnx.load(out)
    best = options["variants"][0]
    assert model.manifest.heads["skip"] == best
    assert np.isfinite(model.logits(np.arange(8), policy="int4")).all()


def test_mixed_paths_take_the_int4_head_where_it_looks_twice(folder: Path) -> None:
    heads = dash_onnx.load(folder).manifest.heads
    assert heads == {"full": "full", "int8": "int8", "int4": "int4", "skip": "int4"}


# INT2


@pytest.fixture(scope="module")
def two_bits(tiny_with: Callable[..., Path]) -> Path:
    return tiny_with(variants=("int8", "int4", "int2"))


def test_int2_layers_have_blocks_of_64_where_these_fit(two_bits: Path) -> None:
    found = {}
    for node in onnx.load(two_bits / "layers/01/int2.onnx", load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            facts = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            found[node.input[1].partition(".")[0]] = facts["bits"], facts["block_size"]
    assert found.pop("down_proj") == (2, 32)  # its 96 inputs are no multiple of 64
    assert len(found) == 3 and set(found.values()) == {(2, 64)}


def test_int2_has_no_head_of_its_own_and_costs_least_memory(two_bits: Path) -> None:
    manifest = dash_onnx.load(two_bits).manifest
    assert manifest.exported_heads == ("int8", "int4") and manifest.heads["int2"] == "int4"
    for layer in manifest.layers:
        assert layer.bytes["int2"] < layer.bytes["int4"] < layer.bytes["int8"]
        errors = layer.relative_error
        assert errors["int8"] < errors["int4"] < errors["int2"] < 1


def test_a_bundle_of_int2_alone_runs_and_is_checked(
    tiny_folder: Path, tiny_with: Callable[..., Path]
) -> None:
    out = tiny_with(variants=("int2",))
    model = dash_onnx.load(out)
    assert model.manifest.heads == {"int2": "int4", "skip": "int4"}
    assert np.isfinite(model.logits(np.arange(8))).all()
    result = check(open_source(str(tiny_folder), REGISTRY), Bundle(out), "quick")
    assert result.rows[-1].errors.keys() == {"int2"} and not result.failures


def test_training_computes_int2_as_the_runtime_does(two_bits: Path) -> None:
    model = dash_onnx.load(two_bits)
    ids, path = np.arange(40, 60), ("int2",) * 4
    sequence = model.new_sequence()
    wanted = sequence.prefill(ids, path, "int8", every=True)
    layers = DequantizedModel(Bundle(two_bits), ("int8", "int4", "int2"), torch.float32)
    x, rotary = layers.embed(torch.from_numpy(ids)[None]), layers.rotary(len(ids))
    for index in range(4):
        queries, keys_values = layers.qkv(index, "int2", layers.normed(index, x))
        attention = layers.attend(index, queries, keys_values, rotary)
        x = layers.complete(index, "int2", x, attention)
    found = layers.logits(layers.final(x), "int8")[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-3)
