"""Layers that read K/V of earlier ones: what they see where those are skipped, and what is kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, VARIANTS, logits_of, memory_of
from families import CASES, PROMPT, WINDOW, Pair, config_of, random_ids, save_random
from safetensors.torch import load_file, save_file
from test_environment import case_of

import dash_onnx
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.core.contract import EMBED_PATH, TABLE_PATH
from dash_onnx.core.errors import BundleError, UnsupportedError
from dash_onnx.core.statistics import kl_divergence, log_softmax
from dash_onnx.exporters.architectures import REGISTRY, architecture_of
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.exporters.export.graph_writer import GraphWriter
from dash_onnx.exporters.fused import FuseOptions, fuse
from dash_onnx.exporters.graphs import build_embed
from dash_onnx.exporters.sources import open_source
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.ort import create_session
from dash_onnx.runtime.rows import Rows
from dash_onnx.runtime.sequence import SequenceState

SOURCES = (None, None, 0, 1)
"""Whose K/V each layer reads, if not its own: one with a window, and one without."""

_CHANGE = {
    **CASES["gemma4"].config,
    "num_hidden_layers": len(SOURCES),
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
CASE = replace(CASES["gemma4"], config=_CHANGE)

READ = 0.15
"""Of the output of a layer that reads K/V which skips have written, with errors of some 10 %."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.build(CASE, tmp_path_factory.mktemp("shared"))


def decoded(state: SequenceState, ids: np.ndarray, paths: np.ndarray) -> np.ndarray:
    """Logits after each token, each on its own path."""
    steps = zip(ids.tolist(), paths.tolist(), strict=True)
    each = [state.forward(token, FixedPath(tuple(path), "full"))[0].copy() for token, path in steps]
    return np.stack(each)


def random_paths(length: int, seed: int = 5) -> np.ndarray:
    """Paths `[length, L]` of which every layer but the first is skipped by some tokens."""
    paths = np.random.default_rng(seed).choice(["full", "skip"], (length, len(SOURCES)))
    paths[:PROMPT] = "full"
    paths[:, 0] = "full"
    return paths


