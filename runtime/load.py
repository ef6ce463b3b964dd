"""Opening a bundle: its device, ONNX Runtime's threads, and the model on them."""

from __future__ import annotations

import os
from types import NoneType
from typing import get_args

from dash_onnx.core.budget import Budget
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.devices import device_of, open_backend
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import check_count, check_type
from dash_onnx.runtime.ort import Device, use_threads
from dash_onnx.runtime.sessions import Memory

_MAX_THREADS = 1024


def load(
    folder: str | os.PathLike[str],
    *,
    device: Device | None = None,
    threads: int | None = None,
    share_pool: bool = True,
    policy: str | Policy = "",
    budget: Budget | None = None,
    memory: Memory = "high",
    cuda_graphs: bool = False,
    sha256: str | None = None,
) -> Model:
    """Opens a bundle; graphs load on first use.

    All sessions share ORT's global thread pool. While it exists, ORT refuses sessions with their
    own threads, so `InferenceSession` is patched to give the app's later sessions the pool, too.
    With `threads=1` there is no pool, and with `share_pool=False` the app's sessions are not
    changed.

    Args:
        folder: what `dash-export` wrote.
        device: `cpu` or `cuda`, to refuse a bundle for another device; None uses the bundle's
            device.
        threads: size of ORT's thread pool, shared by the whole process; None uses all logical
            cores, or as many as the limit of a container (cgroup v2).
        share_pool: False leaves `InferenceSession` as it is; the app's later sessions must then set
            `use_per_session_threads = False` themselves. The first `load` that creates the pool
            decides.
        policy: default of all generations; see `dash_onnx.core.policy.make_policy`.
        budget: default of all generations: a fraction of a token's time at the highest exported
            precision, or a preset.
        memory: `high` also loads the wide form, an INT8 copy of the layers with about one byte per
            weight, which runs prompts and batches faster where it is accurate enough. `low` loads
            only the policy's own graphs; if `preload` finds that a mixture of experts does not fit,
            its INT8 and INT4 layers stay in their files, and run tens of times slower.
        cuda_graphs: captures each layer and action as a CUDA graph and replays it. Generations on
            several threads then take turns, and other CUDA work of the process must not use the
            default stream.
        sha256: required checksum of `dash.json`, which contains the checksums of all other files.

    Raises:
        PolicyError: an option is out of range, or the bundle does not support the policy or the
            budget.
        BundleError: the bundle is missing, damaged or of another format version.
        DeviceError: ORT or the device is not available, or the bundle is for another one.
    """
    if memory not in get_args(Memory):
        raise PolicyError(f"memory={memory!r} must be one of {', '.join(get_args(Memory))}")
    if threads is not None:
        check_count("threads", threads, _MAX_THREADS)
    check_type("policy", policy)
    check_type("budget", budget)
    for name, value, other in (
        ("folder", folder, os.PathLike),
        ("device", device, NoneType),
        ("sha256", sha256, NoneType),
    ):
        if not isinstance(value, (str, other)):
            raise PolicyError(f"{name}={value!r} must be text")
    bundle = Bundle(folder, sha256=sha256)
    backend = open_backend(device_of(bundle, device), cuda_graphs=cuda_graphs)
    use_threads(threads, share=share_pool)
    return Model(bundle, backend, policy=policy, budget=budget, memory=memory)
