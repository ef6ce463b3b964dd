"""What the user of a training chose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dash_onnx.exporters.train.effort import EffortName


@dataclass(frozen=True)
class TrainOptions:
    """What the user chose.

    Attributes:
        effort: how much to do.
        calibration: text or JSON lines; none lets the model write the text itself.
        seed: of everything random.
    """

    effort: EffortName = "quick"
    calibration: tuple[Path, ...] = ()
    seed: int = 0
