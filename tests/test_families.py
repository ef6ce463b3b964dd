"""Every family against transformers: logits, K/V, and the training process against the runtime."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import logits_of, reference_logits, save_tiny
from families import (
    CASES,
    LAYERS,
    PROMPT,
    WINDOW,
    Pair,
    attending_plainly,
    config_of,
    random_ids,
    reference_of,
    save_random,
    write_text,
)
from test_environment import case_of, one_hot, plain_kl, random_choice, recorded, runtime_logits
from test_fused import Client
from transformers import AutoConfig, LlamaForCausalLM

import dash_onnx
from dash_onnx.core.actions import WIDE
from dash_onnx.core.block import ATTENTIONS
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import EMBED_PATH, head_path, layer_path
from dash_onnx.core.errors import ContextLengthError, UnsupportedError
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures import REGISTRY, architecture_of
from dash_onnx.exporters.architectures.sparse import Sparse
from dash_onnx.exporters.calibration.hidden_states import HiddenStateFile
from dash_onnx.exporters.calibration.reference import streamed_model
from dash_onnx.exporters.calibration.runner import Runner
from dash_onnx.exporters.calibration.statistics import relative_error
from dash_onnx.exporters.calibration.tokens import SINK_TOKENS
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.exporters.fused import FuseOptions, fuse
from dash_onnx.exporters.graphs import build_embed, build_head, build_layer, captured_inputs
from dash_onnx.exporters.sources import open_source
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.ort import create_session

INT8_ERROR = 0.06
"""Of the logits. INT8 has 127 levels for the largest of a block's 32 weights, which is about 2.3
standard deviations: rounding errs by 2.3 / 127 / sqrt(12) = 0.5 % of them, and so does a product.
The 4 products of each layer and the head are 13 in a row; their errors add up like a random walk
to 1.9 %. The bound leaves a factor of three for what softmax, norms and gates make of them."""

WIDE_ERROR = 0.06
"""Of a layer's output. Weights and activations have 127 levels for the largest of some 100, about
2.5 standard deviations: each rounding errs by 0.6 %, a product of both by 0.8 %. The bound leaves a
factor of seven for norms and gates, and is far below the 0.2 of products that saturate."""

INT4_ERROR = 0.2
"""Of the K/V of a skipped layer, one INT4 product: 15 steps over a block's range of about 4
standard deviations err by 4 / 15 / sqrt(12) = 8 %; the bound leaves a factor of 2.5 for norms."""


QUICK = [
    *list(CASES)[:16],
    *("bitnet", "granite_swa", "ministral3", "lfm2", "qwen3_5", "qwen2_moe", "lfm2_moe", "gemma4"),
]
"""Cases of every kind of layer that the runtime treats differently; the others are slow tests."""


@pytest.fixture(
    scope="module",
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES
    ],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.build(CASES[request.param], tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_graphs_in_full_precision_give_the_logits_of_transformers(
    name: str, tmp_path: Path
) -> None:
    case, ids = CASES[name], random_ids(60)
    source = open_source(str(save_random(tmp_path / "source", case)), REGISTRY)
    family, target = REGISTRY[case.family], Target("cpu", "float32", 32, 0)
    spec = family.describe("", source.config, case.max_length)
    runner = Runner(spec, "cpu")
    table, per_layer = (part(source.weights, spec) for part in (family.embedding, family.per_layer))
    build_embed(tmp_path, table, spec, target, per_layer)
    states = runner.embed(tmp_path / EMBED_PATH, ids[None])
    for index in range(LAYERS):
        layer = family.layer(source.weights, index, spec)
        build_layer(tmp_path, index, layer, spec, target, "full", {})
        states = runner.layer(index, tmp_path / layer_path(index, "full"), states)
    build_head(tmp_path, family.head(source.weights, spec), spec, target, "full", {})
    head = create_session(tmp_path / head_path("full"), "cpu")
    (logits,) = head.run(["logits"], {"hidden": states})
    wanted = reference_of(tmp_path / "source")(torch.from_numpy(ids)[None]).logits
    assert wanted.std() > 0.3  # the comparison means something
    torch.testing.assert_close(torch.from_numpy(logits), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "phi", "ministral3", "hunyuan_v1_dense", "qwen3_5"]
)
def test_an_offset_of_keys_in_the_cache_changes_nothing(name: str, tmp_path: Path) -> None:
    """Beyond what INT8 rounds; with and without norms, before the rotation and after it."""
    case, ids = CASES[name], random_ids(60)
    source = open_source(str(save_random(tmp_path / "source", case)), REGISTRY)
    family, target = REGISTRY[case.family], Target("cpu", "float32", 32, 0)
    spec = family.describe("", source.config, case.max_length)
    index = next(n for n in range(LAYERS) if spec.mixer_of(n) == "attention")
    runner = Runner(spec, "cpu")
    build_embed(tmp_path, family.embedding(source.weights, spec), spec, target, None)
    states = runner.embed(tmp_path / EMBED_PATH, ids[None])
    layer, path = family.layer(source.weights, index, spec), tmp_path / layer_path(index, "full")
    build_layer(tmp_path, index, layer, spec, target, "full", {})
    wanted = runner.layer(index, path, states)
    kv = runner.kv_quantization(index, path, states, 8, offset=False)
    random = np.random.default_rng(0).uniform(-40, 40, kv.key_scale.shape)
    moved = replace(
        kv, key_scale=2 * kv.key_scale, key_offset=(random * kv.key_scale).astype(np.float32)
    )
    eight = replace(target, kv_cache="int8")
    errors = []
    for rounding in (kv, moved):
        build_layer(tmp_path, index, layer, spec, eight, "full", {}, rounding)
        errors.append(relative_error(runner.layer(index, path, states), wanted))
    assert 0 < errors[1] < 4 * errors[0]  # steps are twice as large


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_keys_have_no_offset_where_softmax_sees_more_than_scores(name: str, tmp_path: Path) -> None:
    """A softcap, or sinks."""
    case = CASES[name]
    options = ExportOptions(
        variants=("full",),
        wide=False,
        kv_cache="int4",
        max_length=case.max_length,
        calibration=(write_text(tmp_path / "text.txt"),),
    )
    export(str(save_random(tmp_path / "source", case)), tmp_path / "out", options)
    graph = onnx.load(tmp_path / "out" / layer_path(0, "full"), load_external_data=False).graph
    names = {tensor.name for tensor in graph.initializer}
    assert "k_scale" in names and "k_offset" not in names


def test_full_layers_give_the_logits_of_transformers(pair: Pair) -> None:
    wanted = pair.wanted(random_ids(60))
    assert wanted.std() > 0.3  # the comparison means something
    assert pair.full_difference() < 1e-4


def test_a_prompt_in_chunks_gives_them_too(pair: Pair) -> None:
    ids, path = random_ids(max(60, pair.case.lengths[0])), ("full",) * LAYERS
    # Chunks begin inside and beyond windows.
    got = pair.model.new_sequence().prefill(ids, path, "full", every=True, chunk=17)
    np.testing.assert_allclose(got, pair.wanted(ids), atol=1e-4)


def test_tokens_after_forgotten_ones_and_rows_of_a_batch_give_them_too(pair: Pair) -> None:
    assert pair.returned_difference() < 1e-4
    assert pair.batch_difference(pair.model) < 1e-4


def test_attention_from_plain_operators_gives_them(pair: Pair, tmp_path: Path) -> None:
    length = max(60, pair.case.lengths[0])
    ids, path = random_ids(length), ("full",) * LAYERS
    wanted = pair.wanted(ids)
    with attending_plainly(pair.bundle, tmp_path / "copy") as model:
        # Chunks begin inside and beyond windows.
        got = model.new_sequence().prefill(ids, path, "full", every=True, chunk=17)
        np.testing.assert_allclose(got, wanted, atol=1e-4)
        got = logits_of(model.score(ids, prompt_tokens=PROMPT, policy="full"))
        np.testing.assert_allclose(got, wanted[PROMPT:], atol=1e-4)


def test_attention_from_plain_operators_takes_rows_of_different_lengths(
    pair: Pair, tmp_path: Path
) -> None:
    with attending_plainly(pair.bundle, tmp_path / "copy") as model:
        assert pair.batch_difference(model) < 1e-4


def test_the_wide_form_loses_about_as_little_as_int8(pair: Pair, tmp_path: Path) -> None:
    source = open_source(str(pair.bundle.parent / "source"), REGISTRY)
    family, manifest = REGISTRY[pair.case.family], Bundle(pair.bundle).manifest
    if manifest.block.experts is not None:
        pytest.skip("experts have no wide form")
    spec = family.describe("", source.config, pair.case.max_length)
    runner, ids = Runner(spec, "cpu"), random_ids(60)[None]
    states = runner.embed(pair.bundle / "embed.onnx", ids)
    for index in range(LAYERS):
        layer = family.layer(source.weights, index, spec)
        assert layer.down is not None
        sizes = torch.linspace(1, 2, layer.down.in_features)
        for hessians in ({}, {"down_proj": torch.diag(sizes)}):  # one group of channels, and two
            build_layer(tmp_path, index, layer, spec, manifest.target, WIDE, hessians)
            got = runner.layer(index, tmp_path / layer_path(index, WIDE), states)
            wanted = runner.layer(index, pair.bundle / layer_path(index, "full"), states)
            assert 1e-4 < np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < WIDE_ERROR
        states = wanted


def test_every_weight_of_a_layer_is_read(pair: Pair) -> None:
    """A weight that is not read would be one of another model."""
    source = open_source(str(pair.bundle.parent / "source"), REGISTRY)
    family = REGISTRY[pair.case.family]
    spec = family.describe("", source.config, pair.case.max_length)
    for index in range(LAYERS):
        family.layer(source.weights, index, spec)
        if spec.attention[index].source is None:
            assert source.weights.unread(f"{family.names.layers}.{index}.") == []


def test_int8_layers_give_them_within_the_rounding_of_their_weights(pair: Pair) -> None:
    assert 0.002 < pair.int8_error() < INT8_ERROR


def test_kv_of_skipped_and_of_other_tokens_are_those_of_transformers(pair: Pair) -> None:
    full, skipped = pair.kv_errors()
    assert full < 1e-5
    assert 0.002 < skipped < INT4_ERROR


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_training_computes_what_the_runtime_computes(pair: Pair, dense: bool) -> None:
    case = case_of(pair.bundle, PROMPT)
    length = max(56, pair.case.lengths[0])  # beyond the window
    ids = torch.from_numpy(random_ids(length))[None]
    choice = random_choice(case, ids)
    if pair.model.manifest.block.experts is not None:
        # QMoE rounds what INT8 experts read, whatever the accuracy level.
        choice[choice == case.actions.index("int8")] = case.actions.index("int4")
    with torch.no_grad():
        final = case.env.run(ids, recorded(one_hot(choice, case)), dense).final
        ours = case.env.model.logits(final)[0, PROMPT:].numpy()
    np.testing.assert_allclose(ours, runtime_logits(case, ids[0], choice[0]), atol=1e-3)


def test_hessians_are_those_of_what_the_linear_layers_of_transformers_read(
    pair: Pair, tmp_path: Path
) -> None:
    source = open_source(str(pair.bundle.parent / "source"), REGISTRY)
    family = REGISTRY[pair.case.family]
    ids = random_ids(max(50, pair.case.lengths[0]))
    read: dict[tuple[int, str], torch.Tensor] = {}
    mixers = pair.model.manifest.mixers or ("attention",) * LAYERS
    for index, module in enumerate(pair.reference.get_decoder().layers):
        attends = mixers[index] in ATTENTIONS
        names = family.names if attends else family.recurrent_names
        projections = [
            ("qkv_proj" if attends else "in_proj", names.qkv[0]),
            ("o_proj", names.output),
            ("gate_up_proj", names.gate_up[0]),
            ("down_proj", names.down),
        ]
        if hasattr(module, "per_layer_input_gate"):
            projections.append(("per_layer_gate", "per_layer_input_gate"))
            projections.append(("per_layer_output", "per_layer_projection"))
        mixture = family.mixture if isinstance(family, Sparse) else ""
        if hasattr(module.get_submodule(mixture), "experts"):
            shared = family.shared and [family.shared.gate_up[0], family.shared.down]
            last = zip(("gate_up_proj", "down_proj"), shared or (), strict=False)
            projections = [*projections[:2], *last, ("experts_up", f"{mixture}.{family.router}")]
        for ours, theirs in projections:
            module.get_submodule(theirs).register_forward_pre_hook(
                lambda _, arguments, key=(index, ours): read.__setitem__(
                    key, arguments[0].flatten(0, -2)
                )
            )
    pair.wanted(ids)
    spec = family.describe("", source.config, pair.case.max_length)
    runner = Runner(spec, "cpu")
    hidden = [HiddenStateFile(tmp_path / f"{layer}.npy") for layer in range(LAYERS + 1)]
    sequences = np.stack([ids[::-1], ids])  # the first is held out
    hidden[0].write(2, [runner.embed(pair.bundle / "embed.onnx", sequences)])
    for index in range(LAYERS):
        inputs = captured_inputs(family.layer(source.weights, index, spec), spec, 32, ("int4",))
        path = pair.bundle / layer_path(index, "full")
        states = hidden[index : index + 2]
        sinks = dict.fromkeys(inputs, 0.25)
        hessians = runner.layer_with_hessians(index, path, *states, inputs, sinks, held_out=1)
        for name, found in hessians.items():
            x = read.pop((index, name)).clone()
            x[:SINK_TOKENS] *= 0.5
            torch.testing.assert_close(found, x.T @ x, rtol=1e-3, atol=1e-2)
    assert not read


def test_calibration_reads_the_model_that_is_exported(pair: Pair) -> None:
    source, ids = open_source(str(pair.bundle.parent / "source"), REGISTRY), random_ids(50)
    logits = reference_logits(streamed_model(source), ids)
    np.testing.assert_allclose(logits, pair.wanted(ids), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_kl_goes_through_the_softcap(pair: Pair) -> None:
    env, generator = case_of(pair.bundle, PROMPT).env, torch.Generator().manual_seed(3)
    reference, final = (env.model.final(torch.randn(9, 64, generator=generator)) for _ in "ab")
    final.requires_grad_()
    plain = plain_kl(env, reference, final, env.model.head)
    torch.testing.assert_close(env.kl(reference, final), plain, atol=1e-5, rtol=1e-4)
    (wanted,) = torch.autograd.grad(plain.sum(), final)
    (ours,) = torch.autograd.grad(env.kl(reference, final).sum(), final)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        *("gemma3", "smollm3", "olmo2", "gpt_neox", "hunyuan_v1_dense", "qwen2_moe", "afmoe"),
        pytest.param("ministral3", marks=pytest.mark.slow),
    ],
)
def test_the_fused_graph_computes_what_the_graphs_of_the_bundle_compute(
    name: str, tmp_path: Path
) -> None:
    pair = Pair.build(CASES[name], tmp_path)
    options = FuseOptions("optimum", "static:int8,skip,skip")
    fuse(Bundle(pair.bundle), tmp_path / "fused", options, overwrite=False)
    client, sequence = Client(tmp_path / "fused", pair.model.manifest), pair.model.new_sequence()
    path, ids = ("int8", "skip", "skip"), random_ids(WINDOW + 8)
    head = pair.model.manifest.heads["skip"]
    ours = sequence.prefill(ids[:3], path, head)
    np.testing.assert_allclose(client(ids[:3].tolist())[0][-1], ours, atol=2e-4)
    for token in ids[3:].tolist():
        ours = sequence.forward(token, FixedPath(path, head))[0]
        np.testing.assert_allclose(client([token])[0][-1], ours, atol=2e-4)
    for layer in range(LAYERS):  # nothing ever reads the K/V of a layer that every token skips
        for kind, buffers in (("key", sequence.kv.keys), ("value", sequence.kv.values)):
            theirs = client.past[f"past_key_values.{layer}.{kind}"][0]
            ours = buffers[layer].array[0, :, : sequence.length]
            np.testing.assert_allclose(theirs, ours, atol=2e-4)


# RoPE that depends on the length


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize("length", [None, 512])
def test_dynamic_rope_is_that_of_the_longest_context(
    length: int | None, tmp_path: Path, night: Path
) -> None:
    source = save_tiny(tmp_path / "m", rope_parameters=DYNAMIC, num_hidden_layers=2)
    options = ExportOptions(variants=("full",), max_length=length, calibration=(night,))
    manifest = export(str(source), tmp_path / "out", options)
    assert manifest.model.max_length == (length or 256)
    ids = random_ids(manifest.model.max_length)
    reference = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    wanted = reference_logits(reference, ids)
    got = dash_onnx.load(tmp_path / "out").logits(ids, policy="full")
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rope", "longest"),
    [
        ("llama", DYNAMIC, 1024),
        ("llama", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, 512),
        ("llama", {**YARN, "original_max_position_embeddings": 256}, 1024),
        ("llama", {**YARN, "original_max_position_embeddings": 64}, 256),
        ("phi3", None, 256),
        ("qwen2", None, 256),
    ],
)
def test_a_context_beyond_what_the_rope_allows_is_refused(
    name: str, rope: dict[str, object] | None, longest: int
) -> None:
    length = longest + 1
    change = {"rope_parameters": rope} if rope else CASES[name].config
    config = config_of(name, change)
    assert architecture_of(config).describe("m", config, longest).facts.max_length == longest
    with pytest.raises(ContextLengthError, match=f"--max-length {length} is outside 1..{longest},"):
        architecture_of(config).describe("m", config, length)


def test_longrope_takes_the_short_form_unless_a_longer_context_is_asked_for() -> None:
    config = config_of("phi3", CASES["phi3 long"].config)
    family = architecture_of(config)
    specs = {asked: family.describe("m", config, asked) for asked in (None, 64, 65, 256)}
    assert [spec.facts.max_length for spec in specs.values()] == [64, 64, 65, 256]
    short, long = specs[64].ropes[0], specs[65].ropes[0]
    assert specs[None].ropes[0] == short and specs[256].ropes[0] == long
    assert short.inv_freq[1] > 1.5 * long.inv_freq[1]


def test_a_window_as_long_as_the_context_is_none() -> None:
    config = config_of("mistral", CASES["mistral"].config)
    family = architecture_of(config)
    windows = [family.describe("m", config, n).attention[0].window for n in (WINDOW, WINDOW + 1)]
    assert windows == [None, WINDOW]


def test_blocks_divide_the_width_of_values() -> None:
    config = config_of("qwen3_5_text", {**CASES["qwen3_5"].config, "intermediate_size": 128})
    spec = architecture_of(config).describe("m", config, None)
    assert spec.recurrence is not None and spec.recurrence.value_width == 96
    assert ExportOptions().resolved("folder", spec).block_size == 32
    with pytest.raises(UnsupportedError, match="64 does not divide the width of values 96"):
        ExportOptions(block_size=64).resolved("folder", spec)


# Refusals


MIXTURES = ("phimoe", "dbrx", "jetmoe", "deepseek_v3")
HYBRIDS = ("jamba", "mamba", "mamba2", "zamba2", "bamba", "nemotron_h", "kimi_linear")
IMAGES = ("clip", "dinov2", "siglip", "vit")
SOUNDS = ("musicgen", "qwen2_audio", "voxtral", "wav2vec2", "whisper")


@pytest.mark.parametrize("kind", [*MIXTURES, *HYBRIDS, *IMAGES, *SOUNDS])
def test_what_has_no_exporter_is_refused_by_its_type_with_a_list_of_what_has_one(
    kind: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        open_source(str(tmp_path), REGISTRY)
    message = str(caught.value)
    assert message == f"architecture {kind!r} is not supported; supported: {', '.join(REGISTRY)}"


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts", "n_routed_experts"])
def test_experts_in_the_config_of_a_dense_family_are_refused(key: str) -> None:
    config = config_of("llama", {key: 8})
    with pytest.raises(UnsupportedError, match=f"{key} is 8: mixtures of experts"):
        architecture_of(config).describe("m", config, None)


HYBRID = {"num_local_experts": 0, "mamba_n_heads": 8}
MAMBA = {**HYBRID, "layer_types": ["attention", "attention", "mamba"]}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"hidden_act": "tanh"}, "activation 'tanh' is not supported; supported: silu"),
        ("stablelm", {"qk_layernorm": True}, "stablelm with qk_layernorm True is not supported"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("persimmon", {"qk_layernorm": False}, "persimmon with qk_layernorm False"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("granitemoehybrid", {**HYBRID, "num_local_experts": 8}, "num_local_experts"),
        ("granitemoehybrid", HYBRID, "layer 0 is Mamba 2; of granitemoehybrid only models"),
        ("granitemoehybrid", MAMBA, "layer 2 is Mamba 2; of granitemoehybrid only models"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv"),
        ("hyperclovax", {"use_post_norm": False}, "use_post_norm"),
        ("gemma2", {"use_bidirectional_attention": True}, "not a causal model"),
        ("qwen2", {"layer_types": ["linear_attention"] * LAYERS}, "type 'linear_attention'"),
        ("stablelm", {"num_attention_heads": 8}, "rotates 2 of 8 dimensions"),
        ("llama", {"is_causal": False}, "not a causal model"),
        ("phi3", {"partial_rotary_factor": 0.0}, "turns no dimension"),
    ],
)
def test_what_the_graphs_do_not_have_is_refused(
    family: str, change: dict[str, object], message: str
) -> None:
    config = config_of(family, change)
    with pytest.raises(UnsupportedError, match=message):
        architecture_of(config).describe("m", config, None)


@pytest.mark.parametrize("family", sorted(REGISTRY))
def test_fields_that_a_family_does_not_have_change_nothing(family: str) -> None:
    """As in transformers, which reads only those that the class of a configuration declares."""
    case = next(case for case in CASES.values() if case.family == family)
    usual = config_of(family, case.config)
    undeclared = {
        "rms_norm_eps": 0.1,
        "layer_norm_eps": 0.1,
        "hidden_activation": "relu",
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
        "norm_topk_prob": False,
    }
    known = {one.name for one in fields(type(usual))}
    other = {key: value for key, value in undeclared.items() if key not in known}
    changed, family_of = config_of(family, {**case.config, **other}), architecture_of(usual)
    assert family_of.describe("m", changed, None) == family_of.describe("m", usual, None)


def test_a_softcap_of_zero_is_none() -> None:
    config = config_of("gemma2", {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0})
    block = architecture_of(config).describe("m", config, None).block
    assert block.attention_softcap is None and block.logit_softcap is None


# The documentation


def test_the_table_of_models_lists_what_these_tests_run() -> None:
    text = (Path(__file__).parent.parent / "docs/reference/models.md").read_text("utf-8")
    section = text.split("\n## ")[1]  # Families
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section, re.M)
    assert rows == [(case.family, case.special) for case in CASES.values()]
    assert {family for family, _ in rows} == set(REGISTRY)
