"""The CUDA backend, imported only for `device="cuda"`: nothing of it is loaded on the CPU.

`driver.py` calls the CUDA driver through ctypes: 24 functions of a stable C interface, whereas
NVIDIA's cuda-bindings would be one more compiled package that must match CUDA. `backend.py` orders
layers, scorer and host on two streams; `graphs.py` captures what a token runs, on request.
"""

from __future__ import annotations

from dash_onnx.runtime.cuda.backend import CudaBackend
from dash_onnx.runtime.cuda.driver import Driver, open_driver
from dash_onnx.runtime.cuda.graphs import CudaGraphBackend

__all__ = ["CudaBackend", "CudaGraphBackend", "Driver", "open_driver"]
