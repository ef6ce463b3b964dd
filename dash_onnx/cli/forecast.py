"""Forecasts how a model would run on this machine, before it is exported."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dash_onnx.core.actions import Action

if TYPE_CHECKING:
    from dash_onnx.core.facts import ModelFacts
    from dash_onnx.exporters.export import ExportOptions
    from dash_onnx.exporters.export.sizes import Sizes

REACHED: dict[Action, float] = {"full": 0.8, "int8": 0.6, "int4": 0.45, "int2": 0.4}
"""Share of memory bandwidth at which decoding reads weights, by precision. INT8 and INT4: within
10 % for models of 135 and 494 million parameters (`gb_per_s` in benchmarks/results); FP32: less
than ONNX Runtime GenAI reaches with the smaller one; INT2: from the time of one layer."""


@dataclass(frozen=True)
class Forecast:
    """Estimates, good to a factor of two.

    Attributes:
        read_gb_per_s: memory bandwidth of this machine under its present load.
        tokens_per_s: speed of one answer after a short prompt, by precision of all layers.
        export_s: seconds until the bundle is ready to use.
        training_s: seconds to train the policy after that, with the default effort.
        free_disk_bytes: free space in the current folder.
        free_memory_bytes: free memory; None if the system does not report it.
    """

    read_gb_per_s: float
    tokens_per_s: dict[Action, float]
    export_s: float
    training_s: float
    free_disk_bytes: int
    free_memory_bytes: int | None


def forecast(model: ModelFacts, options: ExportOptions, sizes: Sizes) -> Forecast:
    """Measures memory bandwidth and the speed of a matrix product in a second or two.

    Args:
        model: shape of the model.
        options: resolved options of the export.
        sizes: what the export would write.
    """
    from dash_onnx.bench.memory import read_gigabytes_per_s
    from dash_onnx.exporters.expected import Speed, export_phases, training_phases
    from dash_onnx.exporters.train.options import TrainOptions
    from dash_onnx.runtime.machine import available_bytes
    from dash_onnx.runtime.ort import thread_count

    speed, read = Speed.measured(), read_gigabytes_per_s(thread_count())
    exporting = export_phases(model, options, speed, check=True)
    training = training_phases(model, TrainOptions().plan_for(model), speed, generated=True)
    return Forecast(
        read_gb_per_s=round(read, 1),
        tokens_per_s={
            action: round(REACHED[action] * read * 1e9 / bytes_read(action, sizes), 1)
            for action in options.variants
        },
        export_s=round(sum(phase.seconds for phase in exporting)),
        training_s=round(sum(phase.seconds for phase in training)),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
        free_memory_bytes=available_bytes(),
    )


def bytes_read(action: Action, sizes: Sizes) -> int:
    """Bytes of weights read per token."""
    head = sizes.heads.get(action) or max(sizes.heads.values())
    return (sizes.read[action] + head) * (2 if action == "full" else 1)  # FP32 in memory
