"""Graphs keep the contract; those built for CUDA run too (here on the CPU, in FP16)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import save_tiny

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import Ports, embed_ports, head_ports, layer_ports
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.architectures.base import ModelSpec
from dash_onnx.exporters.graphs import build, replace_expand
from dash_onnx.exporters.measure import Runner, relative_errors
from dash_onnx.exporters.train.frozen import Frozen
from dash_onnx.runtime.engine import Model


def spec_of(manifest: Manifest) -> ModelSpec:
    return ModelSpec(manifest.model, manifest.block, manifest.ropes, manifest.attention)


def declared(graph: onnx.GraphProto) -> list[list[tuple[str, str, list]]]:
    return [
        [
            (
                value.name,
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            )
            for value in side
        ]
        for side in (graph.input, graph.output)
    ]


def contract(ports: Ports) -> list[list[tuple[str, str, list]]]:
    return [
        [(p.name, p.dtype, list(p.shape)) for p in side] for side in (ports.inputs, ports.outputs)
    ]


def test_every_graph_declares_the_ports_of_the_contract(
    tiny_bundle: Path, tiny_model: Model
) -> None:
    dims = tiny_model.manifest.dims
    paths = sorted(tiny_bundle.rglob("*.onnx"))
    assert len(paths) == 1 + 3 + 4 * 4
    for path in paths:
        ports = {"embed": embed_ports, "head": head_ports}.get(
            path.relative_to(tiny_bundle).parts[0].removesuffix(".onnx"), layer_ports
        )(dims)
        assert declared(onnx.load(path, load_external_data=False).graph) == contract(ports), path


def test_weights_are_external_and_inside_the_bundle(tiny_bundle: Path) -> None:
    for path in tiny_bundle.rglob("*.onnx"):
        large = [
            t
            for t in onnx.load(path, load_external_data=False).graph.initializer
            if np.prod(t.dims) > 1024
        ]
        for tensor in large:
            places = {entry.key: entry.value for entry in tensor.external_data}
            assert places["location"] == path.name + ".data"


@pytest.fixture(scope="module")
def cuda_bundle(
    tmp_path_factory: pytest.TempPathFactory, night: Path, export_tiny: Callable[..., Path]
) -> Path:
    source = save_tiny(tmp_path_factory.mktemp("s") / "m", initializer_range=0.08)
    return export_tiny(source, calibration=(night,), device="cuda")


def test_graphs_for_cuda_compute_in_fp16_and_agree_with_fp32(
    cuda_bundle: Path, tmp_path: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    manifest = Bundle(cuda_bundle).manifest
    assert (manifest.target.device, manifest.target.dtype) == ("cuda", "float16")
    source = save_tiny(tmp_path / "m", initializer_range=0.08)
    cpu = export_tiny(source, calibration=(night,))
    runners = {}
    for name, folder in (("cuda", cuda_bundle), ("cpu", cpu)):
        facts = Bundle(folder).manifest
        spec = spec_of(facts)
        runners[name] = (Runner(spec, "cpu"), folder)
    ids = np.random.default_rng(0).integers(2, 384, (2, 24))
    outputs = {}
    for name, (runner, folder) in runners.items():
        hidden = runner.embed(folder / "embed.onnx", ids)
        outputs[name] = {
            action: runner.layer(0, folder / f"layers/00/{action}.onnx", hidden)
            for action in ("full", "int8", "int4", "skip")
        }
        assert hidden.dtype == (np.float16 if name == "cuda" else np.float32)
    for action, wanted in outputs["cpu"].items():
        error = relative_errors(wanted, {action: outputs["cuda"][action]})[action]
        # GPTQ and the compensation are fitted to their own activations, which FP16 rounds.
        assert error < (0.05 if action in ("int4", "skip") else 0.01), (action, error)


def test_graphs_for_cuda_compute_what_their_own_weights_say(cuda_bundle: Path) -> None:
    bundle = Bundle(cuda_bundle)
    frozen = Frozen(bundle, bundle.manifest.variants, torch.float32)
    spec = spec_of(bundle.manifest)
    runner = Runner(spec, "cpu")
    ids = np.random.default_rng(1).integers(2, 384, (2, 24))
    hidden = runner.embed(cuda_bundle / "embed.onnx", ids)
    x = torch.from_numpy(hidden).float()
    normed = frozen.normed(0, x)
    wanted = {"skip": frozen.skip(0, x, normed)[0]}
    for action in bundle.manifest.variants:
        queries, keys_values = frozen.split(0, frozen.qkv(0, action, normed))
        attention = frozen.attend(0, queries, keys_values, frozen.rotary(24))
        wanted[action] = frozen.complete(0, action, x, attention)
    for action, output in wanted.items():
        ours = runner.layer(0, cuda_bundle / f"layers/00/{action}.onnx", hidden)
        error = relative_errors(output.numpy(), {action: ours})[action]
        assert error < 0.005, (action, error)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_another_compensation_takes_the_place_of_the_fitted_one(
    device: str, cuda_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    source = cuda_bundle if device == "cuda" else tiny_bundle
    folder = Path(shutil.copytree(source, tmp_path / "out"))
    bundle = Bundle(folder)
    block = bundle.manifest.target.block_size
    spec = spec_of(bundle.manifest)
    runner = Runner(spec, "cpu")
    ids = np.random.default_rng(1).integers(2, 384, (2, 24))
    hidden = runner.embed(folder / "embed.onnx", ids)
    frozen = Frozen(bundle, bundle.manifest.variants, torch.float32)
    weight = frozen.compensation()[0]
    weight.copy_(replace_expand(folder, 0, 3 * torch.randn_like(weight), block))
    x = torch.from_numpy(hidden).float()
    wanted = frozen.skip(0, x, frozen.normed(0, x))[0]
    ours = runner.layer(0, folder / "layers/00/skip.onnx", hidden)
    before = runner.layer(0, source / "layers/00/skip.onnx", hidden)
    errors = relative_errors(wanted.numpy(), {"skip": ours, "int8": before})
    assert errors["skip"] < 0.005 and errors["int8"] > 0.1
    onnx.checker.check_model(folder / "layers/00/skip.onnx")
    sizes = [(f / "layers/00/skip.onnx.data").stat().st_size for f in (source, folder)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)


def test_wide_products_in_full_precision_are_cut_and_compute_the_same(
    tiny_folder: Path, export_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export_tiny(tiny_folder, variants=("full",))
    monkeypatch.setattr(build, "_FOLDED", 64 * 100)
    cut = export_tiny(tiny_folder, variants=("full",))
    head = onnx.load(cut / "head" / "full.onnx", load_external_data=False)
    assert sum(node.op_type == "MatMul" for node in head.graph.node) == 4  # 384 tokens
    ids = np.arange(2, 40)
    wanted, found = (dash_onnx.load(bundle).logits(ids, policy="full") for bundle in (whole, cut))
    assert np.abs(found - wanted).max() <= 1e-5
    one, other = (Frozen(Bundle(bundle), ("full",), torch.float32) for bundle in (whole, cut))
    assert torch.equal(one.heads["full"].weight, other.heads["full"].weight)
    for a, b in zip(one._layers, other._layers, strict=True):
        for name, product in a["full"].items():
            assert torch.equal(product.weight, b["full"][name].weight)
