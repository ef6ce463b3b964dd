"""What an export writes: figures computed again from transformers, files, and who decides them."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY, reference_logits, save_biased, save_tiny, spec_of, tiny_tokenizer
from onnx import numpy_helper
from transformers import AutoModelForCausalLM

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import CARD_NAME
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.facts import ModelFacts
from dash_onnx.core.manifest import MANIFEST_NAME, Manifest
from dash_onnx.exporters.calibration.statistics import scale_and_cosine
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.runtime.ort import create_session

IDS = np.arange(2, 42)
ALL = ("full", "int8", "int4")
SINKS = 4
BLOCK = 32

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def bundle(tiny_with: Export) -> Path:
    return tiny_with()


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Bundle(bundle).manifest


def transformers_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def transformers_logits(folder: Path) -> np.ndarray:
    return reference_logits(transformers_model(folder), IDS)


MEASURED = (MANIFEST_NAME, CARD_NAME)


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents by name, but for the manifest and the card, which hold times."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in MEASURED]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# The manifest's figures, computed again from transformers


@dataclass
class Reference:
    """The tiny model run by transformers over the calibration ids.

    Attributes:
        inputs, outputs: of each layer, `[layers, sequences, length, D]`; `hidden_states` of
            transformers will not do for the last layer: its last entry is after the norm.
    """

    model: Any
    ids: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor


@pytest.fixture(scope="module")
def reference(tiny_folder: Path, night: Path, manifest: Manifest) -> Reference:
    facts = manifest.calibration
    tokens = tiny_tokenizer()(night.read_text(), add_special_tokens=False)["input_ids"]
    length = facts.tokens // facts.sequences
    starts = np.linspace(0, len(tokens) - length, facts.sequences).astype(int)
    ids = np.array([tokens[start : start + length] for start in starts], "<i8")
    ids = np.random.default_rng(facts.seed).permutation(ids)
    assert hashlib.sha256(ids.tobytes()).hexdigest() == facts.sha256
    model = transformers_model(tiny_folder)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    hooks = []
    for layer in model.model.layers:
        hooks += [
            layer.register_forward_pre_hook(lambda _layer, args: inputs.append(args[0])),
            layer.register_forward_hook(lambda _layer, _args, output: outputs.append(output)),
        ]
    with torch.inference_mode():
        model(torch.from_numpy(ids))
    for hook in hooks:
        hook.remove()
    return Reference(model, torch.from_numpy(ids), torch.stack(inputs), torch.stack(outputs))


def relative_error(output: torch.Tensor, wanted: torch.Tensor) -> float:
    """Over all tokens but the sinks, `[sequences, length, D]`."""
    output, wanted = (h[:, SINKS:].double() for h in (output, wanted))
    return float((output - wanted).norm() / wanted.norm())


def stored_weight(path: Path, name: str, columns: int) -> torch.Tensor:
    """A MatMulNBits weight `[N, K]`, dequantized as ORT's documentation of the operator says."""
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    values, scales = stored[f"{name}.values"], stored[f"{name}.scales"]
    rows, blocks = scales.shape
    zeros = np.full((rows, blocks), 128.0)
    if values.shape[-1] == BLOCK // 2:  # two 4-bit values in a byte, the low half first
        values = np.stack([values & 0xF, values >> 4], -1).reshape(rows, blocks, BLOCK)
        packed = stored[f"{name}.zero_points"].reshape(rows, -1)
        zeros = np.stack([packed & 0xF, packed >> 4], -1).reshape(rows, -1)[:, :blocks]
    else:
        assert f"{name}.zero_points" not in stored
    weight = (values.astype(np.float64) - zeros[..., None]) * scales[..., None]
    return torch.from_numpy(weight.reshape(rows, -1)[:, :columns]).float()


def with_stored_weights(layer: Any, path: Path) -> Any:
    """A copy of transformers' layer that computes with the weights of a quantized graph."""
    layer = copy.deepcopy(layer)
    attention, mlp = layer.self_attn, layer.mlp
    stacks = {
        "qkv_proj": (attention.q_proj, attention.k_proj, attention.v_proj),
        "o_proj": (attention.o_proj,),
        "gate_up_proj": (mlp.gate_proj, mlp.up_proj),
        "down_proj": (mlp.down_proj,),
    }
    for name, parts in stacks.items():
        weight = stored_weight(path, name, parts[0].in_features)
        for part, rows in zip(parts, weight.split([p.out_features for p in parts]), strict=True):
            part.weight.data = rows
    return layer


