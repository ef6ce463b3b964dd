from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY, save_biased, save_tiny, tiny_tokenizer
from onnx import numpy_helper
from transformers import AutoModelForCausalLM

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import Ports, embed_ports, head_ports, layer_ports
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.architectures import REGISTRY, architecture_of
from dash_onnx.exporters.graph_writer import GraphWriter
from dash_onnx.exporters.options import ExportOptions
from dash_onnx.exporters.sources import open_source
from dash_onnx.runtime.ort import create_session

SENTENCES = (
    "the keeper of the lighthouse counts the ships that pass in the night\n"
    "42 ships, and none of them slows down: the light is all they want\n"
    "he writes their names into a book; nobody has ever asked him for it\n"
)
IDS = np.arange(2, 42)
ALL = ("full", "int8", "int4")
SINKS = 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "night.txt"
    path.write_text(SENTENCES * 8)
    return path


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, text: Path, export_tiny: Callable[..., Path]) -> Path:
    """All variants, calibrated on `text`."""
    return export_tiny(tiny_folder, calibration=(text,))


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Bundle(bundle).manifest


def transformers_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
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
def reference(tiny_folder: Path, text: Path, manifest: Manifest) -> Reference:
    facts = manifest.calibration
    tokens = tiny_tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"]
    length = facts.tokens // facts.sequences
    starts = np.linspace(0, len(tokens) - length, facts.sequences).astype(int)
    ids = np.array([tokens[start : start + length] for start in starts], "<i8")
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
        states = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    for x, state in zip(inputs, states, strict=False):
        assert torch.equal(x, state)
    for hook in hooks:
        hook.remove()
    return Reference(model, torch.from_numpy(ids), torch.stack(inputs), torch.stack(outputs))


def relative_error(output: torch.Tensor, wanted: torch.Tensor) -> float:
    """Over all tokens but the sinks, `[sequences, length, D]`."""
    output, wanted = (h[:, SINKS:].double() for h in (output, wanted))
    return float((output - wanted).norm() / wanted.norm())


def test_calibration_facts_are_those_of_the_text(manifest: Manifest, reference: Reference) -> None:
    facts = manifest.calibration
    assert facts.source == "night.txt"
    assert facts.sink_tokens == SINKS
    assert facts.sequences >= 2
    assert facts.tokens == reference.ids.numel()


def test_scale_and_cosine_are_means_over_all_tokens_but_the_sinks(
    manifest: Manifest, reference: Reference
) -> None:
    for layer, x, y in zip(manifest.layers, reference.inputs, reference.outputs, strict=True):
        x, y = x[:, SINKS:].double(), y[:, SINKS:].double()
        assert layer.scale == pytest.approx(float((y.norm(dim=-1) / x.norm(dim=-1)).mean()), 1e-4)
        cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
        assert layer.cosine == pytest.approx(float(cosine), abs=1e-5)


@pytest.fixture(scope="module")
def uncompensated(tiny_folder: Path, text: Path, export_tiny: Callable[..., Path]) -> Path:
    return export_tiny(tiny_folder, calibration=(text,), compensation_rank=0)


def test_the_error_of_skip_without_compensation_is_that_of_the_scaled_input(
    uncompensated: Path, reference: Reference
) -> None:
    manifest = Bundle(uncompensated).manifest
    assert manifest.compensation_rank == 0
    for layer, x, y in zip(manifest.layers, reference.inputs, reference.outputs, strict=True):
        assert layer.relative_error["skip"] == pytest.approx(
            relative_error(layer.scale * x, y), rel=1e-4
        )


def test_the_error_of_skip_is_that_of_the_scaled_input_and_the_stored_low_rank_map(
    bundle: Path, manifest: Manifest, reference: Reference
) -> None:
    rank = manifest.compensation_rank
    assert rank == 64
    for index, facts in enumerate(manifest.layers):
        x, y = reference.inputs[index], reference.outputs[index]
        path = bundle / f"layers/{index:02d}/skip.onnx"
        reduce = stored_weight(path, "skip_proj", x.shape[-1])[-rank:]
        expand = stored_weight(path, "expand_proj", rank)
        with torch.inference_mode():
            normed = reference.model.model.layers[index].input_layernorm(x)
        output = facts.scale * x + normed @ reduce.T @ expand.T
        assert facts.relative_error["skip"] == pytest.approx(relative_error(output, y), rel=1e-3)


