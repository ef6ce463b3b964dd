"""Dynamic layer skipping and per-token mixed precision for LLMs on ONNX Runtime.

>>> import dash_onnx
>>> model = dash_onnx.load("out/")                                      # doctest: +SKIP
>>> print(model.chat([{"role": "user", "content": "Hello!"}]))          # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_onnx.core.errors import ContextLengthError, DashError
from dash_onnx.core.version import __version__

if TYPE_CHECKING:
    from dash_onnx.exporters.api import export, fuse, train
    from dash_onnx.runtime.cache import Cache
    from dash_onnx.runtime.grammar import Grammar
    from dash_onnx.runtime.load import load
    from dash_onnx.runtime.model import Model
    from dash_onnx.runtime.options import GenerationOptions
    from dash_onnx.runtime.results import Chunk, GeneratedToken, ScoredToken
    from dash_onnx.runtime.stream import Completion, Stream

_HERE = Path(__file__).parent
if not (_HERE / "runtime").is_dir():  # in a clone, they lie beside this package
    __path__.append(str(_HERE.parent))

_LAZY = {
    "Cache": "runtime.cache",
    "Chunk": "runtime.results",
    "Completion": "runtime.stream",
    "GeneratedToken": "runtime.results",
    "GenerationOptions": "runtime.options",
    "Grammar": "runtime.grammar",
    "Model": "runtime.model",
    "ScoredToken": "runtime.results",
    "Stream": "runtime.stream",
    "export": "exporters.api",
    "fuse": "exporters.api",
    "load": "runtime.load",
    "train": "exporters.api",
}

__all__ = [
    "Cache",
    "Chunk",
    "Completion",
    "ContextLengthError",
    "DashError",
    "GeneratedToken",
    "GenerationOptions",
    "Grammar",
    "Model",
    "ScoredToken",
    "Stream",
    "__version__",
    "export",
    "fuse",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    # The exporter must not pay for the runtime's imports, nor `--help` for ORT's.
    if name in _LAZY:
        return getattr(importlib.import_module(f"dash_onnx.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
