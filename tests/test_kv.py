"""After any mixture of actions the K/V cache is what a slow reference holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import save_biased
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from slow_layer import SlowModel
from transformers import LlamaForCausalLM

import dash_onnx
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.calibration.runner import _least_error
from dash_onnx.exporters.quantize.blockwise import Quantized, dequantize
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.sequence import SequenceState

LAYERS = 4
NAMES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
OF_SKIP = {"skip_proj": 4, "expand_proj": 8}  # bits: K/V of a skipped token are INT4
actions = st.sampled_from(["full", "int8", "int4", "skip"])
running = st.sampled_from(["full", "int8", "int4"])
paths = st.tuples(running, *[actions] * (LAYERS - 1))


def stored_weights(bundle: Path, manifest: Manifest, layer: int, action: str) -> dict:
    """The weights that a layer graph really holds, as matrices `[N, K]`."""
    graph = onnx.load(bundle / f"layers/{layer:02d}/{action}.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    if action == "full":
        return {n: torch.from_numpy(arrays[f"{n}.weight"].astype(np.float32).T) for n in NAMES}
    bits = OF_SKIP if action == "skip" else dict.fromkeys(NAMES, {"int8": 8, "int4": 4}[action])
    block, facts = manifest.target.block_size, manifest.model
    width = {
        "o_proj": facts.num_heads * facts.head_dim,
        "down_proj": facts.intermediate_size,
        "expand_proj": manifest.compensation_rank,
    }
    result = {}
    for name, count in bits.items():
        if f"{name}.values" not in arrays:
            assert name == "expand_proj" and manifest.compensation_rank == 0
            continue
        values, scales = arrays[f"{name}.values"], arrays[f"{name}.scales"]
        assert values.shape[-1] == block * count // 8
        shape = (values.shape[0], width.get(name, facts.hidden_size))
        zeros = arrays.get(f"{name}.zero_points")
        result[name] = dequantize(Quantized(values, scales, zeros, shape, count, block))
    return result


@pytest.fixture(scope="module", params=["compensated", "scaled"])
def bundle(
    request: pytest.FixtureRequest,
    tiny_folder: Path,
    tiny_bundle: Path,
    export_tiny: Callable[..., Path],
    night: Path,
) -> Path:
    """A skipped layer returns its input scaled, with and without the low-rank map."""
    if request.param == "compensated":
        return tiny_bundle
    return export_tiny(tiny_folder, calibration=(night,), compensation_rank=0)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return dash_onnx.load(bundle)


@pytest.fixture(scope="module")
def slow(tiny_folder: Path, bundle: Path, model: Model) -> SlowModel:
    manifest = model.manifest
    weights = {
        action: [stored_weights(bundle, manifest, i, action) for i in range(LAYERS)]
        for action in ("full", "int8", "int4", "skip")
    }
    reference = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return SlowModel(reference, weights, manifest)


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.lists(st.integers(2, 383), min_size=1, max_size=20),
    prefill=running,
    decoded=st.lists(st.tuples(st.integers(2, 383), paths), max_size=8),
    kept=st.floats(0, 1),
    again=st.lists(st.tuples(st.integers(2, 383), paths), max_size=4),
)
def test_kv_after_any_mixture_of_actions(
    slow: SlowModel,
    model: Model,
    prompt: list[int],
    prefill: str,
    decoded: list[tuple[int, tuple[str, ...]]],
    kept: float,
    again: list[tuple[int, tuple[str, ...]]],
) -> None:
    """Prefill, decode, forget a part, decode on; hidden states and K/V are compared."""
    slow.__init__(slow.model, slow.weights, slow.manifest)  # type: ignore[misc]
    sequence = model.new_sequence()
    sequence.prefill(np.array(prompt), (prefill,) * LAYERS, "full")
    for token in prompt:
        hidden = slow.token(token, (prefill,) * LAYERS)
    for part in (decoded, again):
        for token, path in part:
            sequence.forward(token, FixedPath(path, "full"))[0]
            hidden = slow.token(token, path)
        assert sequence.length == len(slow.keys[0])
        compare(sequence, slow)
        if part is decoded:
            length = max(1, int(kept * sequence.length))
            sequence.truncate(length)
            for layer in range(LAYERS):
                del slow.keys[layer][length:], slow.values[layer][length:]
    if again:
        got = sequence.hidden[LAYERS % 2].array[0, 0]
        np.testing.assert_allclose(got, hidden.numpy(), rtol=2e-4, atol=2e-4)


def compare(sequence: SequenceState, slow: SlowModel) -> None:
    for layer in range(LAYERS):
        for buffer, rows in (
            (sequence.kv.keys[layer], slow.keys[layer]),
            (sequence.kv.values[layer], slow.values[layer]),
        ):
            got = buffer.array[0, :, : sequence.length]
            np.testing.assert_allclose(got, torch.stack(rows, 1).numpy(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("action", ["full", "int8", "int4", "skip"])
@pytest.mark.parametrize(("cache", "top", "share"), [("int8", 127, 4), ("int4", 7, 8)])
def test_a_quantized_cache_holds_the_nearest_levels(
    cache: str, top: int, share: int, action: str, tiny_with: Callable[..., Path]
) -> None:
    """Of one layer, whose input is the same: for prompts and single tokens, in every action."""
    ids, held = np.arange(40, 65), []
    folder = tiny_with(kv_cache=cache)
    for model in (dash_onnx.load(tiny_with()), dash_onnx.load(folder)):
        sequence = model.new_sequence(16)  # it grows on the way
        decider = FixedPath((action,) + ("full",) * (LAYERS - 1), "full")
        sequence.forward(ids[:20], decider)
        for token in ids[20:].tolist():
            sequence.forward(token, decider)
        held.append([buffers[0] for buffers in (sequence.kv.keys, sequence.kv.values)])
    graph = onnx.load(folder / f"layers/00/{action}.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert ("k_offset" in arrays) == (cache == "int4")
    scales = arrays["k_scale"], arrays["v_scale"]
    none = np.zeros(scales[0].shape, np.float32)
    offsets = arrays.get("k_offset", none).reshape(none.shape), none
    for wanted, found, scale, offset in zip(*held, scales, offsets, strict=True):
        assert wanted.array.nbytes == share * found.array.nbytes
        levels = found.array[0, :, : len(ids)].astype(np.int64)
        if cache == "int4":
            levels = np.stack([levels & 15, levels >> 4], -1).reshape(*levels.shape[:-1], -1) - 8
        moved = wanted.array[0, :, : len(ids)] - offset
        nearest = np.round(moved / scale).clip(-top - 1, top)
        assert np.abs(levels - nearest).max() <= 1  # other kernels, a hair from the border
        assert (levels == nearest).mean() > 0.98


def test_a_quantized_cache_holds_keys_at_every_position(
    export_tiny: Callable[..., Path], night: Path, tmp_path: Path
) -> None:
    """RoPE turns what is large in one dimension of a pair into the other, slowly in some pairs."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    more = {"rope_parameters": rope, "max_position_embeddings": 4096}
    source = save_biased(tmp_path / "source", 3.0, **more)
    folder = export_tiny(source, calibration=(night,), kv_cache="int8", variants=("int8",))
    graph = onnx.load(folder / "layers/00/int8.onnx").graph
    (scale,) = (numpy_helper.to_array(one) for one in graph.initializer if one.name == "k_scale")
    first, second = np.split(scale.astype(np.float64), 2, -1)
    apart = np.abs(np.log2(first / second)).max()
    assert apart < 0.5


