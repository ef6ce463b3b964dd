"""What the exporter needs of a model, wherever it comes from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from dash_onnx.core.errors import UnsupportedError
from dash_onnx.exporters.quantize.blockwise import Quantized


class Weights(Protocol):
    """Tensors by their Hugging Face name, read from disk at each look-up."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...

    def packed(self, name: str) -> Quantized | None:
        """The weight as integers, where the source stores them in a form that graphs can hold."""
        ...


@dataclass(frozen=True)
class Source:
    """A causal LM opened for reading; no weight has been read yet.

    Attributes:
        kind: how it is stored.
        name: short name, for the manifest.
        config: transformers configuration; its `model_type` selects the architecture.
        weights: tensors by Hugging Face name.
        tokenizer: a tokenizer with a `tokenizers` backend.
        generation_config: EOS ids and sampling defaults.
        files: what all of this is read from.
        revision: commit of a hub id.
    """

    kind: Literal["hub", "folder", "gguf"]
    name: str
    config: PretrainedConfig
    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig
    files: tuple[Path, ...]
    revision: str | None = None

    def save_text_files(self, folder: Path) -> None:
        """Tokenizer, chat template, and both configurations, as transformers writes them."""
        self.tokenizer.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        self.config.to_json_file(folder / "config.json")


def check_supported(model_type: str, supported: Collection[str]) -> None:
    """Refuses an architecture without exporter, naming those that have one.

    Raises:
        UnsupportedError: `model_type` is not in `supported`.
    """
    if model_type not in supported:
        raise UnsupportedError(
            f"architecture {model_type!r} is not supported; supported: "
            + ", ".join(sorted(supported))
        )
