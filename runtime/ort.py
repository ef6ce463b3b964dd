"""The way to ONNX Runtime: found, new enough, one of its two packages, one global thread pool."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from dash_onnx.errors import BundleError, DeviceError

Device = Literal["cpu", "cuda"]

MINIMUM = (1, 24)
"""First ORT release with every operator of the graphs (TensorScatter, opset 24)."""

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_pool_lock = threading.Lock()
_pool_threads: int | None = None


@functools.cache
def onnxruntime() -> ModuleType:
    """Imports ONNX Runtime.

    Raises:
        DeviceError: missing, both packages installed, or too old; says the remedy.
    """
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(installed) == 2:
        raise DeviceError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "`pip uninstall onnxruntime onnxruntime-gpu`, then install dash-onnx[cpu] or [gpu]"
        )
    try:
        import onnxruntime
    except ImportError:
        raise DeviceError(
            "ONNX Runtime is not installed: `pip install 'dash-onnx[cpu]'` (or `[gpu]`)"
        ) from None
    check_version(onnxruntime.__version__)
    return onnxruntime


def check_version(version: str) -> None:
    """Refuses an ORT release that lacks operators of the graphs.

    Raises:
        DeviceError: older than `MINIMUM`.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise DeviceError(
            f"ONNX Runtime {version} is too old; `pip install -U 'onnxruntime>={wanted}'`"
        )


def check_device(device: str) -> None:
    """Refuses a device that this ONNX Runtime does not have.

    Raises:
        DeviceError: with the devices there are.
    """
    available = onnxruntime().get_available_providers()
    if device not in _PROVIDERS:
        raise DeviceError(f"unknown device {device!r}; choose from {', '.join(_PROVIDERS)}")
    if _PROVIDERS[device] not in available:
        have = [name for name, provider in _PROVIDERS.items() if provider in available]
        raise DeviceError(
            f"device {device!r} is not available in this ONNX Runtime (it has {', '.join(have)}); "
            "for cuda, install dash-onnx[gpu] and an NVIDIA driver"
        )


def use_global_threads(threads: int | None) -> None:
    """Sets the size of the one thread pool that all sessions of the process share.

    A pool per session, ORT's default, would leave the threads of one layer spinning on the
    cores that the next layer needs: 20 times slower. The pool cannot be resized later.

    Args:
        threads: intra-op threads; None takes all cores this process may use.
    """
    global _pool_threads
    with _pool_lock:
        if _pool_threads is None:
            _pool_threads = (
                threads or len(os.sched_getaffinity(0))
                if hasattr(os, "sched_getaffinity")
                else threads or os.cpu_count() or 1
            )
            onnxruntime().set_global_thread_pool_sizes(_pool_threads, 1)
        elif threads is not None and threads != _pool_threads:
            warnings.warn(
                f"threads={threads} ignored: ONNX Runtime's global pool has {_pool_threads} "
                "threads in this process and cannot be resized",
                RuntimeWarning,
                stacklevel=3,
            )


def create_session(model: Path | bytes, device: Device) -> Any:
    """Loads a graph on the global thread pool.

    Args:
        model: a file, or a serialized graph without external data.

    Raises:
        BundleError: ORT refuses the graph.
    """
    ort = onnxruntime()
    use_global_threads(None)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    # Each session would warn that its own thread options are unused.
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(model, options, providers=[_PROVIDERS[device]])
    except Exception as error:  # ORT raises types of its C extension, without a common base
        reason = str(error).splitlines()[0]
        name = "a graph in memory" if isinstance(model, bytes) else str(model)
        raise BundleError(f"ONNX Runtime cannot load {name}: {reason}") from None
    return session


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
