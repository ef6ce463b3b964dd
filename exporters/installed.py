"""Checks whether the packages of the extra `export` are installed, without loading them."""

from __future__ import annotations

import importlib.util

from dash_onnx.core.errors import DashError


def require() -> None:
    """Checks that everything an export imports is installed.

    Raises:
        DashError: some packages are missing.
    """
    missing = [
        name
        for name in ("torch", "transformers", "accelerate", "onnx", "onnxscript", "gguf")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise DashError(
            f"reading a model needs {', '.join(missing)}: in a clone of dash-onnx, "
            "`pip install '.[cpu,export]'`"
        )
