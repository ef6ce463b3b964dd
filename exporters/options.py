"""What the user of an export chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dash_onnx.core.actions import PRECISIONS, Action
from dash_onnx.core.facts import Target
from dash_onnx.runtime.ort import Device


@dataclass(frozen=True)
class ExportOptions:
    """What the user chose.

    Attributes:
        variants: precisions of each layer, highest first.
        device: decides the dtype of activations and the operators.
        max_length: context in tokens; None takes the model's own.
        block_size: weights that share one quantization scale; None takes 32 for GGUF files whose
            integers are kept and for sizes that 64 does not divide, else 64.
        calibration: text files; none lets the model write the text itself.
        least_tokens: that calibration files must hold, for what comes after the export.
        compensation_rank: of what a skipped layer returns; see `Manifest`. None takes the
            first multiple of the block size from 64 on.
        accuracy_level: of MatMulNBits; None takes the fast one of the device.
        requantize: round weights that the source has as integers anew.
        overwrite: replace an existing bundle.
        resume: go on where an interrupted export stopped, and keep what is finished if this one
            is interrupted.
        seed: of everything random.
        revision: of a hub id.
    """

    variants: tuple[Action, ...] = PRECISIONS
    device: Device = "cpu"
    max_length: int | None = None
    block_size: int | None = None
    calibration: tuple[Path, ...] = ()
    least_tokens: int = 0
    accuracy_level: int | None = None
    compensation_rank: int | None = None
    requantize: bool = False
    overwrite: bool = False
    resume: bool = False
    seed: int = 0
    revision: str | None = None

    @property
    def target(self) -> Target:
        """The build target; the block size must be resolved."""
        assert self.block_size is not None
        cpu = self.device == "cpu"
        level = self.accuracy_level
        return Target(
            device=self.device,
            dtype="float32" if cpu else "float16",
            block_size=self.block_size,
            # INT8 activations: 50 times faster than level 0 for INT8 weights on x86.
            accuracy_level=level if level is not None else (4 if cpu else 0),
        )
