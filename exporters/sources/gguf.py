"""A GGUF file: its tensors by Hugging Face name, and the model described by its metadata."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
from dash_onnx.exporters.sources.gguf_blocks import KEPT, unpack
from dash_onnx.exporters.sources.gguf_config import MODEL_TYPES, config_of
from dash_onnx.exporters.sources.gguf_layout import Layout
from dash_onnx.exporters.sources.gguf_tokenizer import end_tokens, tokenizer_of
from dash_onnx.exporters.sources.license import license_of
from dash_onnx.exporters.sources.source import (
    Source,
    check_layers,
    check_supported,
    finite,
    layers_in,
    left_of,
    readable,
)

_XIELU = {"alpha_n": (1,), "alpha_p": (1,), "beta": (), "eps": ()}  # shapes per layer


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
        """Maps the names of `tensors`, reading none; `told` holds weights from the metadata."""
        self._told = told
        self._requantize = requantize
        arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
        assert isinstance(arch, MODEL_ARCH)
        # Heads that draft more tokens are stored as layers after the model's own.
        self._names = get_tensor_name_map(arch, layers_in(tensors))
        self._tensors = tensors
        self._layout = Layout(architecture, config)
        self._read_so_far = set[str]()

    def _find(self, name: str) -> Any:
        mapped = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name == "lm_head.weight":
            mapped = "output.weight"  # missing from gguf's list for LFM 2 MoE
        return self._tensors.get(mapped) if mapped else None

    def __contains__(self, name: str) -> bool:
        return name in self._told or all(
            self._find(part) is not None for part in self._layout.parts(name)
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        if name in self._told:
            return tuple(self._told[name].shape)
        shapes = [self._stored_shape(part) for part in self._layout.parts(name)]
        parts = [torch.empty(shape, device="meta") for shape in shapes]
        return tuple(readable(name, lambda: self._layout.joined(name, parts)).shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        return finite(name, self._told[name]) if name in self._told else self._read(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Weights`."""
        return self._read(name, slice(start, stop))

    def _read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        def read() -> torch.Tensor:
            parts = [self._part(name, part, rows) for part in self._layout.parts(name)]
            return self._layout.joined(name, parts)

        return finite(name, readable(name, read))

    def _stored_shape(self, name: str) -> list[int]:
        return list(reversed(self._stored(name).shape.tolist()))

    def _stored(self, part: str) -> Any:
        if (tensor := self._find(part)) is None:
            raise SourceError(f"the GGUF file has no tensor for {part!r}")
        return tensor

    def _part(self, name: str, part: str, rows: slice | None) -> torch.Tensor:
        tensor = self._stored(part)
        self._read_so_far.add(tensor.name)
        data, shape = tensor.data, self._stored_shape(part)
        if rows is not None:
            # Read through the mapping of the whole file, they would stay in memory.
            shape[0] = rows.stop - rows.start
            place = tensor.data_offset + rows.start * data.strides[0]
            data = np.memmap(data.filename, data.dtype, "r", place, (shape[0], *data.shape[1:]))
        try:
            values = dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedError(
                f"GGUF tensor type {tensor.tensor_type.name} of {name} cannot be dequantized; "
                "use a file of another quantization"
            ) from None
        values = np.asarray(values, np.float32).reshape(shape)
        if (scale := self._scale(tensor)) is not None:
            values = values * scale.reshape(-1, *[1] * (values.ndim - 1))
        values = self._layout.values(name, values)
        # Values that needed no dequantization are still mapped read-only.
        return torch.from_numpy(values if values.flags.writeable else np.array(values))

    def _scale(self, tensor: Any) -> np.ndarray | None:
        """Factor on a whole tensor, or on each expert's part of it; few files have one."""
        found = self._tensors.get(f"{tensor.name.removesuffix('.weight')}.scale")
        return None if found is None else np.array(found.data, np.float32)

    def packed(self, name: str) -> Quantized | None:
        """See `Weights`."""
        tensor = None if self._requantize else self._find(name)
        if tensor is None or self._scale(tensor) is not None:
            return None
        quantized = unpack(np.asarray(tensor.data), tensor.tensor_type)
        if quantized is not None:
            self._read_so_far.add(tensor.name)
        return quantized and readable(name, lambda: self._layout.packed(name, quantized))

    def unread(self, prefix: str) -> list[str]:
        """See `Weights`."""
        layer = prefix.rstrip(".").rpartition(".")[2]
        return left_of(self._tensors, self._read_so_far, f"blk.{layer}.")


