"""The options of a training: the user's choices, and the plan behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.facts import ModelFacts
from dash_onnx.exporters.calibration.texts import TextLike, TextSource, text_sources
from dash_onnx.exporters.device import TrainDevice
from dash_onnx.exporters.train.transfer import scorer_to_start_from

EffortName = Literal["quick", "normal", "thorough"]

MIN_SEQUENCES = 8


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Every quantity of a training that may be varied; the defaults are the values in use.

    Attributes:
        sequences: number of training sequences; the user's files may hold fewer.
        held_out: additional sequences, used only to measure the tables; at most a quarter.
        length: tokens per sequence, or the model's context if that is shorter.
        prompt_tokens: first tokens of a sequence, which run at the highest trained precision like
            a prompt; at most half of the model's context.
        augment: whether the model's own text is partly rewritten, see `augmentation.py`.
        batch: sequences per pass.
        regression_batches: passes of the value regression.
        improvement_steps: passes of the on-policy improvement.
        learning_rate: learning rate of the improvement.
        multipliers: range of multipliers drawn by the improvement, in nats per `Costs.unit_ms`.
        decision_points: the layers before which the scorer runs, or how many: in a small model
            each costs two fifths of an INT4 layer.
        candidates: most paths that the search for static assignments measures per step.
        dtype: type of matrix products; None takes BF16 where the processor multiplies it natively.
        save_every: improvement steps between saves, from which an interrupted training can resume.
    """

    sequences: int = 72
    held_out: int = 10
    length: int = 256
    prompt_tokens: int = 32
    augment: bool = True
    batch: int = 4
    regression_batches: int = 18
    improvement_steps: int = 8
    learning_rate: float = 1e-3
    multipliers: tuple[float, float] = (0.006, 0.12)
    decision_points: int | tuple[int, ...] = 1
    candidates: int = 1
    dtype: Literal["float32", "bfloat16"] | None = None
    save_every: int = 20

    @property
    def min_tokens(self) -> int:
        """Minimum number of tokens in the user's own text."""
        return MIN_SEQUENCES * self.length


PLANS: dict[EffortName, TrainingPlan] = {
    "quick": TrainingPlan(),
    "normal": TrainingPlan(
        sequences=400, held_out=16, regression_batches=100, improvement_steps=100, candidates=4
    ),
    "thorough": TrainingPlan(
        sequences=1000, held_out=24, regression_batches=250, improvement_steps=300, candidates=4
    ),
}


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training.

    Attributes:
        effort: how long to train.
        calibration: texts, see `text_sources`; if empty, the model writes the text itself.
        seed: seed for all random choices.
        device: where PyTorch computes.
        decisions: how often the scorer runs per token; None uses the plan's number.
        start: a bundle whose scorer, with its decision points, the training starts from; it then
            takes a tenth of the passes.
        plan: replaces the plan of the effort.
    """

    effort: EffortName = "quick"
    calibration: tuple[TextLike, ...] = ()
    seed: int = 0
    device: TrainDevice = "cpu"
    decisions: int | None = None
    start: Path | None = None
    plan: TrainingPlan | None = None

    def plan_for(self, facts: ModelFacts) -> TrainingPlan:
        """The plan for a model.

        Raises:
            PolicyError: both `start`, which has its decision points, and `decisions` are given.
        """
        if self.start is not None and self.decisions is not None:
            raise PolicyError("decisions are those of start: leave one of the two out")
        plan = self.plan or PLANS[self.effort]
        if self.plan is None and self.effort == "quick" and facts.large:  # fewer tokens
            plan = replace(
                plan, sequences=40, held_out=8, regression_batches=10, improvement_steps=5
            )
        if self.start is not None:
            points = scorer_to_start_from(Bundle(self.start)).decision_points
            return replace(
                plan,
                sequences=max(plan.sequences // 4, MIN_SEQUENCES),
                regression_batches=max(plan.regression_batches // 10, 2),
                improvement_steps=max(plan.improvement_steps // 10, 1),
                decision_points=points,
            )
        if self.decisions is None:
            return plan
        return replace(plan, decision_points=self.decisions)

    @cached_property
    def texts(self) -> tuple[TextSource, ...]:
        """The sources that `calibration` names.

        Raises:
            SourceError: a spelling is not valid.
        """
        return text_sources(self.calibration)
