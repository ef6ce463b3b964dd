"""A GGUF file: its tensors by Hugging Face name, and what its metadata says of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from transformers import GenerationConfig, PretrainedConfig

from dash_onnx.core.errors import SourceError, UnsupportedError, printable
from dash_onnx.core.gguf import parts_of, stem_of
from dash_onnx.exporters.quantize.blockwise import Quantized
from dash_onnx.exporters.sources.gguf_blocks import unpack
from dash_onnx.exporters.sources.gguf_config import MODEL_TYPES, config_of
from dash_onnx.exporters.sources.gguf_tokenizer import end_tokens, tokenizer_of
from dash_onnx.exporters.sources.license import license_of
from dash_onnx.exporters.sources.source import (
    Source,
    check_layers,
    check_supported,
    finite,
    layers_in,
    readable,
)

# llama.cpp rotates neighbours in these, so their rows of Q and K are stored in that order.
_INTERLEAVED_ROPE = ("arcee", "granite", "llama", "mistral3", "smollm3")
_CONV = ".conv.conv.weight"  # stored `[D, kernel]`
_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Tensors `[E, N, K]` of all experts of a layer, by the name in transformers, which stacks them."""

_XIELU = {"alpha_n": (1,), "alpha_p": (1,), "beta": (), "eps": ()}  # shapes of a layer's


class GGUFWeights:
    """Tensors of a GGUF file by Hugging Face name, dequantized to float32 at look-up."""

    def __init__(
        self,
        tensors: Mapping[str, Any],
        architecture: str,
        config: PretrainedConfig,
        requantize: bool,
        told: Mapping[str, torch.Tensor],
    ):
        """Maps names of `tensors`; reads none. Those of `told` are in the metadata."""
        self._told = told
        self._requantize = requantize
        arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
        assert isinstance(arch, MODEL_ARCH)
        self._names = get_tensor_name_map(arch, config.num_hidden_layers)
        self._tensors = tensors
        self._architecture = architecture
        self._heads = config.num_attention_heads
        self._kv_heads = getattr(config, "num_key_value_heads", None) or self._heads

    @property
    def num_layers(self) -> int:
        """See `Weights`."""
        return layers_in(self._tensors)

    def _find(self, name: str) -> Any:
        mapped = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return self._tensors.get(mapped) if mapped else None

    def __contains__(self, name: str) -> bool:
        return name in self._told or all(self._find(part) is not None for part in _parts(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        if name in self._told:
            return tuple(self._told[name].shape)
        found = [tuple(reversed(self._find(part).shape.tolist())) for part in _parts(name)]
        if len(found) > 1:
            return found[0][0], sum(shape[1] for shape in found), *found[0][2:]
        return (found[0][0], 1, *found[0][1:]) if name.endswith(_CONV) else found[0]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._told:
            return finite(name, self._told[name])
        if (parts := _parts(name)) != [name]:
            return torch.cat([self[part] for part in parts], 1)
        tensor = self._find(name)
        if tensor is None:
            raise SourceError(f"the GGUF file has no tensor for {name!r}")
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedError(
                f"GGUF tensor type {tensor.tensor_type.name} of {name} cannot be dequantized; "
                "use a file of another quantization"
            ) from None
        values = np.asarray(values, np.float32).reshape(self.shape(name))
        if self._architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            values = values - np.float32(1)  # stored as what it multiplies by
        values = self._rows(name, values)
        # What was not computed is still the file itself, mapped read-only.
        values = values if values.flags.writeable else np.array(values)
        return finite(name, torch.from_numpy(values))

    def packed(self, name: str) -> Quantized | None:
        """See `Weights`."""
        tensor = None if self._requantize else self._find(name)
        if tensor is None:
            return None
        quantized = unpack(np.asarray(tensor.data), tensor.tensor_type)
        return quantized and quantized.map(partial(self._rows, name))

    def _rows(self, name: str, values: np.ndarray) -> np.ndarray:
        """Rows in the order of Hugging Face."""
        shape = values.shape
        if self._architecture in _INTERLEAVED_ROPE:
            heads = {"q_proj": self._heads, "k_proj": self._kv_heads}
            count = next((n for part, n in heads.items() if f".{part}." in name), None)
            if count is not None:
                paired = values.reshape(count, shape[0] // count // 2, 2, *shape[1:])
                return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(shape)
        if self._architecture == "gptneox" and ".query_key_value." in name:
            # Stored: all queries, all keys, all values; the model has them head by head.
            by_kind = values.reshape(3, self._heads, shape[0] // self._heads // 3, *shape[1:])
            return np.ascontiguousarray(by_kind.swapaxes(0, 1)).reshape(shape)
        return values


def _parts(name: str) -> list[str]:
    """Names of the tensors that a weight is stored in."""
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith(".experts") or last not in _EXPERTS:
        return [name]
    return [f"{prefix}.{part}.weight" for part in _EXPERTS[last]]


def _told(values: Mapping[str, Any], layers: int) -> dict[str, torch.Tensor]:
    """Weights that the metadata hold, by Hugging Face name: the parameters of xIELU."""
    return {
        f"model.layers.{layer}.mlp.act_fn.{name}": torch.tensor(values[key][layer]).view(shape)
        for name, shape in _XIELU.items()
        if (key := f"xielu.{name}") in values
        for layer in range(layers)
    }


def _reader(path: Path, parts: int) -> GGUFReader:
    if not path.is_file():
        raise SourceError(f"{path} is missing: the model is split into {parts} parts")
    return readable(path, lambda: GGUFReader(path), "is not a readable GGUF file")


def open_gguf(path: Path, supported: Collection[str], requantize: bool = False) -> Source:
    """Opens a GGUF file.

    Args:
        path: of the file, or of one of the parts of a model that is split.
        supported: the model types that have an exporter.
        requantize: never give the file's own integers.

    Raises:
        SourceError: the file is damaged or lacks something.
        UnsupportedError: no exporter has the architecture or something it asks for.
    """
    parts = [path.with_name(part) for part in parts_of(path.name)]
    readers = [_reader(part, len(parts)) for part in parts]

    def read() -> dict[str, Any]:
        return {key: field.contents() for key, field in readers[0].fields.items()}

    values = readable(parts[0], read, "is not a readable GGUF file")
    architecture = str(values.get("general.architecture"))
    check_supported(MODEL_TYPES.get(architecture, architecture), supported)
    if (values.get("split.count") or 1) != len(parts):
        raise SourceError(
            f"{path} is one of {values.get('split.count', 1)} parts by its content, but one of "
            f"{len(parts)} by its name: give the parts the names that they had"
        )
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    # Before lists of that length are made.
    check_layers(path, values.get(f"{architecture}.block_count"), layers_in(tensors))
    config = readable(path, lambda: config_of(architecture, values, tensors))
    check_supported(config.model_type, supported)
    told = readable(path, lambda: _told(values, config.num_hidden_layers))
    weights = readable(path, lambda: GGUFWeights(tensors, architecture, config, requantize, told))
    tokenizer = readable(path, lambda: tokenizer_of(architecture, values))
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = end_tokens(values)
    return Source(
        kind="gguf",
        name=printable(stem_of(path.name)),  # of a file, any bytes
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        generation_config=generation,
        files=tuple(parts),
        license=license_of(values, "general.license", "general.license.name"),
    )
