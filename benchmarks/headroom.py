"""What deciding for each token could gain: an oracle beside the policy and static paths.

    python benchmarks/headroom.py out/ --text book.txt

The oracle knows what the scorer has to guess: the KL that each action of each layer would cost each
token, to second order (`exporters/train/values.py`), from many samples of the very token. Its mean
over tokens is the scorer's, which has learned that losses add up to more than their sum. Policies
are read at the costs of the layers where the best static assignment loses the KL of a row; the time
of deciding is not counted. What is left of the oracle's lead is what the scorer does not see. It is
an estimate, and a low one: samples are noisy (more `--samples`, less noise), so that they only
correct the scorer's guesses, and they know one path only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dash_onnx.core.actions import SKIP
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.text import TextCodec, read_text
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.environment import Decide, State
from dash_onnx.exporters.train.options import TrainingPlan, TrainOptions
from dash_onnx.exporters.train.trainer import Trainer
from dash_onnx.exporters.train.values import sampled_values
from dash_onnx.runtime.ort import create_session

STATIC_KL = (0.05, 0.1, 0.2, 0.4)  # nats that the best static assignment loses
_PRIOR = 4  # what the scorer's guess counts, beside half of the number of samples
POINTS = 9  # multipliers at which a policy is measured
Point = tuple[float, float]
"""Cost of the layers in `Costs.unit_ms`, and KL in nats."""


class Headroom:
    """A trained bundle on some tokens."""

    def __init__(self, folder: Path, text: Path, sequences: int):
        """Opens the bundle; the trainer trains nothing here."""
        bundle = Bundle(folder)
        facts = bundle.manifest.scorer
        assert facts is not None, "train a policy first: dash-train OUT"
        plan = TrainingPlan(train_compensation=False, decision_points=facts.decision_points)
        self.trainer = trainer = Trainer(bundle, TrainOptions(plan=plan))
        self.facts, self.env = facts, trainer.env
        self.columns = [facts.actions.index(action) for action in trainer.actions]
        self.session = create_session(bundle.verified(facts.file), "cpu")
        tokens, length = TextCodec(bundle).encode(read_text(text)), plan.length
        rows = min(len(tokens) // length, sequences)
        assert rows, f"{text} has fewer than {length} tokens"
        self.ids = torch.from_numpy(tokens[: rows * length].reshape(rows, length))
        with trainer.autocast():
            self.reference = self.env.reference(self.ids)

    def scored(self, hidden: Tensor) -> Tensor:
        """Values of the scorer's graph, `[B, T, D]` -> `[B, T, L, A]` nats."""
        free = np.zeros((self.env.layers, len(self.facts.actions)), np.float32)
        names = [one.name for one in self.session.get_inputs()]
        rows = hidden.float().flatten(0, 1).numpy()[:, None]
        values = [self.session.run(None, dict(zip(names, (x, free), strict=True)))[0] for x in rows]
        found = torch.from_numpy(np.stack(values))[..., self.columns]
        return (found - found[..., :1]).view(*hidden.shape[:2], *found.shape[1:])

    def oracle(self, samples: int) -> Tensor:
        """Values of each token, `[B, T, L, A]` nats, with the scorer's mean over tokens."""
        total, guessed = torch.zeros(()), []
        for number in tqdm(range(samples), desc="oracle", disable=None):
            drawn = []
            for part in self.ids.split(self.trainer.plan.batch):
                with self.trainer.autocast():
                    states, values, _ = sampled_values(self.env, part, self.trainer.generator)
                drawn.append(values)
                if number == 0:
                    guessed.append(self.by_segment([self.scored(s.hidden) for s in states[1:]]))
            total = total + torch.cat(drawn)
        # Not of the first tokens, which are no tokens like others and are never decided.
        decided = slice(self.env.prompt_tokens, None)
        guess = torch.cat(guessed)
        mean, found_mean = (x[:, decided].mean((0, 1)) for x in (guess, total))
        found = total * (mean / found_mean.clamp(min=1e-9))
        # A sample is chi-square of one degree of freedom: the least of noisy values is no least.
        weight = samples / 2 / (samples / 2 + _PRIOR)
        return weight * found + (1 - weight) * guess

    def by_segment(self, points: Sequence[Tensor]) -> Tensor:
        """Values of all layers, each from the point before it; the first segment's are constant."""
        parts = zip(self.env.segments, [points[0], *points], strict=True)
        return torch.cat([values[:, :, layers] for layers, values in parts], 2)

    def policy(self, multiplier: float) -> Decide:
        """The scorer's decisions."""
        penalty = multiplier * self.trainer.costs

        def decide(state: State) -> Tensor:
            values = self.scored(state.hidden)[:, :, state.layers]
            return self._taken(values + penalty[state.layers])

        return decide

    def knowing(self, values: Tensor, multiplier: float, forbidden: int | None) -> Decide:
        """The oracle's decisions for tokens whose values are given."""
        penalty = multiplier * self.trainer.costs
        if forbidden is not None:
            penalty[:, forbidden] = math.inf
        return lambda state: self._taken((values + penalty)[:, :, state.layers])

    def _taken(self, totals: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(totals.argmin(-1), len(self.env.actions)).float()

    def curve(self, decide: Callable[[float, slice], Decide], name: str) -> list[Point]:
        """A policy at each multiplier; `decide` gets the sequences too."""
        low, high = self.trainer.log_multiplier_range
        points = []
        for log in tqdm(np.linspace(low - 2, high + 1.5, POINTS), desc=name, disable=None):
            finals, costs, start = [], [], 0
            for part in self.env.parts(self.ids):
                rows, start = slice(start, start + len(part)), start + len(part)
                with torch.no_grad(), self.trainer.autocast():
                    rollout = self.env.run(part, decide(math.exp(log), rows))
                finals.append(rollout.final)
                costs.append(self.trainer.cost(torch.cat(rollout.decisions, 2)))
            points.append(self._point(torch.cat(finals), torch.cat(costs)))
        return points

    def static(self) -> list[Point]:
        """The manifest's assignments."""
        found = {
            tuple(map(self.trainer.actions.index, one.path))
            for one in self.facts.static
            if set(one.path) <= set(self.trainer.actions)
        }
        points = []
        for path in tqdm(sorted(found), desc="static", disable=None):
            one_hot = torch.nn.functional.one_hot(torch.tensor(path), len(self.env.actions))
            with self.trainer.autocast():
                final = self.env.run_path(self.ids, path)
            cost = self.trainer.cost(one_hot.float()).expand(self.ids.shape)
            points.append(self._point(final, cost))
        return points

    def _point(self, final: Tensor, cost: Tensor) -> Point:
        with self.trainer.autocast():
            kl = self.env.mean_kl(self.reference, [final], [self.env.model.head])[0][0]
        return float(cost[:, self.env.prompt_tokens :].mean()), kl


def lowest(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, by ascending cost."""
    kept: list[Point] = []
    for cost, kl in sorted(points):
        if not kept or kl < kept[-1][1]:
            kept.append((cost, max(kl, 1e-5)))
    return kept


def kl_at(cost: float, points: Sequence[Point]) -> float:
    """The log of the KL is linear in the cost between two points; NaN beyond them."""
    costs, kls = zip(*lowest(points), strict=True)
    found = np.interp(cost, costs, np.log(kls), left=math.nan, right=math.nan)
    return float(np.exp(found))


def cost_at(kl: float, points: Sequence[Point]) -> float:
    """The other way round."""
    costs, kls = zip(*reversed(lowest(points)), strict=True)
    return float(np.interp(math.log(kl), np.log(kls), costs, left=math.nan, right=math.nan))


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="OUT", type=Path, help="with a trained policy")
    parser.add_argument("--text", type=Path, required=True, help="held out of the training")
    parser.add_argument("--sequences", type=int, default=16, help="of 256 tokens (default: 16)")
    parser.add_argument("--samples", type=int, default=16, help="of the oracle (default: 16)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    room = Headroom(arguments.bundle, arguments.text, arguments.sequences)
    values = room.oracle(arguments.samples)
    skip = room.trainer.actions.index(SKIP)
    static = room.static()
    curves = {
        "policy": room.curve(lambda m, _: room.policy(m), "policy"),
        "oracle": room.curve(lambda m, rows: room.knowing(values[rows], m, None), "oracle"),
        "oracle, no skips": room.curve(
            lambda m, rows: room.knowing(values[rows], m, skip), "oracle, no skips"
        ),
    }
    rows = []
    for kl in STATIC_KL:
        cost = cost_at(kl, static)
        rows.append({"static": kl, "cost": cost, **{n: kl_at(cost, c) for n, c in curves.items()}})
    if arguments.json:
        print(json.dumps({"rows": rows, "points": {"static": static, **curves}}))
        return
    print("".join(f"{name:>18}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:18.3f}" for value in row.values()))


if __name__ == "__main__":
    main()