def test_the_compensation_makes_the_error_of_skip_much_smaller(
    manifest: Manifest, uncompensated: Path
) -> None:
    for layer, plain in zip(manifest.layers, Bundle(uncompensated).manifest.layers, strict=True):
        assert layer.scale == plain.scale
        assert layer.relative_error["skip"] < 0.8 * plain.relative_error["skip"]


def test_a_compensation_of_a_lower_rank_is_between(
    tiny_folder: Path,
    text: Path,
    manifest: Manifest,
    uncompensated: Path,
    export_tiny: Callable[..., Path],
) -> None:
    some = Bundle(export_tiny(tiny_folder, calibration=(text,), compensation_rank=32)).manifest
    assert some.compensation_rank == 32
    none = Bundle(uncompensated).manifest
    for layers in zip(manifest.layers, some.layers, none.layers, strict=True):
        full, part, plain = (layer.relative_error["skip"] for layer in layers)
        assert full < part < plain


@pytest.mark.parametrize("rank", [-32, -1, 1, 33])
def test_a_compensation_rank_that_no_block_divides_is_refused(
    rank: int, tiny_folder: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    with pytest.raises(dash_onnx.DashError, match=f"--compensation-rank {rank} must be 0 or"):
        export_tiny(tiny_folder, calibration=(text,), compensation_rank=rank)


def stored_weight(path: Path, name: str, columns: int, block: int = 32) -> torch.Tensor:
    """A MatMulNBits weight `[N, K]`, dequantized as ORT's documentation of the operator says."""
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    values, scales = stored[f"{name}.values"], stored[f"{name}.scales"]
    rows, blocks = scales.shape
    zeros = np.full((rows, blocks), 128.0)
    if values.shape[-1] == block // 2:  # two 4-bit values in a byte, the low half first
        values = np.stack([values & 0xF, values >> 4], -1).reshape(rows, blocks, block)
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


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_error_of_a_precision_is_that_of_its_stored_weights(
    precision: str, bundle: Path, manifest: Manifest, reference: Reference
) -> None:
    decoder = reference.model.model
    length = reference.ids.shape[1]
    positions = torch.arange(length)[None]
    mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
    for index, facts in enumerate(manifest.layers):
        x, y = reference.inputs[index], reference.outputs[index]
        layer = with_stored_weights(
            decoder.layers[index], bundle / f"layers/{index:02d}/{precision}.onnx"
        )
        with torch.inference_mode():
            rotary = decoder.rotary_emb(x, positions)
            output = layer(x, attention_mask=mask, position_embeddings=rotary)
        assert facts.relative_error[precision] == pytest.approx(relative_error(output, y), rel=1e-3)


def test_int8_weights_are_the_nearest_of_255_levels(bundle: Path, reference: Reference) -> None:
    down = reference.model.model.layers[1].mlp.down_proj.weight.detach()
    stored = stored_weight(bundle / "layers/01/int8.onnx", "down_proj", down.shape[1])
    blocks = down.reshape(down.shape[0], -1, 32)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    assert ((stored.reshape(blocks.shape) - blocks).abs() <= step * 0.5001).all()


def test_errors_are_ordered_as_the_precisions_are(manifest: Manifest) -> None:
    for layer in manifest.layers:
        errors = layer.relative_error
        assert set(errors) == {"int8", "int4", "skip"}
        assert 0 < errors["int8"] < errors["int4"] < errors["skip"]


def test_sizes_in_the_manifest_are_those_on_disk(bundle: Path, manifest: Manifest) -> None:
    for index, layer in enumerate(manifest.layers):
        folder = bundle / f"layers/{index:02d}"
        assert set(layer.bytes) == {*ALL, "skip"}
        for action, size in layer.bytes.items():
            assert size == sum(p.stat().st_size for p in folder.glob(f"{action}.onnx*")) > 0
        assert layer.bytes["full"] > layer.bytes["int8"] > layer.bytes["int4"]


def test_the_manifest_lists_every_file_with_its_checksum(bundle: Path, manifest: Manifest) -> None:
    files = files_of(bundle)
    del files["dash.json"]
    listed = {name: (facts.bytes, facts.sha256) for name, facts in manifest.files.items()}
    assert listed == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()
    }


