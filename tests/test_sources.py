from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import TINY, save_tiny, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.check import check
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.exporters.sources import Source, open_source

SENTENCE = "the keeper of the lighthouse counts the ships that pass in the night\n"
IDS = np.arange(2, 42)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text: much faster than text that the model generates itself."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(SENTENCE * 48)
    return path


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny source that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def opened(model: str | Path) -> Source:
    return open_source(str(model), REGISTRY)


def refusal(kind: type[Exception], model: str | Path) -> str:
    """The message with which a model is refused: one line."""
    with pytest.raises(kind) as caught:
        opened(model)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def graph_files(bundle: Path) -> dict[str, bytes]:
    files = [*bundle.glob("*.onnx*"), *bundle.glob("layers/*/*"), *bundle.glob("head/*")]
    assert files
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in files}


def reference_logits(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


# Safetensors


def test_shards_give_the_same_graphs_as_a_single_file(
    tiny_folder: Path, folder: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    options = {"calibration": (text,), "variants": ("full", "int8")}
    single = graph_files(export_tiny(tiny_folder, **options))
    assert graph_files(export_tiny(folder, **options)) == single


def sharded(folder: Path) -> Path:
    """Splits the weights of a folder into two shards; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    index = folder / "model.safetensors.index.json"
    where = {name: shard for shard, part in parts.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_a_missing_shard_is_named(folder: Path) -> None:
    sharded(folder)
    assert "model.norm.weight" in opened(folder).weights
    (folder / "b.safetensors").unlink()
    assert "b.safetensors is missing" in refusal(SourceError, folder)


def test_a_single_file_beside_older_shards_is_what_counts(folder: Path) -> None:
    path, name = folder / "model.safetensors", "model.norm.weight"
    tensors = load_file(path)
    sharded(folder)
    save_file({**tensors, name: tensors[name] + 1}, path)
    assert torch.equal(opened(folder).weights[name], tensors[name] + 1)
    (folder / "b.safetensors").unlink()
    assert torch.equal(opened(folder).weights[name], tensors[name] + 1)


def test_a_head_of_its_own_counts_where_the_config_calls_it_tied(
    folder: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    bundle = export_tiny(folder, calibration=(text,), variants=("full",))
    np.testing.assert_allclose(
        dash_onnx.load(bundle).logits(IDS, policy="full"), reference_logits(folder), atol=1e-4
    )
    assert check(opened(folder), Bundle(bundle), "quick").failures == []


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(
    folder: Path, tmp_path: Path, absolute: bool
) -> None:
    index = sharded(folder)
    outside = tmp_path / "outside.safetensors"
    shutil.move(folder / "b.safetensors", outside)
    shard = str(outside) if absolute else "../outside.safetensors"
    index.write_text(index.read_text().replace("b.safetensors", shard))
    assert "leaves the folder" in refusal(SourceError, folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"x": 1}}'])
def test_a_damaged_index_is_refused(folder: Path, content: str) -> None:
    sharded(folder).write_text(content)
    assert "index.json" in refusal(SourceError, folder)


@pytest.mark.parametrize("damage", ["empty", "garbage", "header", "data"])
def test_a_damaged_safetensors_file_is_refused(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "garbage": b"\xff" * 4096, "header": whole[:100], "data": whole[:-100]}[
            damage
        ]
    )
    assert "model.safetensors is not a valid safetensors file" in refusal(SourceError, folder)


def test_a_missing_tensor_is_named(folder: Path, text: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        export(
            str(folder), tmp_path / "out", ExportOptions(calibration=(text,), variants=("full",))
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["model.layers.1.mlp.gate_proj.weight", "lm_head.weight"])
def test_a_tensor_that_does_not_fit_the_config_is_refused(
    folder: Path, text: Path, tmp_path: Path, part: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[part] = tensors[part][:-8].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=part.split(".")[-2]):
        export(
            str(folder), tmp_path / "out", ExportOptions(calibration=(text,), variants=("full",))
        )


@pytest.mark.parametrize("variants", [("full",), ("int4",)])
def test_weights_that_are_not_finite_are_refused(
    folder: Path, text: Path, tmp_path: Path, variants: tuple
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError):
        export(str(folder), tmp_path / "out", ExportOptions(calibration=(text,), variants=variants))


class _Bomb:
    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self._marker),)


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "pickle-was-run"
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(_Bomb(marker)))
    assert "pickled weights are never read" in refusal(SourceError, folder)
    assert not marker.exists()
    pickle.loads((folder / "model.pt").read_bytes())  # the bomb does work
    assert marker.exists()


def test_code_of_a_model_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "code-was-run"
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(folder / "config.json", auto_map=auto_map)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    opened(folder)
    assert not marker.exists()


# Configuration and tokenizer


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(SourceError, folder)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(SourceError, folder)


def test_a_binary_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json" in refusal(SourceError, folder)


def test_a_config_with_a_mistyped_value_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size="sixty-four")
    assert "config.json" in refusal(SourceError, folder)


@pytest.mark.parametrize("model_type", ["no_such_family", None])
def test_an_unknown_architecture_is_refused_and_the_supported_ones_are_listed(
    folder: Path, model_type: str | None
) -> None:
    edit_json(folder / "config.json", model_type=model_type)
    message = refusal(UnsupportedError, folder)
    assert str(model_type) in message
    assert all(name in message for name in REGISTRY)


def test_quantized_weights_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    message = refusal(UnsupportedError, folder)
    assert "awq" in message and "original" in message


def test_a_null_quantization_config_means_not_quantized(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config=None)
    assert opened(folder).config.hidden_size == 64


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refusal(SourceError, folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe"])
def test_a_damaged_tokenizer_is_refused(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    assert "tokenizer" in refusal(SourceError, folder)


def test_a_damaged_generation_config_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json" in refusal(SourceError, folder)


# FP16's range


def save_as_bfloat16(folder: Path, change: Callable[[LlamaForCausalLM], None]) -> Path:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "bos_token_id": 0, "eos_token_id": 1}))
    with torch.no_grad():
        change(model)
    model.bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    dtypes = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
    return folder


def test_a_bfloat16_source_keeps_its_logits(
    tmp_path: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    folder = save_as_bfloat16(tmp_path / "bf16", lambda _: None)
    model = dash_onnx.load(export_tiny(folder, calibration=(text,), variants=("full",)))
    assert model.manifest.export.fp32_kept == ()
    np.testing.assert_allclose(model.logits(IDS), reference_logits(folder), atol=2e-4)


def beyond_half(model: LlamaForCausalLM) -> None:
    """Values that FP16 cannot hold, where the logits stay reasonable."""
    model.model.embed_tokens.weight[50, 7] = 2.0**17
    model.model.layers[0].self_attn.v_proj.weight[3, 5] = -(2.0**17)
    model.model.layers[2].mlp.down_proj.weight[9, 11] = 2.0**18
    model.model.layers[2].mlp.up_proj.weight[11] *= 2.0**-9
    model.lm_head.weight[300, 20] = 2.0**16


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 source with weights beyond FP16's range."""
    return save_as_bfloat16(tmp_path_factory.mktemp("wide") / "wide", beyond_half)


def test_weights_beyond_half_are_kept_in_float32_on_cpu(
    wide_folder: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    model = dash_onnx.load(export_tiny(wide_folder, calibration=(text,)))
    kept = model.manifest.export.fp32_kept
    assert sorted(kept) == [
        "embedding",
        "layers.0.qkv_proj.weight",
        "layers.2.down_proj.weight",
        "lm_head.weight",
    ]
    reference = reference_logits(wide_folder)
    assert np.isfinite(reference).all()
    error = np.abs(model.logits(IDS, policy="full") - reference).max()
    assert error <= 1e-4 * np.abs(reference).max()
    for policy in ("int8", "int4", "random:3"):
        assert np.isfinite(model.logits(IDS, policy=policy)).all()


def test_weights_are_listed_as_float32_only_where_the_bundle_holds_them(
    wide_folder: Path, text: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = export_tiny(wide_folder, calibration=(text,), variants=("int8",))
    assert dash_onnx.load(bundle).manifest.export.fp32_kept == ("embedding",)


def test_weights_beyond_half_are_refused_for_cuda_and_nothing_is_left(
    wide_folder: Path, text: Path, tmp_path: Path
) -> None:
    options = ExportOptions(device="cuda", calibration=(text,), variants=("full",))
    with pytest.raises(UnsupportedError, match="FP16's range") as caught:
        export(str(wide_folder), tmp_path / "out", options)
    assert "--device cpu" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# The MODEL argument


@pytest.mark.parametrize("model", ["nowhere", "/no/such/folder", "./nowhere", "a/b/c", "~/x", ""])
def test_a_path_that_leads_nowhere_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(SourceError, model)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    assert "neither a folder nor a .gguf file" in refusal(SourceError, path)


def test_a_hub_id_without_network_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The variable HF_HUB_OFFLINE is read when the package is imported, into this constant.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal(SourceError, "no-such-organisation/no-such-model")
    assert "no-such-organisation/no-such-model" in message
    assert "hub" in message


@pytest.mark.parametrize("model", ["org/na me", "org/name?x", "-org/name"])
def test_a_malformed_hub_id_is_one_clear_error(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model in refusal(SourceError, model)


# GGUF


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of Q and K rows: the two rows that rotate together are neighbours."""
    size = weight.shape[0] // heads
    rows = [head * size + j + half for head in range(heads) for j in range(size // 2)
            for half in (0, size // 2)]  # fmt: skip
    return weight[rows]


def q8_0(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packs rows as GGUF's Q8_0 (FP16 scale, 32 INT8); returns bytes and their values."""
    blocks = weight.reshape(weight.shape[0], -1, 32)
    scales = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
    levels = np.round(blocks / scales.astype(np.float32)).clip(-127, 127).astype(np.int8)
    packed = np.concatenate([scales.view(np.uint8), levels.view(np.uint8)], -1)
    values = levels.astype(np.float32) * scales.astype(np.float32)
    return packed.reshape(weight.shape[0], -1), values.reshape(weight.shape)


def gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, index, *part = name.split(".")
    return (
        f"blk.{index}."
        + {
            "input_layernorm.weight": "attn_norm.weight",
            "self_attn.q_proj.weight": "attn_q.weight",
            "self_attn.k_proj.weight": "attn_k.weight",
            "self_attn.v_proj.weight": "attn_v.weight",
            "self_attn.o_proj.weight": "attn_output.weight",
            "post_attention_layernorm.weight": "ffn_norm.weight",
            "mlp.gate_proj.weight": "ffn_gate.weight",
            "mlp.up_proj.weight": "ffn_up.weight",
            "mlp.down_proj.weight": "ffn_down.weight",
        }[".".join(part)]
    )


def write_gguf(
    path: Path,
    folder: Path,
    *,
    quantized: bool = True,
    scaling: gguf.RopeScalingType | None = None,
    rope_freqs: bool = False,
    tokenizer: bool = True,
    leave_out: str = "",
    architecture: str = "llama",
    pre: str = "default",
) -> dict[str, torch.Tensor]:
    """Writes the model of a folder as GGUF; returns the weights it stands for, by HF name."""
    weights = {}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(TINY["max_position_embeddings"])
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_rope_dimension_count(TINY["hidden_size"] // TINY["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(TINY["vocab_size"])
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(4.0)
    if tokenizer:
        fast = tiny_tokenizer()
        state = json.loads(fast.backend_tokenizer.to_str())["model"]
        tokens = sorted(state["vocab"], key=state["vocab"].get)
        missing = range(len(tokens), TINY["vocab_size"])
        types = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in missing)])
        writer.add_token_types([*types, *(gguf.TokenType.UNUSED for _ in missing)])
        writer.add_token_merges([" ".join(merge) for merge in state["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    heads = {"q_proj": TINY["num_attention_heads"], "k_proj": TINY["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        packed = None
        if quantized and values.ndim == 2:
            packed, values = q8_0(values)
        weights[name] = torch.from_numpy(values)
        stored = values if packed is None else packed
        heads_of = next((count for part, count in heads.items() if part in name), None)
        if heads_of is not None:
            stored = interleaved(stored, heads_of)
        if gguf_name(name) == leave_out:
            continue
        kind = None if packed is None else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(stored), raw_dtype=kind)
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_gives_the_logits_of_the_same_weights_in_safetensors(
    quantized: bool,
    tiny_folder: Path,
    folder: Path,
    text: Path,
    tmp_path: Path,
    export_tiny: Callable[..., Path],
) -> None:
    path = tmp_path / "tiny.gguf"
    weights = write_gguf(path, tiny_folder, quantized=quantized)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options = {"calibration": (text,), "variants": ("full", "int8")}
    ours = dash_onnx.load(export_tiny(path, **options))
    same = dash_onnx.load(export_tiny(folder, **options))
    assert ours.manifest.export.source == "gguf:tiny"
    for policy in ("full", "int8"):
        np.testing.assert_array_equal(
            ours.logits(IDS, policy=policy), same.logits(IDS, policy=policy)
        )
    # Values of Q8_0 are rounded to FP16 in a bundle: 11 bits of 15.
    atol = 2e-2 if quantized else 1e-4
    np.testing.assert_allclose(ours.logits(IDS), reference_logits(folder), atol=atol)


def test_a_gguf_gives_the_tokens_and_the_end_token_of_its_tokenizer(
    tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_folder)
    source, fast = opened(path), tiny_tokenizer()
    for sample in (SENTENCE, " the  ship's 42 lights", "näïve ☃ 漢字", "<s>user</s>"):
        ours = source.tokenizer(sample, add_special_tokens=False)["input_ids"]
        assert ours == fast(sample, add_special_tokens=False)["input_ids"], sample
    assert source.generation_config.eos_token_id == 1
    assert source.generation_config.bos_token_id == 0


def test_a_gguf_whose_pretokenizer_splits_digits_keeps_each_digit_apart(
    tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_folder, pre="smollm")
    backend = opened(path).tokenizer.backend_tokenizer
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("in 1984 ships")]
    assert pieces == ["in", "Ġ", "1", "9", "8", "4", "Ġships"]


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"not a model" * 100, b"GGUF" * 100])
def test_a_file_that_only_claims_to_be_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "not a readable GGUF file" in refusal(SourceError, path)


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.05, 0.3, 0.9, 0.9999])
def test_a_truncated_gguf_is_refused(tiny_folder: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "not a readable GGUF file" in refusal(SourceError, path)


def test_a_missing_gguf_is_named(tmp_path: Path) -> None:
    assert "nowhere.gguf" in refusal(SourceError, tmp_path / "nowhere.gguf")


def test_rope_scaling_by_nothing_in_a_gguf_is_no_scaling(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for options in ({"scaling": gguf.RopeScalingType.NONE}, {"rope_freqs": True}):
        write_gguf(path, tiny_folder, **options)
        assert opened(path).config.rope_parameters["rope_type"] == "default"


def test_a_gguf_of_another_architecture_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_folder, architecture="mamba")
    message = refusal(UnsupportedError, path)
    assert "mamba" in message and "llama" in message


def test_a_gguf_without_tokenizer_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_folder, tokenizer=False)
    assert "tokenizer" in refusal(SourceError, path)


def test_a_gguf_without_a_tensor_names_it(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_folder, leave_out="blk.1.ffn_up.weight")
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj"):
        export(str(path), tmp_path / "out", ExportOptions(calibration=(text,), variants=("full",)))


def test_a_gguf_without_output_weight_ties_head_and_embedding(
    tiny_folder: Path, text: Path, tmp_path: Path, export_tiny: Callable[..., Path]
) -> None:
    path = tmp_path / "model.gguf"
    weights = write_gguf(path, tiny_folder, quantized=False, leave_out="output.weight")
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    weights.pop("lm_head.weight")
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    model = dash_onnx.load(export_tiny(path, calibration=(text,), variants=("full",)))
    np.testing.assert_allclose(model.logits(IDS), reference_logits(tied), atol=1e-4)
