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
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

from dash_onnx.core.actions import SKIP
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.text import TextCodec, read_text
from dash_onnx.exporters.train import improve as on_policy
from dash_onnx.exporters.train import learning, static
from dash_onnx.exporters.train.effort import Effort
from dash_onnx.exporters.train.frozen import Frozen, Rotary, Tensor
from dash_onnx.exporters.train.improve import improve
from dash_onnx.exporters.train.learning import Learning
from dash_onnx.exporters.train.options import TrainOptions
from dash_onnx.exporters.train.regress import regress
from dash_onnx.exporters.train.scorer import decision_points_of, greedy
from dash_onnx.exporters.train.text import LENGTH

SKIPS = (2, 4, 6, 8)
MULTIPLIERS = 7  # at which each policy is measured
TEMPERATURE = 0.3  # of the policy gradient's draws


class Remembering:
    """A checkpoint in memory; variants must not go on from each other's files."""

    def __init__(self, *_: Any):
        """Starts empty."""
        self.state: dict[str, Any] = {}

    def save(self, **values: Any) -> None:
        """See `Checkpoint`."""
        self.state.update(values)


class Omitting(Frozen):
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

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None
    ) -> Tensor:
        if not causal:
            return super()._attention(q, k, v, causal, window)
        length = q.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & self._kept[:, None, None]
        seen = seen | torch.eye(length, dtype=torch.bool)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class Untrained(Frozen):
    """Leaves the compensation as it was fitted."""

    def compensation(self) -> list[Tensor]:
        """Nothing to train."""
        return []


def policy_gradient(run: Learning) -> None:
    """REINFORCE in place of `improve`; a draw's baseline is another draw of the same tokens."""
    scorer, seen = run.scorer, slice(run.env.prompt_tokens, None)
    scorer.load_state_dict(run.checkpoint.state["scorer"])
    optimizer = torch.optim.Adam(scorer.parameters(), lr=on_policy._RATE, betas=(0.9, 0.98))
    for step in tqdm(range(run.effort.steps), desc="policy gradient", disable=None):
        batch, multipliers = run.batch(step), run.log_multipliers(learning.BATCH)
        draws: list[tuple[Tensor, Tensor]] = []
        for _ in range(2):
            drawing = on_policy._Drawing(run, multipliers, TEMPERATURE)
            with torch.no_grad(), run.autocast():
                rollout = run.env.run(batch, drawing)
                kl = run.env.kl(run.reference(step), rollout.final)
                cost = run.cost(rollout.weights)
            log_p = torch.zeros(())
            for state, taken in zip(drawing.states, drawing.weights, strict=True):
                p = on_policy.chances(scorer, run.costs, state, multipliers, TEMPERATURE)
                log_p = log_p + (p * taken).sum(-1).clamp(min=1e-9).log().sum(-1)
            draws.append(((kl + multipliers.exp() * cost) / (multipliers / 2).exp(), log_p))
        (one, log_one), (other, log_other) = draws
        loss = ((one - other) / 2 * (log_one - log_other))[:, seen].mean()
        optimizer.zero_grad()
        loss.backward()
        on_policy._clipped_step(optimizer)


def curve(run: Learning, ids: Tensor) -> list[float]:
    """KL at each of `SKIPS`, on `[B, T]` tokens."""
    seen = slice(run.env.prompt_tokens, None)
    low, high = run.log_multiplier_range
    skips, losses = [], []
    with torch.no_grad(), run.autocast():
        wanted = run.env.reference(ids, run.actions[0])
        for log_multiplier in np.linspace(low + 1, high + 1.2, MULTIPLIERS):
            decide = greedy(run.scorer, run.costs, torch.tensor([[log_multiplier]]).float())
            rollouts = [run.env.run(part, decide) for part in ids.split(learning.BATCH)]
            final = torch.cat([rollout.final for rollout in rollouts])
            paths = torch.cat([rollout.paths for rollout in rollouts])[:, seen]
            skips.append(float((paths == run.actions.index(SKIP)).float().sum(-1).mean()))
            losses.append(float(run.env.kl(wanted[:, seen], final[:, seen]).mean()))
    return between(skips, losses)


def between(skips: list[float], losses: list[float]) -> list[float]:
    """Log KL is linear in the log of the skips between two points; beyond the last: none."""
    logs = np.interp(np.log(SKIPS), np.log(skips), np.log(losses), right=np.nan)
    return [float(loss) for loss in np.exp(logs)]


def assignments(run: Learning, ids: Tensor) -> list[float]:
    """KL of the best static assignments of the descent, likewise."""
    skip = run.actions.index(SKIP)
    found = {move.path.count(skip): move.path for move in run.moves}
    with run.autocast():
        wanted = run.env.reference(ids, run.actions[0])
        return [
            static.path_kl(run.env, ids, wanted, found[count], [run.frozen.head])[0]
            if count in found
            else math.nan
            for count in SKIPS
        ]


