"""The device that torch uses: for calibration sums, GPTQ and training."""

from __future__ import annotations

from typing import Literal

import torch

from dash_onnx.core.errors import DeviceError

TrainDevice = Literal["cpu", "cuda", "auto"]


def torch_device(choice: TrainDevice) -> torch.device:
    """The chosen device; used as a context manager, new tensors are created on it.

    Raises:
        DeviceError: torch finds no GPU.
    """
    found = torch.cuda.is_available()
    if choice == "cuda" and not found:
        raise DeviceError(
            "--train-device cuda: PyTorch finds no GPU here; use --train-device cpu, or "
            "install PyTorch for CUDA (see pytorch.org)"
        )
    return torch.device("cuda" if found and choice != "cpu" else "cpu")


def kept_bytes() -> int:
    """Most bytes of layers that stay dequantized: 1 GiB, or half of a GPU's free memory."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.mem_get_info()[0] // 2
    return 1 << 30
