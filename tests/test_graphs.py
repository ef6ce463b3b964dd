"""Graphs keep the contract; those built for CUDA run too (here on the CPU, in FP16)."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import save_tiny
from onnx import numpy_helper

import dash_onnx
from dash_onnx.core.bundle import Bundle, file_facts
from dash_onnx.core.contract import SHARED_DATA, embed_ports, head_path, head_ports, layer_ports
from dash_onnx.exporters.architectures.base import Linear, ModelSpec, Norm
from dash_onnx.exporters.calibration.runner import Runner
from dash_onnx.exporters.calibration.statistics import relative_error
from dash_onnx.exporters.graphs import replace_expand
from dash_onnx.exporters.graphs.graph import Graph
from dash_onnx.exporters.train.dequantized import DequantizedModel
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.model import Model

ACTIONS = ("full", "int8", "int4", "skip")
IDS = np.random.default_rng(1).integers(2, 384, (2, 24))


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, night: Path, export_tiny: Callable[..., Path]
) -> dict[str, Path]:
    """The same model by device."""
    source = save_tiny(tmp_path_factory.mktemp("s") / "m", initializer_range=0.08)
    return {d: export_tiny(source, calibration=(night,), device=d) for d in ("cpu", "cuda")}


def outputs_of(bundle: Bundle) -> dict[str, np.ndarray]:
    """Of the first layer, by action; `hidden` is its input."""
    facts, folder = bundle.manifest, bundle.folder
    runner = Runner(ModelSpec(facts.model, facts.block, facts.ropes, facts.attention), "cpu")
    hidden = runner.embed(folder / "embed.onnx", IDS)
    graphs = {action: folder / f"layers/00/{action}.onnx" for action in ACTIONS}
    return {"hidden": hidden, **{a: runner.layer(0, path, hidden) for a, path in graphs.items()}}


def declared(side: list[onnx.ValueInfoProto]) -> list[tuple[str, str, tuple]]:
    types = [(value.name, value.type.tensor_type) for value in side]
    return [
        (
            name,
            onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
            tuple(d.dim_param or d.dim_value for d in kind.shape.dim),
        )
        for name, kind in types
    ]


UNREAD = {
    "skip": ("seqlens_k", "total_sequence_length", "query_seqlens", "mask", "plain"),
    "grouped": ("start", "positions", "mask", "plain"),
}
"""Inputs of the contract that a graph has no use for, and so does not have."""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_graph_declares_the_ports_of_the_contract_and_keeps_its_weights_beside_it(
    device: str, bundles: dict[str, Path]
) -> None:
    folder = bundles[device]
    manifest = Bundle(folder).manifest
    dtype = {"cpu": "float32", "cuda": "float16"}[device]
    assert (manifest.target.device, manifest.target.dtype) == (device, dtype)
    paths = sorted(folder.rglob("*.onnx"))
    assert len(paths) == 1 + 3 + 4 * 4
    for path in paths:
        onnx.checker.check_model(path)
        graph = onnx.load(path, load_external_data=False).graph
        kind = path.relative_to(folder).parts[0].removesuffix(".onnx")
        ports = {"embed": embed_ports, "head": head_ports}.get(kind, layer_ports)(manifest.dims)
        left_out: tuple[str, ...] = ()
        if kind == "layers":
            left_out = UNREAD["skip" if path.stem == "skip" else "grouped"]
            left_out += () if manifest.target.ragged else ("query_seqlens",)
        inputs = [port for port in ports.inputs if port.name not in left_out]
        for side, wanted in ((graph.input, inputs), (graph.output, ports.outputs)):
            assert declared(side) == [(p.name, p.dtype, p.shape) for p in wanted], path
        places = {
            e.value for t in graph.initializer for e in t.external_data if e.key == "location"
        }
        shared = {Path(data).name for graph, data in SHARED_DATA.items() if path.match(graph)}
        assert places == {f"{path.name}.data", *(shared if device == "cpu" else [])}
        assert sum(len(t.raw_data) for t in graph.initializer if not t.external_data) < 16 * 1024


def test_graphs_for_cuda_compute_in_fp16_and_agree_with_fp32(bundles: dict[str, Path]) -> None:
    cpu, cuda = (outputs_of(Bundle(bundles[device])) for device in ("cpu", "cuda"))
    assert (cpu["hidden"].dtype, cuda["hidden"].dtype) == (np.float32, np.float16)
    for action in ACTIONS:
        # GPTQ and the compensation are fitted to their own activations, which FP16 rounds.
        limit = 0.1 if action in ("int4", "skip") else 0.01
        assert relative_error(cuda[action], cpu[action]) < limit, action


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_graphs_compute_what_their_own_weights_say(device: str, bundles: dict[str, Path]) -> None:
    bundle = Bundle(bundles[device])
    outputs = outputs_of(bundle)
    model = DequantizedModel(bundle, bundle.manifest.variants, torch.float32)
    x = torch.from_numpy(outputs["hidden"]).float()
    normed = model.normed(0, x)
    wanted = {"skip": model.skip(0, x, normed)[0]}
    beside = model.embedding.beside(torch.zeros(1, 24, dtype=torch.long))
    for action in bundle.manifest.variants:
        queries, keys_values = model.qkv(0, action, normed)
        attention = model.attend(0, queries, keys_values, beside)
        wanted[action] = model.complete(0, action, x, attention)
    for action, output in wanted.items():
        assert relative_error(outputs[action], output.numpy()) < 0.005, action


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_another_compensation_takes_the_place_of_the_fitted_one(
    device: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundles[device], tmp_path / "out"))
    bundle = Bundle(folder)
    before = outputs_of(bundle)
    model = DequantizedModel(bundle, bundle.manifest.variants, torch.float32)
    weight = model.compensation()[0]
    block = bundle.manifest.target.block_size
    weight.copy_(replace_expand(folder, 0, 3 * torch.randn_like(weight), block))
    x = torch.from_numpy(before["hidden"]).float()
    wanted = model.skip(0, x, model.normed(0, x))[0].numpy()
    assert relative_error(outputs_of(bundle)["skip"], wanted) < 0.005
    assert relative_error(before["skip"], wanted) > 0.1
    onnx.checker.check_model(folder / "layers/00/skip.onnx")
    sizes = [(f / "layers/00/skip.onnx.data").stat().st_size for f in (bundles[device], folder)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)


def test_runtime_and_training_read_a_product_that_is_cut(
    tiny_with: Callable[..., Path], tmp_path: Path
) -> None:
    whole, name = tiny_with(variants=("full",)), head_path("full")
    folder = Path(shutil.copytree(whole, tmp_path / "cut"))
    model = onnx.load(whole / name)
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in model.graph.initializer}
    manifest = Bundle(whole).manifest
    graph = Graph("head", head_ports(manifest.dims), manifest.target, manifest.block, folded=6400)
    hidden = graph.norm(graph.inputs["hidden"], "final_norm", Norm(tensors["final_norm"]))
    linear = Linear("lm_head", tensors["lm_head.weight"].T)
    (folder / f"{name}.data").unlink()
    graph.save(folder, name, logits=graph.linear(hidden, linear, "full"))
    nodes = onnx.load(folder / name, load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("MatMul") == 4  # 384 tokens
    files = {**manifest.files, **{n: file_facts(folder / n) for n in (name, f"{name}.data")}}
    (folder / "dash.json").write_text(dataclasses.replace(manifest, files=files).to_text())
    wanted, found = (dash_onnx.load(f).logits(IDS[0], policy="full") for f in (whole, folder))
    assert np.abs(found - wanted).max() <= 1e-5
    one, other = (DequantizedModel(Bundle(f), ("full",), torch.float32) for f in (whole, folder))
    assert torch.equal(one.lm_head("full").weight, other.lm_head("full").weight)


def test_an_int4_cache_for_cuda_holds_the_levels_of_one_for_the_cpu(
    tiny_with: Callable[..., Path],
) -> None:
    """Keys of the first layer, which the CPU computes in FP16, too."""
    held = []
    for device in ("cpu", "cuda"):
        model = Model(Bundle(tiny_with(kv_cache="int4", device=device)), Backend())
        sequence = model.new_sequence(32)
        sequence.prefill(IDS[0], ("full",) * 4, "full")
        pairs = sequence.kv.keys[0].array[0, :, : len(IDS[0])].astype(np.int64)
        held.append(np.stack([pairs & 15, pairs >> 4]))
    assert np.ptp(held[0]) > 10
    assert np.abs(held[0] - held[1]).max() <= 1
    assert (held[0] == held[1]).mean() > 0.9
