"""Ternary weights stay what they are: in INT2, which such models are exported in, and in others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import reference_logits, tiny_tokenizer
from families import CASES, config_of, random_ids, reference_of, save_random
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_model
from gguf_models import tiny_model
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from test_sources import opened
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import bitnet

import dash_onnx
from dash_onnx.cli.info import main as info
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import layer_path
from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.exporters.architectures import architecture_of
from dash_onnx.exporters.calibration.reference import streamed_model
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.exporters.export.suited import suited
from dash_onnx.exporters.quantize.blockwise import Bits, dequantize
from dash_onnx.exporters.quantize.ternary import ternary
from dash_onnx.exporters.sources import Source
from dash_onnx.exporters.train.stored import projections_of

GENERATOR = torch.Generator().manual_seed(3)
IDS = random_ids(50)
Capture = pytest.CaptureFixture[str]


def values(rows: int, columns: int, block: int) -> torch.Tensor:
    """Random ternary weights with a scale in each block."""
    scales = torch.rand(rows, -(-columns // block), generator=GENERATOR) + 0.01
    signs = torch.randint(-1, 2, (rows, columns), generator=GENERATOR)
    return signs * scales.repeat_interleave(block, 1)[:, :columns]


@pytest.mark.parametrize("columns", [256, 96])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ternary_weights_come_back_bit_for_bit(bits: Bits, columns: int) -> None:
    weight = values(5, columns, 128)
    weight[1, 64:] = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        wanted = weight.to(dtype)
        for block_size in (128, 64, 32):
            found = ternary(wanted, bits, block_size)
            assert found is not None and found.bits == bits and found.zero_points is None
            assert torch.equal(dequantize(found), wanted.float())


def test_one_value_of_another_size_is_not_ternary() -> None:
    weight = values(5, 256, 128)
    assert ternary(weight, 2, 256) is None  # two scales in a block
    for row in (0, 4):
        changed = weight.clone()
        changed[row, 200] = 0.001
        assert ternary(changed, 2, 128) is None


# Models


def save_ternary(folder: Path) -> Path:
    """A tiny Qwen 3 whose layers are ternary, with a scale for each row."""
    config = config_of("qwen3", {"head_dim": 32})
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.half().float()
        if ".layers." in name and parameter.dim() == 2:
            parameter.data = values(*parameter.shape, parameter.shape[1]).half().float()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def resolved(source: Source, **options: Any) -> ExportOptions:
    family = architecture_of(source.config)
    spec = family.describe("", source.config, None)
    return suited(ExportOptions(**options), source, family, spec)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ternary(tmp_path_factory.mktemp("ternary") / "m")


@pytest.fixture(scope="module")
def bundle(source: Path, night: Path, export_tiny: Callable[..., Path]) -> Path:
    """Exported by default, but for exact products."""
    return export_tiny(source, calibration=(night,), variants=(), wide=True)


def test_int2_holds_every_layer_bit_for_bit_and_is_all_that_is_written(
    source: Path, bundle: Path
) -> None:
    manifest = Bundle(bundle).manifest
    assert manifest.variants == ("int2",) and manifest.wide is None
    assert manifest.heads == {"int2": "int4", "skip": "int4"}  # it rescores in INT8
    assert {path.name for path in (bundle / "layers/01").glob("*.onnx")} == {
        "int2.onnx",
        "skip.onnx",
    }
    family, weights = architecture_of(opened(source).config), opened(source).weights
    spec = family.describe("", opened(source).config, None)
    for index in range(manifest.model.num_layers):
        graph = onnx.load(bundle / layer_path(index, "int2")).graph
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        found = projections_of(tensors, manifest.target, torch.float32, "int2")
        linears = family.layer(weights, index, spec).linears
        assert len(linears) == len(found) == 4
        for linear in linears:
            assert torch.equal(found[linear.name].weight, linear.weight), linear.name
        bits = [a.i for node in graph.node for a in node.attribute if a.name == "bits"]
        assert bits == [2] * 4  # attention, too
        assert manifest.layers[index].relative_error["int2"] < 1e-6


def test_its_logits_are_those_of_full_precision(
    source: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    variants = ("full", "int8", "int4", "int2")
    model = dash_onnx.load(export_tiny(source, calibration=(night,), variants=variants))
    wanted = reference_of(source)(torch.from_numpy(IDS)[None]).logits[0].detach().numpy()
    for form in variants:
        path = (form,) * model.manifest.model.num_layers
        # Of all, the head is that of full precision.
        found = model.new_sequence().prefill(IDS, path, "full", every=True)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_info_says_that_int2_is_exact(bundle: Path, capsys: Capture) -> None:
    assert info([str(bundle)]) == 0
    assert "\nint2 is exact: the weights of the layers are ternary\n" in capsys.readouterr().out


def test_other_precisions_and_devices_are_a_choice(source: Path) -> None:
    told = resolved(opened(source), variants=("int4",))
    assert told.variants == ("int4",) and told.wide and told.ternary
    assert resolved(opened(source), device="cuda").variants == ("int8", "int4")


def test_a_layer_that_is_not_ternary_makes_an_ordinary_model(source: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for path in source.iterdir():
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] += 0.01
    save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
    found = resolved(opened(tmp_path / "m"))
    assert found.variants == ("int8", "int4") and found.wide and not found.ternary


# GGUF


@pytest.mark.parametrize(
    ("kind", "variants", "block"),
    [
        (Kind.TQ1_0, ("int2",), 128),
        (Kind.TQ2_0, ("int2",), 128),
        (Kind.Q4_0, ("int8", "int4"), 32),  # also of a model that was trained for it
    ],
)
def test_a_gguf_file_of_ternary_type_becomes_int2(
    kind: Kind, variants: tuple[str, ...], block: int, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    wanted = write_model(tmp_path / "tiny.gguf", tiny_model("llama", **sizes), kind=kind)
    source = opened(tmp_path / "tiny.gguf")
    found = resolved(source)
    assert (found.variants, found.block_size) == (variants, block)
    for name, weight in wanted.items():
        if ".layers." in name and weight.dim() == 2:
            assert torch.equal(source.weights[name], weight)
            exact = ternary(weight, 2, block)
            assert (exact is not None) == found.ternary
            assert exact is None or torch.equal(dequantize(exact), weight)


# BitNet


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """transformers compiles the rounding of BitNet, which takes half a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def save_bitnet(folder: Path, **quantization: Any) -> Path:
    """A tiny BitNet: weights that are rounded when they run, or packed ones with a scale."""
    save_random(folder, CASES["bitnet"])
    edited = json.loads((folder / "config.json").read_text())
    edited["quantization_config"] = {"quant_method": "bitnet", **quantization}
    (folder / "config.json").write_text(json.dumps(edited))
    if quantization.get("quantization_mode") != "online":
        tensors = load_file(folder / "model.safetensors")
        for name in [n for n, t in tensors.items() if ".layers." in n and t.dim() == 2]:
            signs = torch.randint(-1, 2, tensors[name].shape, generator=GENERATOR).float()
            tensors[name] = bitnet.pack_weights(signs)
            scale = torch.rand(1, generator=GENERATOR) * 0.1 + 0.1
            divided = quantization.get("linear_class") != "autobitlinear"
            tensors[f"{name}_scale"] = 1 / scale if divided else scale
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


