"""What each part of the policy is worth: trained once more with one part changed or left out.

    dash-export MODEL out/ --variants int8 --effort none
    python benchmarks/ablations.py out/ --calibration text.txt

Decides between the highest precision and skip. Prints the KL in nats at 2, 4, 6 and 8 skipped
layers a token (read between measured multipliers) on sequences held out of the training text, or on
other texts (`--text`); the scorer's time is not counted. Other bundles of the same model, say of
another `--compensation-rank`, may follow: they are trained as they are.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dash_onnx.core.actions import SKIP
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.text import TextCodec, read_text
from dash_onnx.exporters.train.checkpoint import Checkpoint
from dash_onnx.exporters.train.decisions import greedy
from dash_onnx.exporters.train.dequantized import DequantizedModel, Rotary, Tensor
from dash_onnx.exporters.train.improve import clipped_step, drawing, improve, probabilities
from dash_onnx.exporters.train.options import TrainingPlan, TrainOptions
from dash_onnx.exporters.train.regress import regress
from dash_onnx.exporters.train.scorer import decision_points_of
from dash_onnx.exporters.train.trainer import Trainer

SKIPS = (2, 4, 6, 8)
MULTIPLIERS = 7  # at which each policy is measured
TEMPERATURE = 0.3  # of the policy gradient's draws


class InMemory(Checkpoint):
    """Variants must not go on from each other's files."""

    def __init__(self, *_: Any):
        """Starts empty."""
        self.state: dict[str, Any] = {}

    def save(self, **values: Any) -> None:
        """See `Checkpoint`."""
        self.state.update(values)


class Omitting(DequantizedModel):
    """Skipped layers leave no K/V: later tokens do not see them there."""

    _kept: Tensor

    def skip(self, layer: int, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros in place of K/V."""
        y, keys_values = super().skip(layer, x, normed)
        return y, torch.zeros_like(keys_values)

    def attend(self, layer: int, queries: Tensor, keys_values: Tensor, rotary: Rotary) -> Tensor:
        """Zeros are not seen."""
        self._kept = (keys_values != 0).any(-1)  # [B, T]
        return super().attend(layer, queries, keys_values, rotary)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        length = q.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & self._kept[:, None, None]
        seen = seen | torch.eye(length, dtype=torch.bool)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def policy_gradient(trainer: Trainer) -> None:
    """REINFORCE in place of `improve`; a draw's baseline is another draw of the same tokens."""
    scorer, env, plan = trainer.scorer, trainer.env, trainer.plan
    scorer.load_state_dict(trainer.checkpoint.state["scorer"])
    optimizer = torch.optim.Adam(scorer.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98))
    for step in tqdm(range(plan.improvement_steps), desc="policy gradient", disable=None):
        log_multipliers = trainer.log_multipliers(plan.batch)
        draws: list[tuple[Tensor, Tensor]] = []
        for _ in range(2):
            with torch.no_grad(), trainer.autocast():
                decide = drawing(trainer, log_multipliers, TEMPERATURE)
                rollout = env.run(trainer.batch(step), decide)
                kl = env.kl(trainer.reference(step), rollout.final)
                cost = trainer.cost(torch.cat(rollout.decisions, 2))
            log_p = torch.zeros(())
            for state, taken in zip(rollout.states, rollout.decisions, strict=True):
                p = probabilities(scorer, trainer.costs, state, log_multipliers, TEMPERATURE)
                log_p = log_p + (p * taken).sum(-1).clamp(min=1e-9).log().sum(-1)
            lagrangian = (kl + log_multipliers.exp() * cost) / (log_multipliers / 2).exp()
            draws.append((lagrangian, log_p))
        (one, log_one), (other, log_other) = draws
        loss = ((one - other) / 2 * (log_one - log_other))[:, env.prompt_tokens :].mean()
        optimizer.zero_grad()
        loss.backward()
        clipped_step(optimizer)


def curve(trainer: Trainer, ids: Tensor) -> list[float]:
    """KL at each of `SKIPS`, on `[B, T]` tokens."""
    env, decided = trainer.env, slice(trainer.env.prompt_tokens, None)
    low, high = trainer.log_multiplier_range
    skips, losses = [], []
    with torch.no_grad(), trainer.autocast():
        wanted = env.reference(ids)
        for log_multiplier in np.linspace(low + 1, high + 1.2, MULTIPLIERS):
            decide = greedy(trainer, math.exp(log_multiplier))
            rollouts = [env.run(part, decide) for part in ids.split(trainer.plan.batch)]
            final = torch.cat([rollout.final for rollout in rollouts])
            paths = torch.cat([rollout.paths for rollout in rollouts])[:, decided]
            skips.append(float((paths == trainer.actions.index(SKIP)).float().sum(-1).mean()))
            losses.append(float(env.kl(wanted[:, decided], final[:, decided]).mean()))
    return between(skips, losses)


def between(skips: list[float], losses: list[float]) -> list[float]:
    """Log KL is linear in the log of the skips between two points; beyond the last: none."""
    logs = np.interp(np.log(SKIPS), np.log(skips), np.log(losses), right=np.nan)
    return [float(loss) for loss in np.exp(logs)]


