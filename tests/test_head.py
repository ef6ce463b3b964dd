"""The LM heads, and the second look at the likeliest tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_tool import Capture
from conftest import spec_of
from onnx import numpy_helper

import dash_onnx
from dash_onnx.cli.info import main
from dash_onnx.core.actions import Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import head_path
from dash_onnx.core.errors import BundleError, UnsupportedError
from dash_onnx.core.facts import ModelFacts
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.exporters.export.check import check
from dash_onnx.exporters.fused import FuseOptions, fuse
from dash_onnx.exporters.graphs import rescores
from dash_onnx.exporters.graphs.ends import EXACT_TOKENS
from dash_onnx.exporters.quantize.blockwise import Quantized, dequantize
from dash_onnx.exporters.sources import open_source
from dash_onnx.exporters.train.dequantized import DequantizedModel
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.ort import create_session

TOKENS = 5


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
def previews(tiny_folder: Path, night: Path, export_tiny: Callable[..., Path]) -> Path:
    """As a model with a large head is exported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dash_onnx.exporters.export.options._LARGE_HEAD", 0)
        return export_tiny(tiny_folder, calibration=(night,))


@pytest.fixture(scope="module")
def hidden() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(1, TOKENS, 64)).astype(np.float32)


def logits_of(folder: Path, precision: str, hidden: np.ndarray) -> torch.Tensor:
    session = create_session(folder / f"head/{precision}.onnx", "cpu")
    return torch.from_numpy(session.run(["logits"], {"hidden": hidden})[0][0])


@pytest.mark.parametrize(("head", "bits"), [("int4", 4), ("int2", 2)])
def test_the_likeliest_logits_are_those_of_the_int8_head(
    head: Action, bits: int, previews: Path, hidden: np.ndarray
) -> None:
    exact, found = (logits_of(previews, name, hidden) for name in ("int8", head))
    model = DequantizedModel(Bundle(previews), ("int8", "int4"), torch.float32)
    normed = model.final(torch.from_numpy(hidden[0]))
    preview = normed @ head_weight(previews, head, bits).T
    _, likely = preview.topk(EXACT_TOKENS[head])
    chosen = torch.zeros_like(preview, dtype=torch.bool).scatter(-1, likely, True)
    torch.testing.assert_close(found[chosen], exact[chosen], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[~chosen], preview[~chosen], rtol=1e-4, atol=1e-4)
    assert (found - exact).abs().max() > 0.01
    assert torch.equal(found.argmax(-1), exact.argmax(-1))
    torch.testing.assert_close(
        model.logits(model.final(torch.from_numpy(hidden[0])), head), found, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("head", ["int4", "int2"])
def test_heads_share_the_exact_weights(head: Action, previews: Path, tmp_path: Path) -> None:
    """They lie in one file, which is checked when any of them is loaded."""
    sizes = [(previews / f"head/{name}.onnx.data").stat().st_size for name in ("int8", head)]
    assert sizes[1] < 0.7 * sizes[0]
    copy = tmp_path / "copy"
    shutil.copytree(previews, copy)
    data = copy / "head/int8.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match=r"int8.onnx.data does not match its SHA-256"):
        sequence = dash_onnx.load(copy).new_sequence()
        sequence.forward(3, FixedPath(("int8",) * 4, head))


@pytest.mark.parametrize("options", [{"variants": ("int4",)}, {"variants": ("full", "int4")}])
def test_without_an_int8_head_the_int4_head_looks_once(
    options: dict, tiny_with: Callable[..., Path]
) -> None:
    out = tiny_with(**options)
    assert not rescores(out / "head/int4.onnx")
    model = dash_onnx.load(out)
    best = options["variants"][0]
    assert model.manifest.heads["skip"] == best
    assert np.isfinite(model.logits(np.arange(8), policy="int4")).all()


def test_mixed_paths_take_the_int4_head_where_it_looks_twice(folder: Path, previews: Path) -> None:
    for one in (folder, previews):
        heads = dash_onnx.load(one).manifest.heads
        assert heads == {"full": "full", "int8": "int8", "int4": "int4", "skip": "int4"}


def test_a_large_head_comes_in_int2_too(folder: Path, previews: Path, capsys: Capture) -> None:
    assert Bundle(folder).manifest.exported_heads == ("full", "int8", "int4")
    manifest = Bundle(previews).manifest
    assert manifest.exported_heads == ("full", "int8", "int4", "int2")
    assert manifest.costs.heads_ms["int2"] > 0
    sizes = {head: manifest.graph_bytes(head_path(head), head) for head in ("int4", "int2")}
    assert sizes["int2"] < sizes["int4"]
    assert main([str(previews)]) == 0
    head = capsys.readouterr().out.partition("LM head, ms")[2].splitlines()[0]
    assert len(head.split()) == 4


@pytest.mark.parametrize("options", [{"variants": ("int8",)}, {"device": "cuda"}])
def test_no_int2_head_without_both_others_and_on_cuda(options: dict[str, Any]) -> None:
    facts = ModelFacts("m", "llama", 2, 1024, 4096, 8, 8, 128, 1 << 17, 4096)

    def heads(facts: ModelFacts, **options: Any) -> tuple[str, ...]:
        return ExportOptions(**options).resolved("folder", spec_of(facts)).head_precisions(facts)

    assert "int2" in heads(facts)
    assert "int2" not in heads(facts, **options)
    assert "int2" not in heads(replace(facts, vocab_size=1 << 15))


# INT2


@pytest.fixture(scope="module")
def two_bits(tiny_with: Callable[..., Path]) -> Path:
    return tiny_with(variants=("int8", "int4", "int2"))


def test_int2_layers_have_int4_attention_and_blocks_of_64_where_these_fit(two_bits: Path) -> None:
    found = {}
    for node in onnx.load(two_bits / "layers/01/int2.onnx", load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            facts = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            found[node.input[1].partition(".")[0]] = facts["bits"], facts["block_size"]
    assert found == {
        "qkv_proj": (4, 32),
        "o_proj": (4, 32),
        "gate_up_proj": (2, 64),
        "down_proj": (2, 32),  # its 96 inputs are no multiple of 64
    }


def test_int2_has_no_small_head_and_costs_least_memory(two_bits: Path) -> None:
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
    batch = torch.from_numpy(ids)[None]
    x, beside = layers.embedding(batch), layers.embedding.beside(batch)
    for index in range(4):
        queries, keys_values = layers.qkv(index, "int2", layers.normed(index, x))
        attention = layers.attend(index, queries, keys_values, beside)
        x = layers.complete(index, "int2", x, attention)
    found = layers.logits(layers.final(x), "int8")[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_a_browser_gets_no_products_of_two_bits(two_bits: Path, tmp_path: Path) -> None:
    options = FuseOptions(client="web", policy="int2")
    with pytest.raises(UnsupportedError, match="web has no fast product for INT2"):
        fuse(Bundle(two_bits), tmp_path / "fused", options, overwrite=False)
    assert not (tmp_path / "fused").exists()