def test_model_facts_are_those_of_the_config(manifest: Manifest) -> None:
    facts = manifest.model
    assert (facts.name, facts.architecture) == ("tiny", "llama")
    assert facts.num_layers == len(manifest.layers) == TINY["num_hidden_layers"]
    assert facts.hidden_size == TINY["hidden_size"]
    assert facts.intermediate_size == TINY["intermediate_size"]
    assert (facts.num_heads, facts.num_kv_heads, facts.head_dim) == (4, 2, 16)
    assert facts.vocab_size == TINY["vocab_size"]
    assert facts.max_length == TINY["max_position_embeddings"]
    np.testing.assert_allclose(manifest.ropes[0].inv_freq, 1e4 ** (-np.arange(8) / 8), rtol=1e-6)
    assert manifest.variants == ALL
    assert manifest.heads == {"full": "full", "int8": "int8", "int4": "int8", "skip": "int8"}
    assert manifest.exported_heads == ALL
    assert manifest.export.source == "folder:tiny"
    assert manifest.export.fp32_kept == ()
    assert manifest.export.peak_rss_bytes > 50e6
    assert {"torch", "onnx", "onnxruntime", "dash-onnx"} <= set(manifest.export.tools)


# Graphs


def test_every_graph_passes_the_onnx_checker(bundle: Path) -> None:
    graphs = sorted(bundle.rglob("*.onnx"))
    assert len(graphs) == 1 + 3 + 4 * 4
    for path in graphs:
        onnx.checker.check_model(str(path))


def ports_of(bundle: Path, manifest: Manifest) -> Iterator[tuple[Path, Ports]]:
    yield bundle / "embed.onnx", embed_ports(manifest.dims)
    for path in bundle.glob("head/*.onnx"):
        yield path, head_ports(manifest.dims)
    for path in bundle.glob("layers/*/*.onnx"):
        yield path, layer_ports(manifest.dims)


def test_every_graph_declares_the_ports_of_the_contract(bundle: Path, manifest: Manifest) -> None:
    types = {"float32": 1, "float16": 10, "int32": 6, "int64": 7}
    for path, ports in ports_of(bundle, manifest):
        graph = onnx.load(path, load_external_data=False).graph
        for found, wanted in ((graph.input, ports.inputs), (graph.output, ports.outputs)):
            facts = [
                (
                    value.name,
                    value.type.tensor_type.elem_type,
                    tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
                )
                for value in found
            ]
            assert facts == [(p.name, types[p.dtype], p.shape) for p in wanted], path


