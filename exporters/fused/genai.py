"""The configuration that ONNX Runtime GenAI reads along with the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.text import TextCodec
from dash_onnx.exporters.fused.facts import MODEL

_TYPES = {"short_conv": "lfm2", "gated_delta": "qwen3_5_text"}
"""GenAI's types of models by the layers that keep states; it runs all others as a Llama."""

_SAMPLING = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What GenAI's search takes of the sampling that a model recommends, and its defaults."""

_SPACE = "\u2581"
_LAYERS = {"attention": "full_attention", "short_conv": "conv", "gated_delta": "linear_attention"}


def genai_config(bundle: Bundle) -> str:
    """The configuration that ONNX Runtime GenAI reads along with the graph."""
    facts = bundle.manifest.model
    stored = json.loads(bundle.verified("generation_config.json").read_text("utf-8"))
    eos = stored.get("eos_token_id")
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "dash-onnx", "provider_options": []},
        "filename": MODEL,
        "head_size": facts.head_dim,
        "hidden_size": facts.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": facts.num_heads,
        "num_hidden_layers": facts.num_layers,
        "num_key_value_heads": facts.num_kv_heads,
    }
    if bundle.manifest.mixers:
        _add_states(decoder, bundle.manifest)
    kinds = [_TYPES[mixer] for mixer in bundle.manifest.mixers if mixer in _TYPES]
    model: dict[str, Any] = {
        "type": kinds[0] if kinds else "llama",
        "bos_token_id": stored.get("bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": stored.get("pad_token_id", eos[0] if isinstance(eos, list) else eos),
        "context_length": facts.max_length,
        "vocab_size": facts.vocab_size,
        "decoder": decoder,
    }
    sampling = TextCodec(bundle).sampling
    search = {
        "do_sample": sampling.get("temperature", 0.0) > 0,
        "max_length": facts.max_length,
        "min_length": 0,
        "num_beams": 1,
        "past_present_share_buffer": True,
        **{key: sampling.get(key, off) for key, off in _SAMPLING.items()},
    }
    model = {key: value for key, value in model.items() if value is not None}
    return json.dumps({"model": model, "search": search}, indent=2) + "\n"


def _add_states(decoder: dict[str, Any], manifest: Manifest) -> None:
    """Names the states of layers without K/V."""
    assert manifest.recurrence is not None
    decoder["layer_types"] = [_LAYERS[mixer] for mixer in manifest.mixers]
    decoder["conv_cache_size"] = manifest.recurrence.kernel - 1
    states = {state for mixer in manifest.mixers for state in manifest.dims.state_shapes(mixer)}
    for state in sorted(states):
        decoder["inputs"][f"past_{state}_names"] = f"past.%d.{state}"
        decoder["outputs"][f"present_{state}_names"] = f"present.%d.{state}"


def adapt_tokenizer(folder: Path) -> None:
    """Changes a SentencePiece tokenizer for GenAI, which would treat several spaces in another way.

    It merges them as the tokenizer says only in the class `GemmaTokenizer`. An added token of
    several spaces is shown as it is stored; if the vocabulary has it, too, that is decoded.
    """
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer, facts = (json.loads(file.read_text("utf-8")) for file in (path, config))
    if not _writes_spaces(tokenizer.get("normalizer")):
        return
    known = tokenizer["model"]["vocab"]
    tokenizer["added_tokens"] = [
        token
        for token in tokenizer.get("added_tokens") or ()
        if token["special"] or token["content"].strip(_SPACE) or token["content"] not in known
    ]
    facts["tokenizer_class"] = "GemmaTokenizer"
    for file, data in ((path, tokenizer), (config, facts)):
        file.write_text(json.dumps(data, ensure_ascii=False, indent=2), "utf-8")


def _writes_spaces(normalizer: Any) -> bool:
    """Whether a normalizer replaces spaces with SentencePiece's letter for them."""
    if not isinstance(normalizer, dict):
        return False
    if normalizer.get("type") == "Sequence":
        return any(map(_writes_spaces, normalizer["normalizers"]))
    return normalizer.get("type") == "Replace" and normalizer.get("content") == _SPACE