def test_tokens_whose_embedding_is_zero_leave_the_figures_of_a_layer_alone() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 2, 12, 8)).astype(np.float32)
    wanted = scale_and_cosine(x[:, :11], y[:, :11])
    x[:, 11] = 0
    assert scale_and_cosine(x, y) == pytest.approx(wanted)
    assert scale_and_cosine(np.zeros_like(x), y) == (1.0, 1.0)


def test_scale_and_cosine_are_means_over_all_tokens_but_the_sinks(
    manifest: Manifest, reference: Reference
) -> None:
    for layer, x, y in zip(manifest.layers, reference.inputs, reference.outputs, strict=True):
        x, y = x[:, SINKS:].double(), y[:, SINKS:].double()
        assert layer.scale == pytest.approx(float((y.norm(dim=-1) / x.norm(dim=-1)).mean()), 1e-4)
        cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
        assert layer.cosine == pytest.approx(float(cosine), abs=1e-5)


@pytest.mark.parametrize("rank", [None, 0])
def test_the_error_of_skip_is_that_of_the_scaled_input_and_the_stored_low_rank_map(
    rank: int | None, tiny_with: Export, reference: Reference
) -> None:
    bundle = tiny_with() if rank is None else tiny_with(compensation_rank=rank)
    manifest = Bundle(bundle).manifest
    assert manifest.compensation_rank == (64 if rank is None else rank)
    for index, facts in enumerate(manifest.layers):
        x, y = reference.inputs[index], reference.outputs[index]
        output = facts.scale * x
        if rank is None:
            path = bundle / f"layers/{index:02d}/skip.onnx"
            reduce = stored_weight(path, "skip_proj", x.shape[-1])[-64:]
            expand = stored_weight(path, "expand_proj", 64)
            with torch.inference_mode():
                normed = reference.model.model.layers[index].input_layernorm(x)
            output = output + normed @ reduce.T @ expand.T
        assert facts.relative_error["skip"] == pytest.approx(relative_error(output, y), rel=1e-3)


def test_the_error_of_skip_falls_with_the_rank_of_its_compensation(tiny_with: Export) -> None:
    manifests = [
        Bundle(folder).manifest
        for folder in (tiny_with(compensation_rank=0), tiny_with(compensation_rank=32), tiny_with())
    ]
    assert [manifest.compensation_rank for manifest in manifests] == [0, 32, 64]
    for layers in zip(*(manifest.layers for manifest in manifests), strict=True):
        none, some, most = (layer.relative_error["skip"] for layer in layers)
        assert most <= 1.001 * some < none and most < 0.8 * none  # INT4 rounds both
        assert len({layer.scale for layer in layers}) == 1


