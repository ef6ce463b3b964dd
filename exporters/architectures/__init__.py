"""The registry of model families: one small module each, mapping config and weight names."""

from __future__ import annotations

from transformers import PretrainedConfig

from dash_onnx.errors import UnsupportedError
from dash_onnx.exporters.architectures import llama
from dash_onnx.exporters.architectures.base import Architecture

REGISTRY: dict[str, Architecture] = {"llama": llama.Llama()}
"""By `model_type` of the Hugging Face config."""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Returns the exporter of a model family.

    Raises:
        UnsupportedError: there is none.
    """
    try:
        return REGISTRY[config.model_type]
    except KeyError:
        raise UnsupportedError(
            f"architecture {config.model_type!r} is not supported; "
            f"supported: {', '.join(sorted(REGISTRY))}"
        ) from None


__all__ = ["REGISTRY", "Architecture", "architecture_of"]