def assignments(trainer: Trainer, ids: Tensor) -> list[float]:
    """KL of the best static assignments of the search, likewise."""
    env, skip = trainer.env, trainer.actions.index(SKIP)
    found = {one.path.count(skip): one.path for one in trainer.downgrades}
    with trainer.autocast():
        wanted, heads = env.reference(ids), [env.model.head]
        return [
            env.mean_kl(wanted, [env.run_path(ids, found[count])], heads)[0][0]
            if count in found
            else math.nan
            for count in SKIPS
        ]


def other_text(trainer: Trainer, path: Path, most: int) -> Tensor:
    """The first tokens of a text, `[B, T]` with at most so many rows."""
    tokens, length = TextCodec(trainer.bundle).encode(read_text(path)), trainer.plan.length
    rows = min(len(tokens) // length, most)
    return torch.from_numpy(tokens[: rows * length].reshape(rows, length))


def told(name: str, losses: list[float], seconds: float) -> None:
    """Prints a row."""
    print(f"{name:56}" + "".join(f"{loss:8.3f}" for loss in losses) + f"{seconds:7.0f}", flush=True)


def main() -> None:
    """Trains every variant and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="OUT", type=Path)
    parser.add_argument("others", nargs="*", type=Path, metavar="OTHER")
    parser.add_argument("--calibration", nargs="+", default=[])
    parser.add_argument("--text", nargs="+", type=Path, help="that the KL is measured on")
    parser.add_argument("--sequences", type=int, default=120)
    parser.add_argument("--steps", type=int, default=24, help="of the on-policy phase")
    parser.add_argument("--only", nargs="+", help="variants whose name contains one of these")
    arguments = parser.parse_args()
    shipped, count = TrainingPlan(), arguments.sequences
    ids: dict[int, Tensor] = {}  # by number of sequences: all variants read the same
    known: dict[str, dict[str, Any]] = {}  # what the regression left, where variants share it

    def train(
        name: str,
        bundle: Path = arguments.bundle,
        sequences: int = count,
        improving: Callable[[Trainer], None] | None = improve,
        regression: str | None = None,
        also_static: bool = False,
        model: type[DequantizedModel] = DequantizedModel,
        **changes: Any,
    ) -> None:
        if arguments.only and not any(part in name for part in arguments.only):
            return
        started = time.monotonic()
        plan = TrainingPlan(
            sequences=sequences,
            held_out=16,
            regression_batches=sequences // shipped.batch,
            improvement_steps=arguments.steps,
            **changes,
        )
        options = TrainOptions(calibration=tuple(arguments.calibration), plan=plan)
        trainer = Trainer(Bundle(bundle), options, model=model, checkpoint=InMemory)
        state = trainer.checkpoint.state
        state.update(known.get(regression or "", {}))
        if sequences in ids:
            state["ids"] = ids[sequences]
        trainer.prepare_text()
        texts = {
            path.stem: other_text(trainer, path, plan.held_out) for path in arguments.text or ()
        }
        ids[sequences] = state["ids"]
        regress(trainer)
        if regression:
            known.setdefault(regression, dict(state))
        if improving:
            improving(trainer)
        else:
            trainer.scorer.load_state_dict(state["scorer"])
        seconds = time.monotonic() - started
        for text, tokens in (texts or {"": trainer.held_out}).items():
            if also_static:
                told(f"{name}: best static {text}", assignments(trainer, tokens), math.nan)
            told(f"{name} {text}", curve(trainer, tokens), seconds)

    layers = Bundle(arguments.bundle).manifest.model.num_layers

    def point(name: str, layer: int) -> Callable[[], None]:
        return lambda: train(f"decision point before layer {name}", decision_points=(layer,))

    print(" " * 56 + "".join(f"{f'{skips} skips':>8}" for skips in SKIPS) + "seconds")
    usual: Any = {"regression": "usual"}
    variants: list[Callable[[], None]] = [
        lambda: train("value regression", improving=None, also_static=True, **usual),
        lambda: train("+ on-policy", also_static=True, **usual),
        lambda: train("+ on-policy, compensation as fitted", train_compensation=False, **usual),
        lambda: train("+ policy gradient", improving=policy_gradient, **usual),
        lambda: train("+ on-policy, text as the model writes it", augment=False),
        lambda: train("half the tokens", sequences=count // 2),
        lambda: train("twice the tokens", sequences=count * 2),
        point("L/8 + 1 (as without lookahead)", decision_points_of(layers, 1)[0] + 1),
        point("1, at the embedding", 1),
        point("L/6", round(layers / 6)),
        point("L/3", round(layers / 3)),
        point("L/2", round(layers / 2)),
        lambda: train("three decision points", decision_points=3),
        lambda: train("skipped layers leave no K/V", model=Omitting),
        *(
            lambda bundle=bundle: train(bundle.name, bundle=bundle, also_static=True)
            for bundle in arguments.others
        ),
    ]
    for variant in tqdm(variants, disable=None):
        variant()


if __name__ == "__main__":
    main()
