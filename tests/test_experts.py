"""Mixtures of experts: where their weights come from, how they are rounded, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import VARIANTS, memory_of
from families import (
    CASES,
    LAYERS,
    Pair,
    config_of,
    random_ids,
    reference_of,
    save_random,
)
from safetensors.torch import load_file, save_file
from test_environment import PROMPT, case_of, runtime_logits
from transformers import AutoModelForCausalLM, PretrainedConfig

import dash_onnx
from dash_onnx.cli.forecast import bytes_read
from dash_onnx.core.actions import Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import EMBED_PATH, layer_path
from dash_onnx.core.errors import DashError, DeviceError, SourceError, UnsupportedError
from dash_onnx.core.facts import INT8_INPUTS, Target
from dash_onnx.exporters.architectures import REGISTRY, architecture_of
from dash_onnx.exporters.architectures.base import Linear
from dash_onnx.exporters.calibration.hidden_states import HiddenStateFile
from dash_onnx.exporters.calibration.runner import Runner
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.exporters.export.sizes import sizes_of
from dash_onnx.exporters.graphs import build_layer, captured_inputs
from dash_onnx.exporters.sources import Shapes, Source, open_source
from dash_onnx.exporters.train.dequantized import DequantizedModel
from dash_onnx.runtime import sessions
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.rows import Rows

QWEN3 = CASES["qwen3_moe"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.build(QWEN3, tmp_path_factory.mktemp("experts"))


def test_files_with_a_tensor_for_each_expert_are_read_as_transformers_stacks_them(
    tmp_path: Path,
) -> None:
    source = save_random(tmp_path, QWEN3)
    weights, reference = open_source(str(source), REGISTRY).weights, reference_of(source)
    stored = load_file(source / "model.safetensors")
    assert "model.layers.1.mlp.experts.5.up_proj.weight" in stored
    for name, parameter in reference.named_parameters():
        assert name in weights
        assert weights.shape(name) == tuple(parameter.shape)
        torch.testing.assert_close(weights[name], parameter.data, rtol=0, atol=0)


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    source = save_random(tmp_path, QWEN3)
    stored = load_file(source / "model.safetensors")
    stored = {name: x for name, x in stored.items() if "layers.1.mlp.experts.5" not in name}
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"experts.gate_up_proj has shape \(5, 128, 64\)"):
        export(str(source), tmp_path / "out", ExportOptions())


@pytest.mark.parametrize("family", ["ernie4_5_moe", "glm4_moe", "lfm2_moe", "minimax_m2"])
def test_a_missing_bias_of_the_choice_is_an_error(family: str, tmp_path: Path) -> None:
    source = save_random(tmp_path, CASES[family])
    stored = load_file(source / "model.safetensors")
    kept = {name: x for name, x in stored.items() if not name.endswith(("n_bias", "t_bias"))}
    assert len(kept) < len(stored)
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"no tensor '.+_bias'"):
        export(str(source), tmp_path / "out", ExportOptions())


def test_layers_that_predict_further_tokens_are_not_read(tmp_path: Path) -> None:
    """GLM 4.5 stores one behind the others."""
    source = save_random(tmp_path, CASES["glm4_moe"])
    stored, path = load_file(source / "model.safetensors"), source / "config.json"
    last = f"model.layers.{LAYERS - 1}."
    more = {n.replace(last, f"model.layers.{LAYERS}."): x for n, x in stored.items() if last in n}
    more = {name: x.clone() for name, x in more.items()}
    save_file(stored | more, source / "model.safetensors", {"format": "pt"})
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert open_source(str(source), REGISTRY).config.num_hidden_layers == LAYERS
    for drafts in (0, 2, None):
        path.write_text(json.dumps({**config, "num_nextn_predict_layers": drafts}))
        with pytest.raises(SourceError, match=f"has {LAYERS + 1} layers"):
            open_source(str(source), REGISTRY)


def shapes_of(config: PretrainedConfig) -> Shapes:
    """The weights of a model, without content."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return Shapes({name: tuple(weight.shape) for name, weight in model.named_parameters()})


