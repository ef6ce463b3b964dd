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
        tried: moves measured at most per step of the last static search, each on as many batches.
    """

    sequences: int
    held_out: int
    batches: int
    steps: int
    tried: int


EFFORTS: dict[EffortName, Effort] = {
    "quick": Effort(sequences=72, held_out=10, batches=18, steps=8, tried=1),
    "normal": Effort(sequences=400, held_out=16, batches=100, steps=100, tried=4),
    "thorough": Effort(sequences=1000, held_out=24, batches=250, steps=300, tried=4),
}