def ran(
    sequence: SequenceState, ids: np.ndarray, paths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs of each layer, `[L, T, D]`."""
    inputs = np.zeros((len(SOURCES), len(ids), TINY["hidden_size"]), np.float32)
    outputs = np.zeros_like(inputs)
    for position, token in enumerate(ids.tolist()):
        sequence.advance(1)
        sequence.embed(token)
        for layer, action in enumerate(paths[position].tolist()):
            inputs[layer, position] = sequence.hidden[layer % 2].array[0, 0]
            sequence.run(layer, action)
            outputs[layer, position] = sequence.hidden[(layer + 1) % 2].array[0, 0]
    return inputs, outputs


def reference_output(pair: Pair, ids: np.ndarray, inputs: np.ndarray, layer: int) -> np.ndarray:
    """What a layer of transformers returns, `[T, D]`, where all layers get given inputs."""
    seen: list[np.ndarray] = []
    module = pair.reference.get_decoder().layers[layer]
    hook = module.register_forward_hook(lambda *call: seen.append(call[-1][0].numpy()))
    pair._cache_of(ids, inputs)
    hook.remove()
    return seen[0]


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """||got - wanted|| / ||wanted||."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_only_the_layers_that_write_k_and_v_have_a_cache(pair: Pair) -> None:
    manifest, kv = pair.model.manifest, pair.model.new_sequence().kv
    assert tuple(one.source for one in manifest.attention) == SOURCES
    assert {*kv.keys} == {*kv.values} == {0, 1} == {*manifest.attending}
    shapes = [kv.keys[layer].shape for layer in (0, 1)]
    assert [(heads, width) for _, heads, _, width in shapes] == [(2, 16), (2, 32)]
    assert manifest.kv_bytes == 4 * 2 * (2 * 16 + 2 * 32)


def test_layers_read_what_the_skip_of_another_one_has_written(pair: Pair) -> None:
    ids = random_ids(WINDOW + 20)
    for writer, reader in ((0, 2), (1, 3)):
        paths = np.full((len(ids), len(SOURCES)), "full", dtype="<U4")
        paths[PROMPT:, writer] = "skip"
        sequence = pair.model.new_sequence()
        inputs, outputs = ran(sequence, ids, paths)
        wanted, got = reference_output(pair, ids, inputs, reader), outputs[reader]
        np.testing.assert_allclose(got[:PROMPT], wanted[:PROMPT], atol=1e-4)
        assert 1e-4 < relative(got, wanted) < READ
        # The comparison means something: what the skips wrote counts.
        for buffer in (sequence.kv.keys[writer], sequence.kv.values[writer]):
            buffer.write(0.0, (..., slice(PROMPT, None), slice(None)))
        sequence.hidden[reader % 2].write(inputs[reader, -1])
        sequence.run(reader, "full")
        without = sequence.hidden[(reader + 1) % 2].array[0, 0]
        assert relative(without, wanted[-1]) > 2 * READ


def test_going_back_and_other_rows_change_nothing(pair: Pair) -> None:
    ids, paths = random_ids(50), random_paths(50)
    wanted = decoded(pair.model.new_sequence(), ids, paths)
    state = pair.model.new_sequence()
    decoded(state, random_ids(31), random_paths(31, seed=6))
    state.truncate(0)
    decoded(state, ids[:30], paths[:30])
    decoded(state, random_ids(9), random_paths(9, seed=7))
    state.truncate(30)
    np.testing.assert_allclose(decoded(state, ids[30:], paths[30:]), wanted[30:], atol=1e-4)

    batch = Rows.new(pair.model._sessions, 3)
    assert not batch.ragged  # ONNX Runtime pads no rows where there are no new K/V
    decoded(batch.states[0], ids[:7], paths[:7])
    decoded(batch.states[2], ids[:20], paths[:20])
    for step in range(12):
        rows = [0, 2] if step % 2 else [0, 1, 2]  # one rests in between
        at = [batch.states[row].length for row in rows]
        deciders = [FixedPath(tuple(paths[i].tolist()), "full") for i in at]
        logits, _ = batch.forward(rows, [[int(ids[i])] for i in at], deciders)
        for got, position in zip(logits, at, strict=True):
            np.testing.assert_allclose(got[0], wanted[position], atol=1e-4)


@pytest.mark.parametrize("action", ["full", "int8", "int4", "skip"])
def test_layers_joined_to_one_graph_read_what_others_in_it_write(pair: Pair, action: str) -> None:
    ids, path = random_ids(12), ("full", *[action] * (len(SOURCES) - 1))
    wanted = decoded(pair.model.new_sequence(), ids, np.array([path] * len(ids)))
    pair.model._sessions.forget()  # layers that are loaded alone are not joined
    state = pair.model.new_sequence()
    state.prefill(ids[:3], path, "full")
    joined = [state.forward(token, FixedPath(path, "full"))[0].copy() for token in ids[3:].tolist()]
    assert pair.model._sessions._joined
    np.testing.assert_allclose(np.stack(joined), wanted[3:], atol=1e-4)
    pair.model._sessions.forget()


@pytest.mark.parametrize("keeps", [True, False], ids=["at once", "run again"])
def test_the_gradient_goes_through_k_and_v_that_others_read(pair: Pair, keeps: bool) -> None:
    env = case_of(pair.bundle, 0).env
    env.model.keeps_layers = keeps
    generator = torch.Generator().manual_seed(4)
    ids = torch.from_numpy(random_ids(20))[None]
    direction = torch.randn(1, 20, TINY["hidden_size"], generator=generator)
    decisions = torch.zeros(1, 20, len(env.actions))
    decisions[..., 0] = 1.0

    def value(change: torch.Tensor) -> torch.Tensor:
        """Of the last token's logits alone, where the input of the first layer changes."""
        beside, x = env.model.embedding.beside(ids), env.model.embedding(ids) + change
        for layer in range(len(SOURCES)):
            x = env.outputs(layer, x, decisions, beside)[0]
        return env.model.logits(env.model.final(x))[0, -1].square().sum()

    change = torch.zeros_like(direction, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(change), change)
    with torch.no_grad():
        rise = (value(2e-3 * direction) - value(-2e-3 * direction)) / 4e-3
    torch.testing.assert_close((gradient * direction).sum(), rise, rtol=0.02, atol=0.02)


def test_a_conversation_goes_on_from_a_file(pair: Pair, tmp_path: Path) -> None:
    ids, cache, later = random_ids(40), pair.model.new_cache(), pair.model.new_cache()
    wanted = logits_of(pair.model.score(ids, prompt_tokens=30, policy="int8", cache=cache))
    cache.save(tmp_path / "kv")
    later.load(tmp_path / "kv")
    got = logits_of(pair.model.score(ids, prompt_tokens=30, policy="int8", cache=later))
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_an_interrupted_export_goes_on_with_k_and_v_of_layers_that_are_done(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(
        variants=VARIANTS,
        wide=False,
        attention="both",
        calibration=(pair.bundle.parent / "text.txt",),
        accuracy_level=0,
    )
    source, write = str(pair.bundle.parent / "source"), GraphWriter.layer

    def interrupted(self: GraphWriter, folder: Path, index: int, *states: object) -> object:
        if index == 2:
            raise KeyboardInterrupt
        return write(self, folder, index, *states)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GraphWriter, "layer", interrupted)
        export(source, tmp_path / "out", options)
    layers = export(source, tmp_path / "out", options).layers
    assert layers == pair.model.manifest.layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": "int8"}, "K/V shared by several layers cannot be quantized"),
        ({"device": "cuda"}, "shared_attention run only on the CPU"),
        ({"block_size": 48}, "block_size 48 does not divide"),
    ],
)
def test_options_that_such_layers_do_not_have_are_refused(
    options: dict[str, object], message: str, pair: Pair, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        export(str(pair.bundle.parent / "source"), tmp_path / "out", ExportOptions(**options))
    assert not [*tmp_path.iterdir()]


def test_fused_graphs_are_refused(pair: Pair, tmp_path: Path) -> None:
    options = FuseOptions("genai", "static:int8,skip,skip,int8")
    with pytest.raises(UnsupportedError, match="gemma4_text cannot be fused"):
        fuse(Bundle(pair.bundle), tmp_path / "fused", options, overwrite=False)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_moe_block": True}, "gemma4_text with enable_moe_block True is not supported"),
        ({"use_bidirectional_attention": "all"}, "not a causal model"),
        ({"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input 100 is less than"),
        ({"num_kv_shared_layers": 4}, "no layer has attention"),
    ],
)
def test_configs_that_the_graphs_do_not_have_are_refused(
    change: dict[str, object], message: str
) -> None:
    config = config_of("gemma4_text", {**_CHANGE, **change})
    with pytest.raises(UnsupportedError, match=message):
        architecture_of(config).describe("m", config, None)