def test_weights_lie_in_the_one_file_next_to_their_graph(bundle: Path) -> None:
    for path in bundle.rglob("*.onnx"):
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        locations = {
            entry.value
            for tensor in tensors
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert locations <= {f"{path.name}.data"}
        inline = sum(len(t.raw_data) for t in tensors if not t.external_data)
        assert inline < 16 * 1024


# Choices


@pytest.fixture(scope="module")
def int4_only(tiny_folder: Path, text: Path, export_tiny: Callable[..., Path]) -> Path:
    return export_tiny(tiny_folder, calibration=(text,), variants=("int4",))


def test_a_subset_of_variants_leaves_no_other_graph(int4_only: Path) -> None:
    names = {path.relative_to(int4_only).as_posix() for path in int4_only.rglob("*.onnx*")}
    wanted = {"embed.onnx", "head/int4.onnx"}
    wanted |= {f"layers/{i:02d}/{action}.onnx" for i in range(4) for action in ("int4", "skip")}
    assert names == wanted | {f"{name}.data" for name in wanted}
    manifest = Bundle(int4_only).manifest
    assert manifest.variants == ("int4",)
    assert manifest.actions == ("int4", "skip")
    assert manifest.heads == {"int4": "int4", "skip": "int4"}
    for layer in manifest.layers:
        assert set(layer.bytes) == set(layer.relative_error) == {"int4", "skip"}


def test_a_subset_of_variants_has_the_same_graphs_as_all_of_them(
    tiny_folder: Path, text: Path, bundle: Path, int4_only: Path, export_tiny: Callable[..., Path]
) -> None:
    two = export_tiny(tiny_folder, calibration=(text,), variants=("int8", "int4"))
    every, some = files_of(bundle), files_of(two)
    assert all(every[name] == some[name] for name in some if name != "dash.json")
    # Where there is only INT4 prompts run in it, so that their first tokens count in GPTQ.
    alone = files_of(int4_only)
    name = "layers/01/int4.onnx.data"
    assert alone[name] != every[name] and alone["embed.onnx"] == every["embed.onnx"]


def test_a_subset_of_variants_generates(int4_only: Path) -> None:
    model = dash_onnx.load(int4_only)
    logits = model.logits(IDS, policy="static:int4,skip,int4,int4")
    assert logits.shape == (len(IDS), TINY["vocab_size"])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("variants", "head_of_int4"),
    [(("full",), None), (("int8", "int4"), "int8"), (("full", "int4"), "int4")],
)
def test_int4_and_mixed_paths_take_the_int8_head_mixed_ones_else_the_highest(
    variants: tuple,
    head_of_int4: str | None,
    tiny_folder: Path,
    text: Path,
    export_tiny: Callable[..., Path],
) -> None:
    manifest = Bundle(export_tiny(tiny_folder, calibration=(text,), variants=variants)).manifest
    wanted = {**{v: v for v in variants}, "skip": variants[0]}
    assert manifest.heads == (wanted | {"int4": head_of_int4} if head_of_int4 else wanted)
    assert manifest.exported_heads == variants


