"""Sources in Hugging Face's format: what is read, and what is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, refusal_of, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.conversation import rendered
from dash_onnx.core.errors import DashError, SourceError, UnsupportedError
from dash_onnx.exporters.architectures import REGISTRY, architecture_of
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.exporters.export.check import check
from dash_onnx.exporters.export.sizes import sizes_of
from dash_onnx.exporters.sources import Source, open_source

IDS = np.arange(2, 42)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny source that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def opened(model: str | Path) -> Source:
    return open_source(str(model), REGISTRY)


def refusal(kind: type[Exception], model: str | Path) -> str:
    """The message with which a model is refused: one line."""
    return refusal_of(kind, lambda: opened(model))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def read_layers(folder: Path) -> None:
    """Everything that an export reads, layer by layer."""
    source = opened(folder)
    architecture = architecture_of(source.config)
    spec = architecture.describe("m", source.config, None)
    for index in range(spec.facts.num_layers):
        architecture.layer(source.weights, index, spec)
    architecture.head(source.weights, spec)


def reference_logits(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    return logits


ODD_NUMBERS = [
    ({"rms_norm_eps": float("nan")}, "epsilon"),
    ({"rms_norm_eps": -1e-5}, "epsilon"),
    ({"rms_norm_eps": float("inf")}, "epsilon"),
    ({"rope_theta": float("nan")}, "rotary"),
    ({"rope_theta": -1.0}, "rotary"),
    ({"rope_theta": 0}, "rotary"),
    ({"rope_theta": float("inf")}, "rotary"),
]


@pytest.mark.parametrize(("change", "message"), ODD_NUMBERS, ids=str)
def test_a_number_that_no_layer_can_compute_with_is_refused(
    folder: Path, change: dict[str, float], message: str
) -> None:
    config = folder / "config.json"
    if "rope_theta" in change:
        change = {"rope_parameters": {"rope_type": "default", **change}}
    edit_json(config, **change)
    with pytest.raises(SourceError, match=message):
        sizes_of(opened(folder), ExportOptions())


@pytest.mark.parametrize(
    ("key", "value"), [("bos_token_id", 10**6), ("eos_token_id", -1), ("eos_token_id", [1, 384])]
)
def test_a_token_that_is_not_in_the_vocabulary_is_refused(
    folder: Path, key: str, value: object
) -> None:
    edit_json(folder / "generation_config.json", **{key: value})
    assert f"{key} " in refusal(SourceError, folder)


@pytest.mark.parametrize(
    ("named", "wanted"), [(None, 1), (7, [7, 1]), ([7, 9], [7, 9, 1]), ([1, 7], [1, 7]), (1, 1)]
)
def test_the_end_token_of_the_tokenizer_ends_an_answer(
    folder: Path, named: object, wanted: object
) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=named)
    assert opened(folder).generation_config.eos_token_id == wanted


def test_what_the_generation_config_of_a_model_says_is_kept(folder: Path, tmp_path: Path) -> None:
    """Even what transformers would not write again: a temperature without sampling."""
    path = folder / "generation_config.json"
    edit_json(path, eos_token_id=7, temperature=0.7, do_sample=None)
    opened(folder).save_text_files(tmp_path)
    kept = json.loads((tmp_path / path.name).read_text())
    assert (kept["eos_token_id"], kept["temperature"]) == ([7, 1], 0.7)


def test_a_chat_template_may_have_a_json_file_of_its_own(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert opened(folder).tokenizer.chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert opened(folder).tokenizer.chat_template == "{{ messages }}"


def test_a_template_for_tools_is_taken_where_there_are_tools(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    templates = {"default": "{% for m in messages %}a{% endfor %}", "tool_use": "t\n"}
    named = [{"name": name, "template": text} for name, text in templates.items()]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    template = opened(folder).tokenizer.chat_template
    asked = [{"role": "user", "content": "?"}]
    assert rendered(template, asked, {}, {}) == "a"
    assert rendered(template, asked, {"tools": [{}]}, {}) == "t"


# The tokenizer

DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
)
TEKKEN = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\S+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
)


def described(folder: Path, steps: pre_tokenizers.PreTokenizer, **config: object) -> Tokenizer:
    """Gives a folder a tokenizer that reads pairs of digits, and returns it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = steps
    tokenizer.add_tokens(["[INST]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = text["model"]["vocab"], text["model"]["merges"]
    free = next(token for token in vocabulary if len(token) > 2)
    merges[:] = [merge for merge in merges if free not in (*merge, "".join(merge))]
    vocabulary["12"] = vocabulary.pop(free)
    merges.append(["1", "2"])
    (folder / "tokenizer.json").write_text(json.dumps(text))
    edit_json(folder / "tokenizer_config.json", **config)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_is_that_of_its_file_whatever_class_is_named(folder: Path, kind: str) -> None:
    wanted = described(folder, DIGITS, tokenizer_class=kind)
    found = opened(folder).tokenizer
    for text in ("12 ships", "in 1212", "the keeper\n\n12."):
        assert found.encode(text) == wanted.encode(text).ids
    assert found.tokenize("12") == ["1", "2"]


@pytest.mark.parametrize("model_type", ["mistral", "llama"])
def test_the_digits_of_tekken_are_apart_whatever_its_file_says(
    folder: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {} if model_type == "llama" else {"sliding_window": None}
    edit_json(
        folder / "config.json", model_type=model_type, transformers_version="4.50.0", **config
    )
    described(folder, TEKKEN)
    size = Tokenizer.get_vocab_size
    monkeypatch.setattr(Tokenizer, "get_vocab_size", lambda *given, **named: 131072)
    assert size is not Tokenizer.get_vocab_size  # what transformers goes by
    found = opened(folder).tokenizer
    assert found.tokenize("12") == (["1", "2"] if model_type == "mistral" else ["12"])


def test_a_vocabulary_of_sentencepiece_alone_needs_its_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    monkeypatch.setattr("dash_onnx.exporters.sources.folder.find_spec", lambda _: None)
    assert "`pip install sentencepiece`" in refusal(SourceError, folder)


# Safetensors


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


def test_shards_hold_the_weights_of_a_single_file_and_a_missing_one_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    sharded(folder)
    weights = opened(folder).weights
    assert "model.layers.9.mlp.up_proj.weight" not in weights
    for name, tensor in tensors.items():
        assert name in weights and torch.equal(weights[name], tensor)
    (folder / "b.safetensors").unlink()
    assert "b.safetensors is missing" in refusal(SourceError, folder)


def test_a_single_file_beside_older_shards_is_what_counts(folder: Path) -> None:
    path, name = folder / "model.safetensors", "model.norm.weight"
    tensors = load_file(path)
    sharded(folder)
    save_file({**tensors, name: tensors[name] + 1}, path)
    (folder / "b.safetensors").unlink()
    assert torch.equal(opened(folder).weights[name], tensors[name] + 1)


def test_a_head_of_its_own_counts_where_the_config_calls_it_tied(
    folder: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    bundle = export_tiny(folder, calibration=(night,), variants=("full",))
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


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model.layers.2.mlp.down_proj", None, "no tensor"),
        ("model.layers.1.mlp.gate_proj", lambda weight: weight[:-8].clone(), "do not belong"),
        ("lm_head", lambda weight: weight[:-8].clone(), "do not belong"),
        ("model.layers.1.mlp.up_proj", lambda weight: weight / 0.0, "are not finite"),
    ],
)
def test_a_tensor_that_cannot_be_used_is_named(
    part: str,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    message: str,
    folder: Path,
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors.pop(f"{part}.weight")
        if change is not None:
            tensors[f"{part}.weight"] = change(weight)

    edit_tensors(folder, edit)
    with pytest.raises(SourceError, match=f"{part}.*{message}|{message}.*{part}"):
        read_layers(folder)


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


def test_weights_that_a_family_does_not_have_are_told_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.self_attn.q_norm.weight"] = torch.ones(16)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, file, {"format": "pt"})
    export(str(folder), tmp_path / "out", ExportOptions(compensation_rank=0))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line for line in told if "not used" in line] == [
        "model.layers.0.self_attn.q_norm.weight is not used: the family llama has no such weight, "
        "so a model that needs it answers differently"
    ]


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused_with_what_to_do(folder: Path, whole: bool) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    opened(folder)  # merged
    (folder / "adapter_model.safetensors").write_bytes(b"")
    if not whole:
        (folder / "config.json").unlink()
    assert "merge it into its model first" in refusal(UnsupportedError, folder)


def test_a_classifier_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["LlamaForSequenceClassification"])
    found = refusal(UnsupportedError, folder)
    assert "LlamaForSequenceClassification, which writes no text" in found


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(SourceError, folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff\xfe\x00"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
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
    assert "awq" in message and "BF16" in message


def test_weights_that_another_key_calls_quantized_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", compression_config={"format": "int-quantized"})
    assert "quantized" in refusal(UnsupportedError, folder)
    edit_json(folder / "config.json", compression_config=None)
    (folder / "hf_quant_config.json").write_text("{}")
    assert "quantized" in refusal(UnsupportedError, folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_quantized_without_a_word_are_refused(
    folder: Path, dtype: torch.dtype
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = (tensors[name] * 100).to(dtype)

    edit_tensors(folder, quantize)
    with pytest.raises(DashError, match=name):
        read_layers(folder)


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
    tmp_path: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    folder = save_as_bfloat16(tmp_path / "bf16", lambda _: None)
    model = dash_onnx.load(export_tiny(folder, calibration=(night,), variants=("full",)))
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
    wide_folder: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    model = dash_onnx.load(export_tiny(wide_folder, calibration=(night,)))
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
    wide_folder: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = export_tiny(wide_folder, calibration=(night,), variants=("int8",))
    assert dash_onnx.load(bundle).manifest.export.fp32_kept == ("embedding",)


def test_weights_beyond_half_are_refused_for_cuda_and_nothing_is_left(
    wide_folder: Path, night: Path, tmp_path: Path
) -> None:
    options = ExportOptions(device="cuda", calibration=(night,), variants=("full",))
    with pytest.raises(UnsupportedError, match="FP16's range") as caught:
        export(str(wide_folder), tmp_path / "out", options)
    assert "--device cpu" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_activations_beyond_half_are_refused_for_cuda(tmp_path: Path, night: Path) -> None:
    def enlarge(model: LlamaForCausalLM) -> None:
        for part in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            part.weight *= 2.0**13

    folder = save_as_bfloat16(tmp_path / "bf16", enlarge)
    options = ExportOptions(device="cuda", calibration=(night,))
    with pytest.raises(UnsupportedError, match=r"layer 1 gives .* export with --device cpu"):
        export(str(folder), tmp_path / "out", options)
    assert [*tmp_path.iterdir()] == [folder]


# The MODEL argument


@pytest.mark.parametrize(
    "model", ["nowhere", "/no/such/folder", "./nowhere", "nowhere/", "a/b/c", "~/x"]
)
def test_a_path_that_leads_nowhere_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"no model at {model}:" in refusal(SourceError, model)


def test_an_empty_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(SourceError, "")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    assert "neither a folder nor a .gguf file" in refusal(SourceError, path)


@pytest.mark.parametrize("model", ["org/no-such-model", "org/na me", "org/name?x", "-org/name"])
def test_a_hub_id_without_network_or_malformed_is_one_clear_error(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The variable HF_HUB_OFFLINE is read when the package is imported, into this constant.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal(SourceError, model)
    assert model in message and "hub" in message