@pytest.mark.parametrize("level", [0, 4], ids=["exact", "as shipped"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_error_of_a_precision_is_that_of_its_stored_weights(
    precision: str, level: int, tiny_with: Export, reference: Reference
) -> None:
    bundle = tiny_with(accuracy_level=4) if level else tiny_with()
    manifest, decoder = Bundle(bundle).manifest, reference.model.model
    assert manifest.target.accuracy_level == level
    length = reference.ids.shape[1]
    mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
    for index, facts in enumerate(manifest.layers):
        x, y = reference.inputs[index], reference.outputs[index]
        path = bundle / f"layers/{index:02d}/{precision}.onnx"
        layer = with_stored_weights(decoder.layers[index], path)
        with torch.inference_mode():
            rotary = decoder.rotary_emb(x, torch.arange(length)[None])
            output = layer(x, attention_mask=mask, position_embeddings=rotary)
        wanted = relative_error(output, y)
        if level:  # also rounds activations to INT8, about as much as INT8 weights are
            assert wanted < facts.relative_error[precision] < wanted + 0.02
        else:
            assert facts.relative_error[precision] == pytest.approx(wanted, rel=1e-3)


def test_int8_weights_are_the_nearest_of_255_levels(bundle: Path, reference: Reference) -> None:
    down = reference.model.model.layers[1].mlp.down_proj.weight.detach()
    stored = stored_weight(bundle / "layers/01/int8.onnx", "down_proj", down.shape[1])
    blocks = down.reshape(down.shape[0], -1, BLOCK)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    assert ((stored.reshape(blocks.shape) - blocks).abs() <= step * 0.5001).all()


def test_facts_are_those_of_the_config_the_text_and_the_files(
    bundle: Path, manifest: Manifest, reference: Reference
) -> None:
    tiny = (4, 64, 96, 4, 2, 16, 384, 256)
    assert manifest.model == ModelFacts("tiny", "llama", *tiny)
    np.testing.assert_allclose(manifest.ropes[0].inv_freq, 1e4 ** (-np.arange(8) / 8), rtol=1e-6)
    assert manifest.variants == manifest.exported_heads == ALL
    assert manifest.heads == {"full": "full", "int8": "int8", "int4": "int4", "skip": "int4"}
    calibration = manifest.calibration
    assert (calibration.source, calibration.sink_tokens) == ("night.txt", SINKS)
    assert calibration.sequences >= 2 and calibration.tokens == reference.ids.numel()
    export = manifest.export
    assert (export.source, export.fp32_kept) == ("folder:tiny", ())
    assert export.peak_rss_bytes > 50e6
    assert {"torch", "onnx", "onnxruntime", "dash-onnx"} <= set(export.tools)
    files = {name: (f.bytes, f.sha256) for name, f in manifest.files.items()}
    assert files == {
        name: (len(content), hashlib.sha256(content).hexdigest())
        for name, content in files_of(bundle).items()
    }
    for index, layer in enumerate(manifest.layers):
        parts = {a: bundle.glob(f"layers/{index:02d}/{a}.onnx*") for a in (*ALL, "skip")}
        sizes = {a: sum(path.stat().st_size for path in paths) for a, paths in parts.items()}
        assert layer.bytes == sizes and sizes["full"] > sizes["int8"] > sizes["int4"] > 0
        errors = layer.relative_error
        assert 0 < errors["int8"] < errors["int4"] < errors["skip"] and len(errors) == 3


# Choices


def test_a_subset_of_variants_has_its_own_graphs_only_and_generates(tiny_with: Export) -> None:
    int4_only = tiny_with(variants=("int4",))
    names = {path.relative_to(int4_only).as_posix() for path in int4_only.rglob("*.onnx*")}
    wanted = {"embed.onnx", "head/int4.onnx"}
    wanted |= {f"layers/{i:02d}/{action}.onnx" for i in range(4) for action in ("int4", "skip")}
    assert names == wanted | {f"{name}.data" for name in wanted}
    model = dash_onnx.load(int4_only)
    assert model.manifest.actions == ("int4", "skip")
    for layer in model.manifest.layers:
        assert set(layer.bytes) == set(layer.relative_error) == {"int4", "skip"}
    logits = model.logits(IDS, policy="static:int4,skip,int4,int4")
    assert logits.shape == (len(IDS), TINY["vocab_size"]) and np.isfinite(logits).all()


def test_variants_may_be_in_any_order(tiny_with: Export) -> None:
    manifest = Bundle(tiny_with(variants=("int4", "int8"))).manifest
    assert manifest.variants == ("int8", "int4")
    with pytest.raises(UnsupportedError, match="'wide' is none of"):
        tiny_with(variants=("int8", "wide"))


def test_graphs_do_not_depend_on_the_other_variants(bundle: Path, tiny_with: Export) -> None:
    every, some = files_of(bundle), files_of(tiny_with(variants=("int8", "int4")))
    assert all(every[name] == content for name, content in some.items())
    # Without an INT8 head the INT4 head looks once.
    alone = files_of(tiny_with(variants=("int4",)))
    changed = {name for name, content in alone.items() if every[name] != content}
    assert changed == {"head/int4.onnx", "head/int4.onnx.data"}


@pytest.mark.parametrize(
    ("variants", "mixed"),
    [
        (("full",), "full"),
        (("int4",), "int4"),
        (("int8", "int4"), "int4"),  # which rescores
        (("full", "int4"), "full"),
    ],
)
def test_int4_and_mixed_paths_take_the_int4_head_where_it_looks_twice_else_the_highest(
    variants: tuple[str, ...], mixed: str, tiny_with: Export
) -> None:
    manifest = Bundle(tiny_with(variants=variants)).manifest
    wanted = {v: mixed if v == "int4" else v for v in (*variants, "skip")}
    assert manifest.heads == {**wanted, "skip": mixed}
    assert manifest.exported_heads == variants


def test_max_length_is_the_context_of_the_bundle(tiny_with: Export) -> None:
    model = dash_onnx.load(tiny_with(variants=("full",), max_length=24))
    assert model.manifest.model.max_length == 24
    steps = list(model.generate_step(range(2, 22), max_new_tokens=100, ignore_eos=True))
    assert steps[-1].finish_reason == "context"
    with pytest.raises(dash_onnx.DashError, match="24"):
        model.logits(range(25))


FACTS = ModelFacts("m", "llama", 2, 64, 96, 4, 2, 16, 384, 256)
MANY = 3000  # layers of that size that make a large model


@pytest.mark.parametrize(
    ("layers", "inner", "kind", "options", "size"),
    [
        (2, 128, "folder", {}, 64),
        (2, 96, "folder", {}, 32),
        (2, 128, "gguf", {}, 32),
        (2, 128, "gguf", {"requantize": True}, 64),
        (2, 128, "folder", {"block_size": 16}, 16),
        (2, 128, "gguf", {"block_size": 64}, 64),
        (MANY, 128, "folder", {}, 128),
        (MANY, 192, "folder", {}, 64),
        (MANY, 128, "folder", {"block_size": 64}, 64),
        (MANY, 128, "gguf", {}, 32),
    ],
)
def test_blocks_are_large_where_nothing_speaks_against_it(
    layers: int, inner: int, kind: str, options: dict[str, Any], size: int
) -> None:
    """Smaller ones for sizes that they do not divide, and for the integers of a GGUF file."""
    sizes = {"num_layers": layers, "intermediate_size": inner, "hidden_size": 128, "num_heads": 8}
    facts = ModelFacts(**{**vars(FACTS), **sizes})
    assert ExportOptions(**options).resolved(kind, spec_of(facts)).block_size == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"block_size": 32, "compensation_rank": r}, f"rank {r} must be 0")
            for r in (-32, 1, 33)
        ),
        ({"block_size": 8}, "block_size 8 is not a power of two of at least 16"),
        ({"block_size": -32}, "block_size -32 is not a power of two of at least 16"),
        ({"block_size": 256}, "block_size 256 does not divide the hidden size 64"),
        ({"block_size": 64}, "block_size 64 does not divide the intermediate size 96"),
        (
            {"compensation_rank": 33},
            "compensation_rank 33 must be 0 or a multiple of block_size 32",
        ),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(dash_onnx.DashError, match=message):
        ExportOptions(**options).resolved("folder", spec_of(FACTS))