def test_a_quantized_cache_costs_little(tiny_with: Callable[..., Path], night: Path) -> None:
    """Logits after every token, from a path that mixes all actions; on text like that it saw."""
    text = dash_onnx.load(tiny_with()).text.encode(night.read_text())
    ids, path = text[1000:1060], ("full", "skip", "int4", "int8")
    wanted, *found = (
        dash_onnx.load(tiny_with(kv_cache=cache))
        .new_sequence()
        .prefill(ids, path, "full", every=True)
        for cache in ("float", "int8", "int4")
    )
    int8, int4 = (np.abs(logits - wanted).max() / np.abs(wanted).max() for logits in found)
    assert 0 < int8 < 0.05 < int4 < 0.6


def test_a_cache_that_cannot_grow_stays_as_it_was(tiny_model: Model) -> None:
    """There is memory for the keys, and none for all of the values."""
    sequence = tiny_model.new_sequence(8)
    sequence.prefill(np.arange(2, 9), ("int8",) * LAYERS, "int8")
    kv, left = sequence.kv, LAYERS + 1
    before = {**kv.keys}, {**kv.values}, kv.rotary, kv.capacity, kv.moves
    buffer = kv._backend.buffer

    class Full:
        def buffer(self, *arguments: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise MemoryError
            return buffer(*arguments)  # type: ignore[arg-type]

    kv._backend = Full()  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        kv.reserve(64)
    assert (kv.keys, kv.values, kv.rotary, kv.capacity, kv.moves) == before


def test_int4_keys_have_an_offset_and_spare_the_first_token() -> None:
    """Keys of a channel lie far from zero and near each other, but for the first."""
    x = 10 + np.random.default_rng(0).normal(size=(1, 4, 256, 1)).astype(np.float32)
    x[:, :, 0] = 1.0
    scale, offset = _least_error(x, 4, offset=True)
    assert offset is not None and offset.item() > 5
    levels = np.round((x - offset[:, None]) / scale[:, None]).clip(-8, 7)
    errors = np.abs(levels * scale[:, None] + offset[:, None] - x)
    assert errors[:, :, 0].max() < 0.25 and errors.mean() < 0.3
    wide, none = _least_error(x, 4, offset=False)
    assert none is None and wide.item() > 1.2 * scale.item()