def test_max_length_is_the_context_of_the_bundle(
    tiny_folder: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    model = dash_onnx.load(
        export_tiny(tiny_folder, calibration=(text,), variants=("full",), max_length=24)
    )
    assert model.manifest.model.max_length == 24
    steps = list(model.generate_step(range(2, 22), max_new_tokens=100, ignore_eos=True))
    assert steps[-1].finish_reason == "context"
    with pytest.raises(dash_onnx.DashError, match="24"):
        model.logits(range(25))


# Determinism


@pytest.fixture(scope="module")
def short_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and 24 tokens of context: generates its calibration text quickly."""
    folder = tmp_path_factory.mktemp("short") / "short"
    return save_tiny(folder, num_hidden_layers=2, max_position_embeddings=24)


@pytest.fixture(scope="module")
def seeded(
    short_folder: Path, export_tiny: Callable[..., Path]
) -> dict[str, tuple[Manifest, dict[str, bytes]]]:
    """Manifest and files of exports with seeds 0, 0 again, and 1."""
    found = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        torch.manual_seed(len(found))  # the export must not depend on it
        bundle = export_tiny(short_folder, variants=("int4",), seed=seed)
        files = files_of(bundle)
        del files["dash.json"]
        found[name] = (Bundle(bundle).manifest, files)
    return found


def test_the_same_seed_gives_the_same_bytes(seeded: dict) -> None:
    (first, files), (again, same) = seeded["first"], seeded["again"]
    assert files == same
    facts = [json.loads(manifest.to_text()) for manifest in (first, again)]
    for fact in facts:
        del fact["export"]["seconds"], fact["export"]["peak_rss_bytes"], fact["costs"]
    assert facts[0] == facts[1]
    assert first.calibration.source == "self-generated"
    assert first.calibration.seed == 0


def test_another_seed_gives_another_calibration(seeded: dict) -> None:
    (first, files), (other, others) = seeded["first"], seeded["other"]
    assert other.calibration.seed == 1
    assert other.calibration.sha256 != first.calibration.sha256
    assert [layer.scale for layer in other.layers] != [layer.scale for layer in first.layers]
    data = "layers/01/int4.onnx.data"
    assert files.keys() == others.keys()
    assert files[data] != others[data]


def test_an_export_leaves_the_random_state_alone(
    short_folder: Path, export_tiny: Callable[..., Path]
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    export_tiny(short_folder, variants=("full",))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bundle_loads_from_another_folder(bundle: Path, tmp_path: Path) -> None:
    first = shutil.copytree(bundle, tmp_path / "first")
    wanted = dash_onnx.load(bundle).generate("the keeper", max_new_tokens=8, ignore_eos=True)
    moved = shutil.move(first, tmp_path / "other place" / "ünïcode")
    assert not first.exists()
    model = dash_onnx.load(moved)
    model.preload()
    assert model.generate("the keeper", max_new_tokens=8, ignore_eos=True) == wanted


def test_a_bundle_names_no_folder_of_this_machine(
    bundle: Path, tiny_folder: Path, text: Path
) -> None:
    for name, content in files_of(bundle).items():
        for folder in (tiny_folder.parent, bundle.parent, text.parent):
            assert str(folder).encode() not in content, name


# Configurations of Llama


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_biased(tmp_path_factory.mktemp("biased") / "biased")


CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "one kv head": {"num_key_value_heads": 1},
    "no gqa": {"num_key_value_heads": 4},
    "epsilon": {"rms_norm_eps": 1e-2},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}


def test_biases_give_the_logits_of_transformers(
    biased: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    model = dash_onnx.load(export_tiny(biased, calibration=(text,)))
    with torch.inference_mode():
        wanted = transformers_model(biased)(torch.from_numpy(IDS)[None]).logits[0].numpy()
    np.testing.assert_allclose(model.logits(IDS, policy="full"), wanted, atol=1e-4)
    errors = {
        policy: np.linalg.norm(model.logits(IDS, policy=policy) - wanted) / np.linalg.norm(wanted)
        for policy in ("int8", "int4")
    }
    assert errors["int8"] < 0.05
    assert errors["int8"] < errors["int4"] < 1


def test_a_skipped_layer_writes_the_key_and_value_of_the_full_one_biases_included(
    biased: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = export_tiny(biased, calibration=(text,), variants=("full",))
    manifest = Bundle(bundle).manifest
    rng = np.random.default_rng(0)
    length, capacity = 5, 8
    angles = np.arange(capacity)[:, None] * np.asarray(manifest.ropes[0].inv_freq)
    cache = np.zeros((1, 2, capacity, 16), np.float32)
    feeds = {
        "hidden_in": rng.standard_normal((1, length, 64)).astype(np.float32),
        "past_key": cache,
        "past_value": cache,
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "start": np.zeros(1, np.int64),
        "cos_cache": np.cos(angles).astype(np.float32),
        "sin_cache": np.sin(angles).astype(np.float32),
    }
    names = ["present_key", "present_value"]
    full, skip = (
        create_session(bundle / f"layers/02/{action}.onnx", "cpu").run(names, feeds)
        for action in ("full", "skip")
    )
    for ours, wanted in zip(skip, full, strict=True):
        ours, wanted = ours[:, :, :length], wanted[:, :, :length]
        assert np.linalg.norm(ours - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_gives_the_logits_of_transformers(
    name: str, tmp_path: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=2, **CONFIGS[name])
    model = dash_onnx.load(export_tiny(folder, calibration=(text,), variants=("full",)))
    with torch.inference_mode():
        wanted = transformers_model(folder)(torch.from_numpy(IDS)[None]).logits[0].numpy()
    np.testing.assert_allclose(model.logits(IDS), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("inner", "kind", "options", "size"),
    [
        (128, "folder", {}, 64),
        (96, "folder", {}, 32),
        (128, "gguf", {}, 32),
        (128, "gguf", {"requantize": True}, 64),
        (128, "folder", {"block_size": 16}, 16),
        (128, "gguf", {"block_size": 64}, 64),
    ],
)
def test_blocks_are_large_where_nothing_speaks_against_it(
    inner: int, kind: Any, options: dict[str, Any], size: int, tmp_path: Path
) -> None:
    """Smaller ones for sizes that 64 does not divide, and for the integers of a GGUF file."""
    source = open_source(str(save_tiny(tmp_path / "tiny", intermediate_size=inner)), REGISTRY)
    source = dataclasses.replace(source, kind=kind)
    architecture = architecture_of(source.config)
    assert GraphWriter(source, architecture, ExportOptions(**options)).target.block_size == size