def other_text(run: Learning, path: Path) -> Tensor:
    """The first tokens of a text, `[B, T]`."""
    tokens = TextCodec(run.bundle).encode(read_text(path))
    rows = min(len(tokens) // LENGTH, run.effort.held_out)
    return torch.from_numpy(tokens[: rows * LENGTH].reshape(rows, LENGTH))


def told(name: str, losses: list[float], seconds: float) -> None:
    """Prints a row."""
    print(f"{name:56}" + "".join(f"{loss:8.3f}" for loss in losses) + f"{seconds:7.0f}", flush=True)


def main() -> None:
    """Trains every variant and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="OUT", type=Path)
    parser.add_argument("others", nargs="*", type=Path, metavar="OTHER")
    parser.add_argument("--calibration", nargs="+", type=Path, default=[])
    parser.add_argument("--text", nargs="+", type=Path, help="that the KL is measured on")
    parser.add_argument("--sequences", type=int, default=120)
    parser.add_argument("--steps", type=int, default=24, help="of the on-policy phase")
    parser.add_argument("--only", nargs="+", help="variants whose name contains one of these")
    arguments = parser.parse_args()
    count, steps = arguments.sequences, arguments.steps
    ids: dict[int, Tensor] = {}  # by number of sequences: all variants read the same
    known: dict[str, dict[str, Any]] = {}  # what the regression left, where variants share it

    def train(
        name: str,
        bundle: Path = arguments.bundle,
        sequences: int = count,
        improving: Callable[[Learning], None] | None = improve,
        regression: str | None = None,
        also_static: bool = False,
        **patches: Any,
    ) -> None:
        if arguments.only and not any(part in name for part in arguments.only):
            return
        started = time.monotonic()
        effort = Effort(sequences, 16, sequences // learning.BATCH, steps, 1)
        with mock.patch.multiple(learning, Checkpoint=Remembering, **patches):
            run = Learning(Bundle(bundle), TrainOptions(calibration=tuple(arguments.calibration)))
            run.effort = effort
            if regression in known:
                run.checkpoint.state.update(known[regression])
            if sequences in ids:
                run.checkpoint.state["ids"] = ids[sequences]
            run.texts()
        texts = {path.stem: other_text(run, path) for path in arguments.text or ()}
        ids[sequences] = run.checkpoint.state["ids"]
        regress(run)
        if regression:
            known.setdefault(regression, dict(run.checkpoint.state))
        if improving:
            improving(run)
        else:
            run.scorer.load_state_dict(run.checkpoint.state["scorer"])
        seconds = time.monotonic() - started
        for text, tokens in (texts or {"": run.held_out}).items():
            if also_static:
                told(f"{name}: best static {text}", assignments(run, tokens), math.nan)
            told(f"{name} {text}", curve(run, tokens), seconds)

    def later(layers: int, count: int) -> tuple[int, ...]:
        return tuple(look + 1 for look in decision_points_of(layers, count))

    def looking(fraction: float) -> Callable[[int, int], tuple[int, ...]]:
        return lambda layers, _: (round(layers * fraction),)

    print(" " * 56 + "".join(f"{f'{skips} skips':>8}" for skips in SKIPS) + "seconds")
    variants: list[Callable[[], None]] = [
        lambda: train("value regression", improving=None, regression="usual", also_static=True),
        lambda: train("+ on-policy", regression="usual", also_static=True),
        lambda: train("+ on-policy, compensation as fitted", regression="usual", Frozen=Untrained),
        lambda: train("+ policy gradient", improving=policy_gradient, regression="usual"),
        lambda: train("+ on-policy, text in the model's form", in_other_forms=lambda ids, *_: ids),
        lambda: train("half the tokens", sequences=count // 2),
        lambda: train("twice the tokens", sequences=count * 2),
        lambda: train("one layer later (as without lookahead)", decision_points_of=later),
        lambda: train("look before layer 1, at the embedding", decision_points_of=lambda *_: (1,)),
        lambda: train("look before layer L/6", decision_points_of=looking(1 / 6)),
        lambda: train("look before layer L/3", decision_points_of=looking(1 / 3)),
        lambda: train("look before layer L/2", decision_points_of=looking(1 / 2)),
        lambda: train("three looks", _DECISION_POINTS=3),
        lambda: train("skipped layers leave no K/V", Frozen=Omitting),
        *(
            lambda bundle=bundle: train(bundle.name, bundle=bundle, also_static=True)
            for bundle in arguments.others
        ),
    ]
    for variant in tqdm(variants, disable=None):
        variant()


if __name__ == "__main__":
    main()
