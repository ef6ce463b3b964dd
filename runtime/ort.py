"""Access to ONNX Runtime: one of its two packages, recent enough, with one global thread pool."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import logging
import os
import re
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from dash_onnx.core.errors import BundleError, DeviceError, first_line

Device = Literal["cpu", "cuda"]

MINIMUM: dict[Device, tuple[int, int]] = {"cpu": (1, 32), "cuda": (1, 28)}
"""Oldest ORT by device: 1.32 is the first whose attention takes `query_seqlens` on the CPU."""

_CPU, _GPU = "onnxruntime", "onnxruntime-gpu"
_WEIGHTS = "session.model_external_initializers_file_folder_path"
_UNPACKED = "session.disable_prepacking"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_OPTIONS: dict[Device, dict[str, str]] = {
    "cpu": {},
    # Weights are allocated without rounding up; the scorer needs FP32.
    "cuda": {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"},
}
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_LOG = logging.getLogger(__name__)
_pool_lock = threading.Lock()
_pool_threads: int | None = None  # 1: no pool


@functools.cache
def onnxruntime() -> ModuleType:
    """Imports ONNX Runtime.

    Raises:
        DeviceError: missing, both packages installed, or too old; names the remedy.
    """
    installed = [name for name in (_CPU, _GPU) if _version(name)]
    if len(installed) == 2:
        raise DeviceError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "`pip uninstall onnxruntime onnxruntime-gpu`, then install the extra [cpu] or [gpu]"
        )
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None
        found = f"does not start ({error})" if installed else "is not installed"
        raise DeviceError(
            f"ONNX Runtime {found}: in a clone of dash-onnx, `pip install '.[cpu]'` (or `[gpu]`)"
        ) from None
    check_version(onnxruntime.__version__, "cuda" if installed == [_GPU] else "cpu")
    return onnxruntime


def check_version(version: str, device: Device) -> None:
    """Refuses an ORT release that lacks operators of a device's graphs.

    Raises:
        DeviceError: older than `MINIMUM`.
    """
    numbers, least = re.findall(r"\d+", version)[:2], MINIMUM[device]
    if tuple(map(int, numbers)) < least:
        package = f"{_GPU if _version(_GPU) else _CPU}>={'.'.join(map(str, least))}"
        raise DeviceError(
            f"ONNX Runtime {version} is too old for the device {device!r}; "
            f"`pip install -U '{package}'`"
        )


def check_device(device: str) -> None:
    """Refuses a device that this ONNX Runtime does not have, or is too old for.

    Raises:
        DeviceError: names the devices there are, or the release that the device needs.
    """
    known_device(device)
    if not has_device(device):
        have = [name for name in _PROVIDERS if has_device(name)]
        raise DeviceError(
            f"device {device!r} is not available in this ONNX Runtime (it has {', '.join(have)}); "
            "for cuda, install the extra `[gpu]` and an NVIDIA driver"
        )
    if device == "cpu":  # the package for CUDA may be older
        check_version(onnxruntime().__version__, "cpu")


def known_device(device: str) -> None:
    """Refuses an unknown device.

    Raises:
        DeviceError: names those there are.
    """
    if not isinstance(device, str) or device not in _PROVIDERS:
        raise DeviceError(f"unknown device {device!r}; choose from {', '.join(_PROVIDERS)}")


def has_device(device: str) -> bool:
    """Whether this ONNX Runtime can run on a device."""
    return _PROVIDERS[device] in onnxruntime().get_available_providers()


def use_threads(threads: int | None, *, share: bool = True) -> None:
    """Sets the threads of all sessions of the process, once.

    They share ORT's global pool, and so do the other sessions of an app. A pool per session, ORT's
    default, would leave the threads of one layer spinning on the cores that the next layer needs:
    20 times slower. The pool cannot be resized later. With one thread there is no pool at all, so
    that the other sessions of an app stay as they are.

    Args:
        threads: intra-op threads; None takes all cores this process may use.
        share: make the app's later sessions use the pool; the first call with a pool decides.
    """
    global _pool_threads
    if threads is not None and threads > _usable_cores():
        _LOG.warning(
            "threads=%d exceeds the %d cores that this process may use: threads will wait for "
            "each other, which is slower",
            threads,
            _usable_cores(),
        )
    with _pool_lock:
        if _pool_threads is None or (_pool_threads == 1 and threads != 1):
            wanted = threads or _usable_cores()
            if wanted > 1 and _set_pool(wanted):
                if share:
                    _share_pool()
            elif wanted > 1 and threads is not None:
                _warn(threads, "was set by this app")
            _pool_threads = wanted
        elif threads is not None and threads != _pool_threads:
            _warn(threads, f"has {_pool_threads} threads")


def _set_pool(threads: int) -> bool:
    """Sets the global pool; returns False if an app has set it before."""
    try:
        onnxruntime().set_global_thread_pool_sizes(threads, 1)
    except Exception as error:  # ORT raises types of its C extension, without a common base
        if "already been created" not in str(error):
            raise
        return False
    return True


def _share_pool() -> None:
    """Gives the pool to the app's own sessions, too: ORT refuses those that want one of their own.

    An app does not know of the pool, so the options of its sessions are changed while they are
    created, and then restored.
    """
    session, new_options = onnxruntime().InferenceSession, onnxruntime().SessionOptions
    create, lock = session.__init__, threading.Lock()

    @functools.wraps(create)
    def create_on_pool(
        self: Any, path_or_bytes: Any, sess_options: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        options = sess_options or new_options()
        with lock:  # several sessions may share the options
            before = options.use_per_session_threads, options.intra_op_num_threads
            options.use_per_session_threads = False
            options.intra_op_num_threads = 0  # ORT would warn that it is ignored
            try:
                create(self, path_or_bytes, options, *args, **kwargs)
                # `set_providers` creates the session again with these.
                self._sess_options_initial = self.get_session_options()
            finally:
                options.use_per_session_threads, options.intra_op_num_threads = before

    session.__init__ = create_on_pool


def _warn(threads: int, why: str) -> None:
    warnings.warn(
        f"threads={threads} ignored: ONNX Runtime's global pool {why} in this process and cannot "
        "be resized",
        RuntimeWarning,
        stacklevel=4,
    )


def thread_count() -> int:
    """Threads that a layer runs on."""
    return _pool_threads or _usable_cores()


def _usable_cores() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    with contextlib.suppress(
        OSError, ValueError
    ):  # no container, or without a limit, which is "max"
        quota, period = map(int, _QUOTA.read_text("ascii").split())
        count = max(1, min(count, quota // period))
    return count


def create_session(
    model: Path | bytes,
    device: Device,
    stream: int | None = None,
    weights: Path | None = None,
    *,
    packed: bool = True,
) -> Any:
    """Loads a graph on the global thread pool.

    Args:
        model: a file, or a serialized graph.
        device: where it runs.
        stream: address of the CUDA stream that it runs on; None takes one of ORT's own.
        weights: folder of the external data of a serialized graph.
        packed: let ORT prepack the weights, into a copy in memory; else they stay in their file,
            which it maps, and matrix products are slow.

    Raises:
        BundleError: ORT refuses the graph.
        DeviceError: the libraries of CUDA are missing.
    """
    ort = onnxruntime()
    if _pool_threads is None:
        use_threads(None)
    options = ort.SessionOptions()
    options.use_per_session_threads = _pool_threads == 1
    if options.use_per_session_threads:
        options.intra_op_num_threads = 1
    # An arena per session keeps every session's intermediate tensors in separate, cold memory; the
    # process heap hands the same hot blocks from layer to layer: 6 % faster INT4 decoding.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Each session would warn that its own thread options are unused.
    options.log_severity_level = 3
    if weights is not None:
        options.add_session_config_entry(_WEIGHTS, str(weights))
    if not packed:
        options.add_session_config_entry(_UNPACKED, "1")
    if device == "cuda":
        prepare_cuda()
    own = {} if stream is None else {"user_compute_stream": str(stream)}
    provider = _PROVIDERS[device], {**_OPTIONS[device], **own}
    session = object.__new__(ort.InferenceSession)
    # Our sessions load in parallel, those of an app one by one: see `_share_pool`.
    create = getattr(ort.InferenceSession.__init__, "__wrapped__", ort.InferenceSession.__init__)
    try:
        create(session, model, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # ORT raises types of its C extension, without a common base
        reason = first_line(error)
        name = "a graph in memory" if isinstance(model, bytes) else str(model)
        raise BundleError(f"ONNX Runtime cannot load {name}: {reason}") from None
    if _PROVIDERS[device] not in session.get_providers():  # it logs why, and takes the CPU
        raise DeviceError(
            "ONNX Runtime cannot load CUDA or cuDNN: install those that its package was built for, "
            "such as `pip install 'onnxruntime-gpu[cuda,cudnn]'`"
        )
    return session


@functools.cache
def prepare_cuda() -> None:
    """Loads CUDA's libraries where they are Python packages; call it before ORT uses a GPU."""
    # Attention by cuDNN would be planned again in each session for each length of a prompt.
    os.environ.setdefault("ORT_ENABLE_CUDNN_FLASH_ATTENTION", "0")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        onnxruntime().preload_dlls()
    if told.getvalue():
        _LOG.debug("%s", told.getvalue().strip())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
