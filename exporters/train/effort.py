"""How much a training run does, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EffortName = Literal["quick", "normal", "thorough"]


@dataclass(frozen=True)
class Effort:
    """How much a training run does.

    Attributes:
        sequences: of training text.
        held_out: sequences that the tables are measured on.
        batches: of value regression.
        steps: of on-policy improvement.
        tried: moves measured per step of the static search.
    """

    sequences: int
    held_out: int
    batches: int
    steps: int
    tried: int


EFFORTS: dict[EffortName, Effort] = {
    "quick": Effort(sequences=54, held_out=6, batches=10, steps=8, tried=1),
    "normal": Effort(sequences=240, held_out=16, batches=36, steps=60, tried=2),
    "thorough": Effort(sequences=960, held_out=32, batches=200, steps=400, tried=4),
}