def _told(values: Mapping[str, Any], layers: int) -> dict[str, torch.Tensor]:
    """Weights stored in the metadata, by Hugging Face name: the parameters of xIELU."""
    return {
        f"model.layers.{layer}.mlp.act_fn.{name}": torch.tensor(values[key][layer]).view(shape)
        for name, shape in _XIELU.items()
        if (key := f"xielu.{name}") in values
        for layer in range(layers)
    }


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults of the metadata, named as in generation_config.json.

    Files do not say whether the model samples: any of the first four keys means that it does.
    """
    kinds = {"temp": float, "top_k": int, "top_p": float, "min_p": float, "penalty_repeat": float}
    given = {
        name: kind(values[key])
        for name, kind in kinds.items()
        if (key := f"general.sampling.{name}") in values
    }
    penalty = given.pop("penalty_repeat", 1.0)
    found: dict[str, Any] = {} if penalty == 1.0 else {"repetition_penalty": penalty}
    if not given:
        return found
    temperature = max(given.pop("temp", 1.0), 0.0)
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # as are values out of range in llama.cpp
    for name, value in given.items():
        found[name] = value if value > 0 and (name == "top_k" or value <= 1) else off[name]
    return {**found, "do_sample": temperature > 0, "temperature": temperature}


def _reader(path: Path, parts: int) -> GGUFReader:
    if not path.is_file():
        raise SourceError(f"{path} is missing: the model is split into {parts} parts")

    def read() -> GGUFReader:
        try:
            return GGUFReader(path)
        except ValueError as error:
            if "GGMLQuantizationType" not in str(error):
                raise
            raise UnsupportedError(
                f"{path} has tensors of a type that the package gguf does not know ({error}); use "
                "a file of another quantization, or the safetensors release"
            ) from None

    return readable(path, read, "is not a GGUF file, or incomplete")


def open_gguf(path: Path, supported: Collection[str], requantize: bool = False) -> Source:
    """Opens a GGUF file.

    Args:
        path: path of the file, or of one part of a split model.
        supported: the model types that have an exporter.
        requantize: never return the file's own integers.

    Raises:
        SourceError: the file is damaged or lacks something.
        UnsupportedError: no exporter supports the architecture or something it requires.
    """
    parts = [path.with_name(part) for part in parts_of(path.name)]
    readers = [_reader(part, len(parts)) for part in parts]

    def read() -> dict[str, Any]:
        return {key: field.contents() for key, field in readers[0].fields.items()}

    values = readable(parts[0], read, "is not a GGUF file, or incomplete")
    architecture = str(values.get("general.architecture"))
    if architecture not in MODEL_TYPES:
        raise UnsupportedError(
            f"architecture {architecture!r} is not read from GGUF; those read are "
            f"{', '.join(sorted(MODEL_TYPES))}. More families are read from safetensors: see "
            "docs/reference/models.md"
        )
    if (values.get("split.count") or 1) != len(parts):
        raise SourceError(
            f"{path} is one of {values.get('split.count', 1)} parts by its content, but one of "
            f"{len(parts)} by its name: give the parts their original names"
        )
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    # Before lists of that length are built.
    check_layers(path, values.get(f"{architecture}.block_count"), layers_in(tensors))
    config = readable(path, lambda: config_of(architecture, values, tensors))
    check_supported(config.model_type, supported)
    told = readable(path, lambda: _told(values, config.num_hidden_layers))
    weights = readable(path, lambda: GGUFWeights(tensors, architecture, config, requantize, told))
    layers = [tensor for name, tensor in tensors.items() if name.startswith("blk.")]
    exact = sum(tensor.n_elements for tensor in layers if tensor.tensor_type in KEPT)
    tokenizer = readable(path, lambda: tokenizer_of(architecture, values))
    generation = GenerationConfig.from_model_config(config)
    generation.update(eos_token_id=end_tokens(values), **readable(path, lambda: _sampling(values)))
    return Source(
        kind="gguf",
        name=printable(stem_of(path.name)),  # file names may hold any bytes
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        generation_config=generation,
        files=tuple(parts),
        integers=2 * exact > sum(tensor.n_elements for tensor in layers),
        license=license_of(values, "general.license", "general.license.name"),
    )