def test_a_manifest_whose_layers_read_k_and_v_that_nobody_writes_is_refused(
    pair: Pair, tmp_path: Path
) -> None:
    manifest = Bundle(shutil.copytree(pair.bundle, tmp_path / "out")).manifest
    for layer, source in ((2, 3), (2, 1), (3, 2), (3, None), (1, 0), (2, -1)):
        attention = [*manifest.attention]
        attention[layer] = replace(attention[layer], source=source)
        replace_manifest(tmp_path / "out", replace(manifest, attention=tuple(attention)))
        with pytest.raises(BundleError, match=f"layer {layer} "):
            Bundle(tmp_path / "out")


def test_without_full_precision_the_table_for_layers_is_int8(pair: Pair, tmp_path: Path) -> None:
    options = ExportOptions(
        variants=("int8", "int4"),
        wide=False,
        calibration=(pair.bundle.parent / "text.txt",),
        accuracy_level=0,
    )
    source, out = str(pair.bundle.parent / "source"), tmp_path / "out"
    manifest = export(source, out, options)
    count = TINY["vocab_size"] * len(SOURCES) * manifest.block.per_layer_width
    sizes = [(folder / TABLE_PATH).stat().st_size for folder in (pair.bundle, out)]
    assert sizes == [2 * count, count + 4 * count // manifest.target.block_size]
    ids, read = random_ids(60), []
    for folder in (pair.bundle, out):
        session = create_session(folder / EMBED_PATH, "cpu")
        read.append(session.run(["per_layer"], {"input_ids": ids[None]})[0])
    assert 1e-4 < relative(read[1], read[0]) < 0.01
    with dash_onnx.load(out) as model:
        ours, theirs, exact = (
            log_softmax(one.logits(ids, policy=policy))
            for one, policy in ((model, "int8"), (pair.model, "int8"), (pair.model, "full"))
        )
    cost = kl_divergence(theirs, ours).mean()
    assert 0 < cost < min(5e-4, kl_divergence(exact, theirs).mean())


@pytest.mark.parametrize("rounded", [False, True], ids=["fp16", "int8"])
def test_the_table_for_layers_stays_in_the_file(rounded: bool, pair: Pair, tmp_path: Path) -> None:
    source = open_source(str(pair.bundle.parent / "source"), REGISTRY)
    family = architecture_of(source.config)
    spec = family.describe("", source.config, None)
    table, per_layer = (part(source.weights, spec) for part in (family.embedding, family.per_layer))
    assert per_layer is not None
    large = replace(per_layer, table=torch.ones(1 << 18, per_layer.table.shape[1]))
    build_embed(tmp_path, table, spec, pair.model.manifest.target, large, rounded)
    del large
    ids = {"input_ids": np.array([[3, 300]])}
    assert memory_of(tmp_path / EMBED_PATH, "per_layer", ids, "VmRSS") < 20 << 20
    assert (tmp_path / TABLE_PATH).stat().st_size > (25 if rounded else 50) << 20


def test_weights_of_k_and_v_that_shared_layers_do_not_use_are_ignored(tmp_path: Path) -> None:
    file = save_random(tmp_path, CASE) / "model.safetensors"
    weights, unused = load_file(file), {}
    for name in ("k_proj", "v_proj", "k_norm"):
        weight = weights[f"model.layers.0.self_attn.{name}.weight"]
        unused[f"model.layers.2.self_attn.{name}.weight"] = weight.clone()
    save_file({**weights, **unused}, file, {"format": "pt"})
    source = open_source(str(tmp_path), REGISTRY)
    family = architecture_of(source.config)
    spec = family.describe("", source.config, None)
    assert family.layer(source.weights, 2, spec).qkv.out_features == 4 * 16
