"""Dynamic layer skipping and per-token mixed precision for LLMs on ONNX Runtime.

>>> import dash_onnx
>>> model = dash_onnx.load("out/")                                      # doctest: +SKIP
>>> print(model.chat([{"role": "user", "content": "Hello!"}]))          # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dash_onnx.core.errors import DashError
from dash_onnx.core.version import __version__

if TYPE_CHECKING:
    from dash_onnx.runtime.engine import Model, load

__all__ = ["DashError", "Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # The exporter must not pay for the runtime's imports, nor `--help` for ORT's.
    if name in ("Model", "load"):
        from dash_onnx.runtime import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