@pytest.mark.parametrize(("device", "usual"), [("cpu", 4), ("cuda", 0)])
def test_products_are_fast_unless_told_otherwise(device: Any, usual: int) -> None:
    resolved = ExportOptions(device=device).resolved("folder", spec_of(FACTS))
    assert resolved.target.accuracy_level == usual
    told = ExportOptions(device=device, accuracy_level=1).resolved("folder", spec_of(FACTS))
    assert told.target.accuracy_level == 1


# Determinism


@pytest.fixture(scope="module")
def short_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and 24 tokens of context: generates its calibration text quickly."""
    folder = tmp_path_factory.mktemp("short") / "short"
    return save_tiny(folder, num_hidden_layers=2, max_position_embeddings=24)


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_calibration(
    short_folder: Path, export_tiny: Export
) -> None:
    found = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # the export must not depend on it, nor change it
        state = torch.get_rng_state()
        bundle = export_tiny(short_folder, variants=("int4",), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        facts = json.loads((bundle / "dash.json").read_text())
        del facts["export"]["seconds"], facts["export"]["peak_rss_bytes"], facts["costs"]
        found.append((facts, files_of(bundle)))
    first, again, other = found
    assert first == again
    assert first[0]["calibration"]["source"] == "self-generated"
    assert (first[0]["calibration"]["seed"], other[0]["calibration"]["seed"]) == (0, 1)
    assert first[0]["calibration"]["sha256"] != other[0]["calibration"]["sha256"]
    assert first[1].keys() == other[1].keys()
    data = "layers/01/int4.onnx.data"
    assert first[1][data] != other[1][data]


def test_a_bundle_loads_from_another_folder_and_names_none(
    bundle: Path, tiny_folder: Path, night: Path, tmp_path: Path
) -> None:
    for content in (*files_of(bundle).values(), (bundle / "dash.json").read_bytes()):
        for folder in (tiny_folder.parent, bundle.parent, night.parent):
            assert str(folder).encode() not in content
    moved = shutil.copytree(bundle, tmp_path / "other place" / "ünïcode")
    answers = [
        dash_onnx.load(folder).generate("the keeper", max_new_tokens=8, ignore_eos=True)
        for folder in (bundle, moved)
    ]
    assert answers[0] == answers[1]


# Configurations of Llama


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_biased(tmp_path_factory.mktemp("biased") / "biased")


def test_biases_give_the_logits_of_transformers(
    biased: Path, night: Path, export_tiny: Export
) -> None:
    model = dash_onnx.load(export_tiny(biased, calibration=(night,)))
    wanted = transformers_logits(biased)
    np.testing.assert_allclose(model.logits(IDS, policy="full"), wanted, atol=1e-4)
    int8, int4 = (
        np.linalg.norm(model.logits(IDS, policy=policy) - wanted) / np.linalg.norm(wanted)
        for policy in ("int8", "int4")
    )
    assert int8 < 0.05 and int8 < int4 < 1


def test_a_skipped_layer_writes_the_key_and_value_of_the_full_one_biases_included(
    biased: Path, night: Path, export_tiny: Export
) -> None:
    bundle = export_tiny(biased, calibration=(night,), variants=("full",))
    length, capacity = 5, 8
    inv_freq = np.asarray(Bundle(bundle).manifest.ropes[0].inv_freq)
    angles = np.arange(capacity)[:, None] * inv_freq
    cache = np.zeros((1, 2, capacity, 16), np.float32)
    feeds = {
        "hidden_in": np.random.default_rng(0).standard_normal((1, length, 64), np.float32),
        "past_key": cache,
        "past_value": cache,
        "seqlens_k": np.array([length - 1], np.int32),
        "query_seqlens": np.array([length], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "start": np.zeros(1, np.int64),
        "positions": np.arange(length)[None],
        "cos_cache": np.cos(angles).astype(np.float32),
        "sin_cache": np.sin(angles).astype(np.float32),
    }
    names = ["present_key", "present_value"]

    def written(action: str) -> list[np.ndarray]:
        session = create_session(bundle / f"layers/02/{action}.onnx", "cpu")
        own = {port.name: feeds[port.name] for port in session.get_inputs()}
        found: list[np.ndarray] = session.run(names, own)
        return found

    full, skip = written("full"), written("skip")
    for ours, wanted in zip(skip, full, strict=True):
        ours, wanted = ours[:, :, :length], wanted[:, :, :length]
        assert np.linalg.norm(ours - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("inner", "options", "forms"),
    [
        (4864, {}, "both"),
        (1536, {}, "grouped"),
        (1536, {"attention": "both"}, "both"),
        (4864, {"attention": "grouped"}, "grouped"),
        (4864, {"kv_cache": "int8"}, "grouped"),
        (4864, {"device": "cuda"}, "grouped"),
    ],
)
def test_only_large_layers_choose_between_two_attentions(
    inner: int, options: dict[str, Any], forms: str
) -> None:
    sizes = {"hidden_size": 896, "intermediate_size": inner, "num_heads": 14, "head_dim": 64}
    facts = ModelFacts(**{**vars(FACTS), **sizes})
    assert ExportOptions(**options).resolved("folder", spec_of(facts)).target.attention == forms


@pytest.mark.parametrize(
    ("options", "wide"),
    [
        ({}, True),
        ({"wide": False}, False),
        ({"variants": ("int8",)}, False),
        ({"variants": ("full", "int2")}, True),
        ({"device": "cuda"}, False),
    ],
)
def test_the_wide_form_is_exported_where_something_may_run_in_it(
    options: dict[str, Any], wide: bool
) -> None:
    resolved = ExportOptions(**options).resolved("folder", spec_of(FACTS))
    assert resolved.wide == wide
    assert ("wide" in resolved.forms) == wide
