"""How long the phases of an export and a training will take on this machine.

Floating-point operations are counted and divided by the speed of a matrix product, measured now.
Work bound by memory counts as the operations that would take as long. Estimates are good to a
factor of two; the time of the first phases then corrects the rest (`core/progress.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from dash_onnx.core.facts import ModelFacts
from dash_onnx.core.progress import Expected
from dash_onnx.exporters.calibration.tokens import LENGTH, sequences_of
from dash_onnx.exporters.export.losses import SEQUENCES
from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.train.options import TrainingPlan
from dash_onnx.exporters.train.regress import EPOCHS
from dash_onnx.exporters.train.tables import ROWS
from dash_onnx.exporters.train.trainer import fast_dtype

PROBE_S = 0.5
"""Seconds that a measurement of this machine's speed takes."""

_SIZE = 1024  # rows and columns of the matrix product
_CHECKED = 64  # tokens
_ROUNDING = 1.5  # time of a pass whose products round their inputs
_FIT = 6e-8  # seconds to fit the scorer, per input feature, token and epoch


@dataclass(frozen=True)
class Speed:
    """Floating-point operations per second of a matrix product.

    Attributes:
        float32: in FP32, as the export computes.
        fast: as training computes, in BF16 where the processor has it.
    """

    float32: float
    fast: float

    @classmethod
    def measured(cls) -> Speed:
        """Measures this machine under its present load."""
        single, fast = _speed(torch.float32, PROBE_S / 2), fast_dtype()
        return cls(single, single if fast is torch.float32 else _speed(fast, PROBE_S / 2))


def _speed(dtype: torch.dtype, seconds: float) -> float:
    x = torch.ones(_SIZE, _SIZE, dtype=dtype)
    torch.mm(x, x)  # starts the threads
    started, count = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < seconds or not count:
        torch.mm(x, x)
        count += 1
    return 2 * _SIZE**3 * count / took


def _parameters(facts: ModelFacts) -> int:
    """Number of parameters in matrix products: layers and LM head."""
    return facts.num_layers * facts.layer_parameters + facts.vocab_size * facts.hidden_size


def export_phases(
    facts: ModelFacts, options: ExportOptions, speed: Speed, *, check: bool
) -> list[Expected]:
    """The phases of an export, in order.

    Args:
        facts: shape of the model.
        options: options of the export.
        speed: speed of this machine.
        check: whether the bundle is compared with transformers.
    """
    width, wide, layers = facts.hidden_size, facts.intermediate_size, facts.num_layers
    vocab, parameters = facts.vocab_size, _parameters(facts)
    tokens = sequences_of(facts, options.exact) * min(LENGTH, facts.max_length)
    layer = 2 * tokens * facts.layer_parameters  # in full precision, for all figures of the layer
    head = 0
    if options.calibrates:  # GPTQ: sums of x x^T, their inverses, the rounding
        layer += tokens * (3 * width**2 + wide**2) + 3 * width**3 + wide**3
        layer += 2 * width * facts.layer_parameters
        few = {"int4", "int2"} & {*options.head_precisions(facts)}
        head = 4 * len(few) * width * vocab * width
    phases: list[tuple[str, float, float]] = []
    if not options.calibration:
        phases.append(("INT8 draft", 1.0, 2000 * parameters))
        phases.append(("calibration text", 1.0, 2 * tokens * parameters))
    phases += [
        ("layers", 0.5 * layers, 1.7 * layers * layer),  # products of uncommon shapes are slower
        ("LM head", 1.0, head + 200 * vocab * width),
    ]
    if options.wide:  # a few sequences, and their logits twice
        work = 4 * SEQUENCES * LENGTH * parameters + 500 * parameters
        phases.append(("wide form", 1.0, work))
    phases.append(("costs", 15.0, 2000 * parameters))
    work = 6 * SEQUENCES * LENGTH * parameters
    phases.append(("losses", 2.0, 2 * len(options.variants) * work))  # each with two LM heads
    if check:
        phases.append(("check", 2.0, 2 * _CHECKED * parameters + 400 * parameters))
    return [Expected(name, fixed + work / speed.float32) for name, fixed, work in phases]


def training_phases(
    facts: ModelFacts, plan: TrainingPlan, speed: Speed, *, generated: bool
) -> list[Expected]:
    """The phases of a training, in order.

    Args:
        facts: shape of the model.
        plan: plan of the training.
        speed: speed of this machine.
        generated: whether the model writes the text itself.
    """
    length = min(plan.length, facts.max_length)
    forward = 2 * length * _parameters(facts)  # for one sequence on one path
    batch, tokens = plan.batch * forward, plan.held_out * length
    layers = 2 * tokens * facts.num_layers * facts.layer_parameters
    heads = 4 * tokens * facts.vocab_size * facts.hidden_size  # INT8 and INT4
    paths = 6 + facts.num_layers // 2
    measured = facts.num_layers * plan.candidates // 2  # paths measured in a search
    search = measured * plan.batch * forward
    text = (plan.sequences + plan.held_out) * forward / speed.float32  # the runtime writes it
    trained = plan.regression_batches * plan.batch * length
    values = 5 * batch  # forward, backward, every action
    phases = [
        ("values", 1.0, plan.regression_batches * values),
        ("static search", 0.0, search),
        ("scorer", _FIT * EPOCHS * trained * facts.hidden_size, 0.0),
        ("policy", 1.0, 8 * plan.improvement_steps * batch),  # the same, and backward twice
        ("costs", 12.0, 1000 * _parameters(facts)),
        ("policy table", 0.0, _ROUNDING * ROWS * layers),
        ("static search", 0.0, _ROUNDING * plan.candidates * search),
        ("static table", 0.0, _ROUNDING * paths * layers),
        ("table losses", 0.0, (ROWS + paths) * heads),
    ]
    expected = [Expected(name, fixed + work / speed.fast) for name, fixed, work in phases]
    return [Expected("training text", 1.0 + text), *expected] if generated else expected