PACKED = {"linear_class": "autobitlinear", "quantization_mode": "offline"}


def distance(found: np.ndarray, reference: PreTrainedModel) -> float:
    """||found - wanted|| / ||wanted|| of logits: transformers rounds what products read to INT8."""
    wanted = reference_logits(reference, IDS)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    "quantization",
    [{**PACKED, "quantization_mode": "online"}, PACKED, {}],
    ids=["online", "packed", "packed and divided"],
)
def test_bitnet_is_read_as_in_transformers(quantization: dict[str, Any], tmp_path: Path) -> None:
    folder = save_bitnet(tmp_path / "m", **quantization)
    source = opened(folder)
    assert resolved(source).variants == ("int2",)
    found = reference_logits(streamed_model(source), IDS)
    assert 1e-3 < distance(found, reference_of(folder)) < 0.05


def test_bitnet_runs_in_int2_as_in_transformers(
    tmp_path: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    folder = save_bitnet(tmp_path / "m", **PACKED)
    options = {"calibration": (night,), "variants": ("full", "int2"), "accuracy_level": 4}
    model = dash_onnx.load(export_tiny(folder, **options))
    found = model.logits(IDS, policy="int2")
    assert distance(found, reference_of(folder)) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rms_norm": True}, "use_rms_norm"),
        ({"modules_to_not_convert": 3}, "a list of names"),
        ({"scale": [0.0]}, "not finite"),
        ({"scale": [1.0, 2.0]}, "holds 2 numbers"),
        ({"weight": torch.uint8}, "values beyond -1, 0 and 1"),
        ({"weight": torch.bfloat16}, "has a scale and is not packed"),
    ],
    ids=["norms", "modules", "no scale", "two scales", "a fourth level", "numbers"],
)
def test_bitnet_that_computes_otherwise_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stored = {key: change[key] for key in ("scale", "weight") if key in change}
    folder = save_bitnet(tmp_path / "m", **({} if stored else change))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    if "scale" in stored:
        tensors[f"{name}_scale"] = torch.tensor(stored["scale"])
    if "weight" in stored:
        tensors[name] = torch.full_like(tensors[name], 255).to(stored["weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((SourceError, UnsupportedError), match=message) as caught:
        opened(folder).weights[name]
    assert "\n" not in str(caught.value)


def test_what_bitnet_does_not_convert_stays_as_it_is(tmp_path: Path) -> None:
    options = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    folder = save_bitnet(tmp_path / "m", **options, modules_to_not_convert=["o_proj"])
    stored, found = load_file(folder / "model.safetensors"), opened(folder)
    name = "model.layers.1.self_attn.{}.weight"
    assert torch.equal(found.weights[name.format("o_proj")], stored[name.format("o_proj")])
    assert found.weights[name.format("q_proj")].unique().numel() == 3
    assert resolved(found).variants == ("int8", "int4")