@pytest.mark.parametrize("bits", ["full", "int8", "int4"])
def test_a_token_reads_the_weights_of_a_model_that_has_only_the_experts_it_takes(
    bits: Action,
) -> None:
    few, many = (
        sizes_of(
            Source("folder", "a", config, shapes_of(config), None, None, ()),
            ExportOptions(variants=("full", "int8", "int4")),
        )
        for config in (config_of("qwen3_moe", {**QWEN3.config, "num_experts": n}) for n in (2, 16))
    )
    assert few.read == few.layers
    assert many.layers[bits] > 3 * few.layers[bits]
    assert many.read[bits] == pytest.approx(few.read[bits], rel=0.05)  # but for the router
    assert bytes_read(bits, many) == pytest.approx(bytes_read(bits, few), rel=0.05)


FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)


def save_mxfp4(folder: Path) -> Path:
    """gpt-oss as it is published: matrices of experts in MXFP4; in `exact`, the same in FP32."""
    random = np.random.default_rng(5)
    exact = save_random(folder / "exact", CASES["gpt_oss"])
    shutil.copytree(exact, folder / "packed")
    values = load_file(exact / "model.safetensors")
    packed = dict(values)
    for name in [name for name in values if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = values[name].shape
        assert columns % 32 == 0
        bytes_ = random.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        scales = random.integers(121, 125, (experts, rows, columns // 32), np.uint8)
        nibbles = np.stack([bytes_ & 15, bytes_ >> 4], -1).reshape(*scales.shape, 32)
        levels = np.where(nibbles & 8, -1, 1) * FP4[nibbles & 7]
        floats = levels * np.exp2(scales.astype(np.float32) - 127)[..., None]
        matrices = torch.from_numpy(floats.reshape(experts, rows, columns).astype(np.float32))
        values[name] = matrices.transpose(1, 2).contiguous()
        del packed[name]
        packed[f"{name}_blocks"] = torch.from_numpy(bytes_)
        packed[f"{name}_scales"] = torch.from_numpy(scales)
    save_file(values, exact / "model.safetensors", {"format": "pt"})
    save_file(packed, folder / "packed" / "model.safetensors", {"format": "pt"})
    path = folder / "packed" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return folder


def test_experts_in_mxfp4_are_read_exactly(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path)
    packed, exact = (open_source(str(folder / one), REGISTRY) for one in ("packed", "exact"))
    assert not hasattr(packed.config, "quantization_config")
    found = 0
    for name in load_file(folder / "exact" / "model.safetensors"):
        assert name in packed.weights
        assert packed.weights.shape(name) == exact.weights.shape(name)
        torch.testing.assert_close(
            packed.weights[name].float(), exact.weights[name].float(), rtol=0, atol=0
        )
        found += "_proj" in name and "experts" in name
    assert found == 4 * LAYERS
    family = REGISTRY["gpt_oss"]
    for source in (packed, exact):  # all that a layer reads
        family.layer(source.weights, 0, family.describe("m", source.config, None))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("blocks", lambda x: x[..., :8].contiguous(), "is not in MXFP4"),
        ("scales", lambda x: x.fill_(255), "are not finite"),
        ("scales", lambda x: x.flatten(1), "is not in MXFP4"),
    ],
)
def test_damaged_mxfp4_is_refused(
    part: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, tmp_path: Path
) -> None:
    path = save_mxfp4(tmp_path) / "packed" / "model.safetensors"
    stored, name = load_file(path), "model.layers.1.mlp.experts.down_proj"
    stored[f"{name}_{part}"] = change(stored[f"{name}_{part}"])
    save_file(stored, path, {"format": "pt"})
    weights = open_source(str(path.parent), REGISTRY).weights
    with pytest.raises(SourceError, match=message):
        weights.shape(name), weights[name]


def test_a_rare_expert_is_rounded_as_well_as_the_others(pair: Pair) -> None:
    """Its INT4 weights come from the inputs of all tokens, though hardly any chose it."""
    source = open_source(str(pair.bundle.parent / "source"), REGISTRY)
    spec = REGISTRY["qwen3_moe"].describe("", source.config, None)
    layer = REGISTRY["qwen3_moe"].layer(source.weights, 0, spec)
    assert layer.mixture is not None and spec.block.experts is not None
    count = spec.block.experts.count
    rounded = DequantizedModel(Bundle(pair.bundle), ("int4",), torch.float32)._layer(0, "int4")
    for name in ("up", "down"):
        linear = getattr(layer.mixture, name)
        dequantized = rounded[linear.name].weight.view(count, -1)
        wanted = linear.weight.float().view(count, -1)
        errors = (dequantized - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert errors.max() < 1.2 * errors.min() < 0.2


def test_the_training_rounds_inputs_of_experts_as_their_kernels_do(
    night: Path, tmp_path: Path
) -> None:
    source = save_random(tmp_path / "source", QWEN3)
    options = ExportOptions(
        variants=("int8", "int4"), accuracy_level=INT8_INPUTS, wide=False, calibration=(night,)
    )
    export(str(source), tmp_path / "bundle", options)
    case, ids = case_of(tmp_path / "bundle"), torch.tensor(random_ids(40))[None]
    for action in range(2):
        path, errors = (action,) * LAYERS, []
        wanted = runtime_logits(case, ids[0], torch.tensor(path).expand(ids.shape[1], -1))
        for case.env.model.rounds_inputs in (False, True):
            ours = case.env.model.logits(case.env.run_path(ids, path))[0, PROMPT:].numpy()
            errors.append(np.median(np.abs(ours - wanted)))
        assert errors[1] < errors[0] / 5  # a near-tie may choose another expert


def test_inputs_of_all_tokens_round_experts_better_than_the_nearest_level(
    pair: Pair, tmp_path: Path
) -> None:
    source, family = (
        open_source(str(pair.bundle.parent / "source"), REGISTRY),
        REGISTRY["qwen3_moe"],
    )
    spec, target = family.describe("", source.config, None), Target("cpu", "float32", 32, 0)
    runner, ids = Runner(spec, "cpu"), np.random.default_rng(0).integers(2, 200, (16, 128))
    files = [HiddenStateFile(tmp_path / f"{layer}.npy") for layer in range(LAYERS + 1)]
    files[0].write(len(ids), [runner.embed(pair.bundle / EMBED_PATH, ids)])
    for index in range(LAYERS):
        layer, states = family.layer(source.weights, index, spec), files[index : index + 2]
        inputs = captured_inputs(layer, spec, 32, ("int4",))
        full = pair.bundle / layer_path(index, "full")
        sinks = dict.fromkeys(inputs, 1.0)
        hessians = runner.layer_with_hessians(index, full, *states, inputs, sinks)
        nearest = {**hessians, "experts_up": torch.eye(64)}
        errors = []
        for used in (hessians, nearest):
            build_layer(tmp_path, index, layer, spec, target, "int4", used)
            got = runner.layer(index, tmp_path / layer_path(index, "int4"), states[0][:])
            wanted = states[1][:]
            error = np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
            errors.append(np.median(error))
        assert errors[0] < 0.96 * errors[1]


def test_skipped_layers_load_no_experts(pair: Pair) -> None:
    sizes = [layer.bytes for layer in Bundle(pair.bundle).manifest.layers]
    assert all(one["skip"] < one["int4"] / 3 for one in sizes)
    skip = onnx.load(pair.bundle / layer_path(0, "skip"), load_external_data=False).graph
    assert not [one.name for one in skip.initializer if one.name.startswith("experts")]


@pytest.mark.parametrize("action", ["int8", "int4"])
def test_rows_of_a_batch_choose_their_own_experts(pair: Pair, action: Action) -> None:
    path, lengths = (action,) * LAYERS, (9, 23, 4)
    ids = random_ids(max(lengths) + 4)
    batch = Rows.new(pair.model._sessions, len(lengths))
    for row, length in zip(batch.states, lengths, strict=True):
        row.prefill(ids[:length], path, action)
    deciders = [FixedPath(path, action)] * len(lengths)
    for step in range(4):
        tokens = [[int(ids[length + step])] for length in lengths]
        logits, _ = batch.forward(range(len(lengths)), tokens, deciders)
        for got, length in zip(logits, lengths, strict=True):
            wanted = pair.model.logits(ids[: length + step + 1], policy=action)[-1]
            np.testing.assert_allclose(got[0], wanted, atol=1e-3)


@pytest.mark.parametrize("policy", ["int8", "int4", "static:int8,skip,int4"])
def test_a_mixture_that_memory_cannot_hold_runs_from_its_files(
    pair: Pair, policy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids, heads = random_ids(40), Bundle(pair.bundle).manifest.files
    free = 1 + sum(heads[f"head/{form}.onnx.data"].bytes for form in ("int8", "int4"))
    monkeypatch.setattr(sessions, "available_bytes", lambda: free)
    with dash_onnx.load(pair.bundle, policy=policy) as model:
        with pytest.raises(DeviceError, match=r"from their files, slowly \(--memory low\)"):
            model.preload("")
    with dash_onnx.load(pair.bundle, policy=policy, memory="low") as model:
        with pytest.raises(DeviceError, match=r"or close other programs$"):
            model.preload("full")
        assert not caplog.records
        model.preload("")
        assert "they are read from their files, tens of times slower" in caplog.text
        assert model.loaded_bytes < free and model.bytes_to_load() == 0
        got = model.logits(ids)
        for path in model.loaded - {"embed.onnx", *(f"head/{form}.onnx" for form in VARIANTS)}:
            used = model._sessions._loaded[path].session.get_session_options()
            if not path.endswith("skip.onnx"):
                assert used.get_session_config_entry("session.disable_prepacking") == "1"
    wanted = pair.model.logits(ids, policy=policy)
    errors = np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    # Packed weights in INT8 also round what they multiply, which sends some tokens elsewhere.
    assert np.median(errors) < 0.03


def test_experts_that_run_from_their_file_are_not_in_memory(tmp_path: Path) -> None:
    family, source = REGISTRY["qwen3_moe"], save_random(tmp_path / "source", QWEN3)
    weights, config = (one := open_source(str(source), REGISTRY)).weights, one.config
    spec = family.describe("", config, None)
    layer, experts, width = family.layer(weights, 0, spec), spec.block.experts, 1 << 15
    assert layer.mixture is not None and experts is not None
    mixture = replace(
        layer.mixture,
        up=Linear("experts_up", torch.randn(experts.count * 2 * width, 64).half()),
        down=Linear("experts_down", torch.randn(experts.count * 64, width).half()),
    )
    spec = replace(spec, block=replace(spec.block, experts=replace(experts, width=width)))
    layer, target = replace(layer, mixture=mixture), Target("cpu", "float32", 32, 4)
    build_layer(tmp_path, 0, layer, spec, target, "int8", {})
    path = tmp_path / layer_path(0, "int8")
    runner, session = Runner(spec, "cpu"), Backend().session(path)
    feeds = runner._feeds_of(session, 0)(0, np.ones((4, 64), np.float32))
    grown = [memory_of(path, "hidden_out", feeds, "RssAnon", packed=packed) for packed in (0, 1)]
    stored = path.with_suffix(".onnx.data").stat().st_size
    assert grown[0] < stored / 4 and grown[1] > stored / 1.5, grown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("int4", "int2")}, "mixtures of experts run on the CPU, in full, int8"),
        ({"device": "cuda"}, "mixtures of experts run on the CPU, in full, int8 and int4"),
        ({"block_size": 128}, "block_size 128 does not divide the hidden size 64"),
    ],
)
def test_what_the_products_of_experts_cannot_do_is_refused(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    source = save_random(tmp_path / "source", QWEN3)
    with pytest.raises(DashError, match=message):
        export(str(source), tmp_path / "out", ExportOptions(**options))


def test_blocks_divide_the_width_of_experts(tmp_path: Path) -> None:
    options = ExportOptions(variants=VARIANTS)
    for width, block in ((64, 64), (32, 32)):
        config = config_of("qwen3_moe", {**QWEN3.config, "moe_intermediate_size": width})
        spec = architecture_of(config).describe("m", config, None)
        facts = replace(spec.facts, intermediate_size=128)
        resolved = options.resolved("folder", replace(spec, facts=facts))
        assert resolved.block_size == block and not resolved.wide


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3_moe", {"hidden_act": "gelu"}, "experts with activation 'gelu' are not supported"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is not in 1..6"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("lfm2_moe", {"norm_topk_prob": False}, "lfm2_moe with norm_topk_prob False"),
        ("lfm2_moe", {"use_expert_bias": False}, "lfm2_moe with use_expert_bias False"),
        ("glm4_moe", {"n_group": 2}, "n_group is 2: experts chosen by group"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 1, 2]}, "num_experts_per_tok [2, 1, 2]: layers that"),
    ],
)
def test_experts_of_other_kinds_are_refused(
    family: str, change: dict[str, object], message: str
) -> None:
    config = config_of(family, {**CASES[family].config, **change})
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        architecture_of(config).describe("m", config, None)
