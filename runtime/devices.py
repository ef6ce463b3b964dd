"""Which device a bundle runs on, and its backend."""

from __future__ import annotations

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import DeviceError
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.ort import Device, check_device, has_device, known_device


def device_of(bundle: Bundle, device: Device | None = None) -> Device:
    """The device that a bundle was exported for.

    Args:
        bundle: the bundle to load.
        device: what it must be; None accepts any that this ONNX Runtime has.

    Raises:
        DeviceError: the bundle is for another one, or it is not available.
    """
    built_for = bundle.manifest.target.device
    if device is not None:
        known_device(device)
    if device not in (None, built_for):
        raise DeviceError(
            f"{bundle.folder} was exported for device {built_for!r}, not {device!r}; "
            f"export again with --device {device}"
        )
    if not has_device(built_for):
        raise DeviceError(
            f"{bundle.folder} was exported for device {built_for!r}, which this ONNX Runtime does "
            "not have: for cuda, install the extra `[gpu]` and an NVIDIA driver"
        )
    return built_for


def open_backend(device: str, *, cuda_graphs: bool = False) -> Backend:
    """The backend of a device.

    Args:
        device: `cpu` or `cuda`.
        cuda_graphs: captures what a token runs as CUDA graphs.

    Raises:
        DeviceError: this ONNX Runtime or this machine lacks the device, or CUDA graphs are
            requested on another one.
    """
    check_device(device)
    if device == "cuda":
        from dash_onnx.runtime.cuda import CudaBackend, CudaGraphBackend, Driver, open_driver

        return (CudaGraphBackend if cuda_graphs else CudaBackend)(Driver(open_driver()))
    if cuda_graphs:
        raise DeviceError("CUDA graphs need --device cuda, and a bundle that was exported with it")
    return Backend()
