"""A GGUF file: config and tokenizer through transformers, tensors through the gguf package."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from dash_onnx.errors import SourceError, UnsupportedError
from dash_onnx.exporters.quantize import Quantized
from dash_onnx.exporters.sources.blocks import unpack
from dash_onnx.exporters.sources.folder import check_supported, readable
from dash_onnx.exporters.sources.source import Source

# llama.cpp stores the rows of Q and K of these architectures in interleaved RoPE order.
_INTERLEAVED_ROPE = {"llama"}

# Pre-tokenizers that split digits one by one before GPT-2's pattern (llama.cpp, llama-vocab.cpp).
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}


class GGUFWeights:
    """Tensors of a GGUF file by Hugging Face name, dequantized to float32 at look-up."""

    def __init__(self, reader: GGUFReader, architecture: str, config: Any, requantize: bool):
        """Maps names; reads no tensor."""
        self._requantize = requantize
        arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
        assert isinstance(arch, MODEL_ARCH)
        self._names = get_tensor_name_map(arch, config.num_hidden_layers)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._heads = {}
        if architecture in _INTERLEAVED_ROPE:
            self._heads = {
                "q_proj": config.num_attention_heads,
                "k_proj": config.num_key_value_heads,
            }

    def _find(self, name: str) -> Any:
        mapped = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return self._tensors.get(mapped) if mapped else None

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __getitem__(self, name: str) -> torch.Tensor:
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
        values = np.array(values, np.float32).reshape(tuple(reversed(tensor.shape.tolist())))
        return torch.from_numpy(self._rows(name, values))

    def packed(self, name: str) -> Quantized | None:
        """See `Weights`."""
        tensor = None if self._requantize else self._find(name)
        if tensor is None:
            return None
        quantized = unpack(np.asarray(tensor.data), tensor.tensor_type)
        return quantized and quantized.map(partial(self._rows, name))

    def _rows(self, name: str, values: np.ndarray) -> np.ndarray:
        """Rows in the order of Hugging Face."""
        heads = next((n for part, n in self._heads.items() if f".{part}." in name), None)
        if heads is None:
            return values
        rows = values.shape[0] // heads
        paired = values.reshape(heads, rows // 2, 2, *values.shape[1:])
        return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)


def open_gguf(path: Path, supported: Collection[str], requantize: bool = False) -> Source:
    """Opens a GGUF file.

    Args:
        path: of the file.
        supported: the architectures that have an exporter.
        requantize: never give the file's own integers.

    Raises:
        SourceError: the file is damaged or has no tokenizer.
        UnsupportedError: the architecture or its RoPE scaling has no exporter.
    """
    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise SourceError(f"{path} is not a readable GGUF file ({error})") from None
    check_supported(architecture, supported)
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    kind = str(scaling.contents()) if scaling is not None else "none"
    if kind != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise UnsupportedError(
            f"{path} uses RoPE scaling, which is not read from GGUF yet; "
            "export the safetensors release of the model instead"
        )
    folder = str(path.parent)
    config = readable(path, lambda: AutoConfig.from_pretrained(folder, gguf_file=path.name))
    tokenizer = readable(path, lambda: AutoTokenizer.from_pretrained(folder, gguf_file=path.name))
    pre = reader.fields.get("tokenizer.ggml.pre")
    if pre is not None and str(pre.contents()) in _DIGITS_APART:
        # transformers 5.24 keeps GPT-2's pattern alone, which joins digits and spaces.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return Source(
        kind="gguf",
        name=path.stem,
        config=config,
        weights=GGUFWeights(reader, architecture, config, requantize),
        tokenizer=tokenizer,
        generation_config=GenerationConfig.from_model_config(config),
    )
