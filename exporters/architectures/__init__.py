"""The registry of model families: one small module each, mapping config and weight names."""

from __future__ import annotations

from transformers import PretrainedConfig

from dash_onnx.core.errors import UnsupportedError
from dash_onnx.exporters.architectures.base import Architecture
from dash_onnx.exporters.architectures.gemma import Gemma2, Gemma3
from dash_onnx.exporters.architectures.gpt_neox import GPTNeoX
from dash_onnx.exporters.architectures.granite import Granite
from dash_onnx.exporters.architectures.llama import Llama
from dash_onnx.exporters.architectures.mistral import Mistral
from dash_onnx.exporters.architectures.olmo2 import Olmo2
from dash_onnx.exporters.architectures.phi3 import Phi3
from dash_onnx.exporters.architectures.qwen import Qwen2, Qwen3
from dash_onnx.exporters.architectures.smollm3 import SmolLM3
from dash_onnx.exporters.architectures.stablelm import StableLM

REGISTRY: dict[str, Architecture] = {
    "gemma2": Gemma2(),
    "gemma3_text": Gemma3(),
    "gpt_neox": GPTNeoX(),
    "granite": Granite(),
    "llama": Llama(),
    "mistral": Mistral(),
    "olmo2": Olmo2(),
    "phi3": Phi3(),
    "qwen2": Qwen2(),
    "qwen3": Qwen3(),
    "smollm3": SmolLM3(),
    "stablelm": StableLM(),
}
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
