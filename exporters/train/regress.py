"""Value regression: the scorer learns what each action costs along the reference path.

The first phase. Fisher samples of every action's KL are collected (`values.py`), and the scorer is
fitted to their mean given the hidden state.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from dash_onnx.core.actions import SKIP
from dash_onnx.core.progress import Loop
from dash_onnx.exporters.train import static
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.environment import State
from dash_onnx.exporters.train.scorer import Scorer
from dash_onnx.exporters.train.trainer import Trainer
from dash_onnx.exporters.train.values import regression_loss, sampled_values

_RATE = 2e-3  # learning rate of the scorer's fit; decays to 0
EPOCHS = 20
"""Epochs of the scorer's fit."""


def regress(trainer: Trainer) -> None:
    """Fits the scorer, unless an earlier run did; the checkpoint saves it and the static search."""
    state, batches = trainer.checkpoint.state, trainer.plan.regression_batches
    if "scorer" in state:
        trainer.downgrades = [static.Downgrade(**one) for one in state["downgrades"]]
        return
    hidden, samples = collect(trainer, batches)
    correction = _correction(trainer, samples.mean(0))
    scorer, segments = trainer.scorer, trainer.env.segments
    seen, values = [hidden[point] for point in scorer.decision_points], samples.mean(0)
    if trainer.options.start is None:
        scorer.standardise(torch.cat(seen).float())
        with torch.no_grad():
            scorer.bias.copy_(values.diff(dim=-1).clamp(min=1e-6).log())
        fit(scorer, segments, seen, samples, trainer.generator)
    centre(scorer, segments, seen, values)
    with torch.no_grad():
        scorer.bias.add_(correction)
    state.pop("collected", None)
    trainer.checkpoint.save(
        scorer=trainer.scorer.state_dict(),
        downgrades=[dataclasses.asdict(one) for one in trainer.downgrades],
        generator=trainer.generator.get_state(),
    )


def collect(trainer: Trainer, batches: int) -> tuple[dict[int, Tensor], Tensor]:
    """Runs batches of training text for the regression, resuming from a saved state.

    Returns:
        Hidden states `[n, D]` seen by each decision point, by its layer; samples `[n, L, A]` in
        nats for the same tokens, which include most of the prompt.
    """
    seen = slice(trainer.env.prompt_tokens // 8, None)
    hidden: dict[int, list[Tensor]] = {point: [] for point in trainer.scorer.decision_points}
    samples: list[Tensor] = []
    first = 0
    if found := trainer.checkpoint.state.get("collected"):
        hidden, samples, first = found["hidden"], found["samples"], found["first"]
        trainer.generator.set_state(found["generator"].cpu())
    for number in Loop("values", range(first, batches), done=first):
        with trainer.autocast():
            states, sampled, final = sampled_values(
                trainer.env, trainer.batch(number), trainer.generator
            )
        trainer.keep_reference(number, final)
        samples.append(sampled[:, seen].flatten(0, 1))
        for state in states[1:]:
            part = state.hidden[:, seen].flatten(0, 1).to(trainer.dtype)
            hidden[state.layers.start].append(part)
        if trainer.checkpoint.due:
            generator = trainer.generator.get_state()
            parts = {"hidden": hidden, "samples": samples, "generator": generator}
            trainer.checkpoint.save(collected={**parts, "first": number + 1})
    return {point: torch.cat(parts) for point, parts in hidden.items()}, torch.cat(samples)


def fit(
    scorer: Scorer,
    segments: list[slice],
    hidden: list[Tensor],
    samples: Tensor,
    generator: torch.Generator,
) -> None:
    """Regresses samples on hidden states, with Gamma deviance as the loss.

    Samples are few and noisy for so many inputs: without dropout the scorer overfits, and predicts
    other text worse than a constant would.

    Args:
        scorer: the scorer to fit.
        segments: segments of layers; values of the first one do not depend on a hidden state.
        hidden: hidden states `[n, D]` for each later segment.
        samples: `[n, L, A]` nats.
        generator: source of randomness for order and dropout.
    """
    scorer.train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=_RATE, weight_decay=0.1)
    inputs = [samples.new_empty(len(samples), 0), *hidden]
    seed = int(torch.randint(1 << 31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in Loop("scorer", range(EPOCHS)):
            optimizer.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
            for rows in torch.randperm(len(samples), generator=generator).split(256):
                loss = torch.zeros(())
                for layers, part in zip(segments, inputs, strict=True):
                    state = State(layers, part[rows].float())
                    loss = loss + regression_loss(scorer, state, samples[rows, layers])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    scorer.eval()


def centre(scorer: Scorer, segments: list[slice], hidden: list[Tensor], values: Tensor) -> None:
    """Shifts each predicted increment so that its mean equals that of the samples.

    The differences between tokens stay. A scorer from another bundle needs nothing more: it would
    forget more than it learned from few samples.

    Args:
        scorer: a fitted scorer, or that of a sibling model.
        segments: segments of layers.
        hidden: hidden states `[n, D]` for each segment except the first.
        values: means of the samples, `[L, A]` nats.
    """
    found = values.diff(dim=-1).clamp(min=1e-6)
    with torch.no_grad():
        scorer.bias[segments[0]] = found[segments[0]].log()
        for layers, part in zip(segments[1:], hidden, strict=True):
            told = scorer.log_increments(State(layers, part.float())).exp().mean(0)
            scorer.bias[layers] += (found[layers] / told).log()


def _correction(trainer: Trainer, values: Tensor) -> Tensor:
    """Correction by a static search to the log increments `[L, A-1]` of mean values `[L, A]`.

    Samples of single deviations do not show that combined losses exceed their sum; the search does.
    Differences between tokens stay: each increment is shifted by its layer's correction.
    """
    ids, skip = trainer.ids[: trainer.plan.batch], trainer.actions.index(SKIP)
    with trainer.autocast():
        trainer.downgrades = trainer.static_search(ids, trainer.env.reference(ids), values, 1)
    found = values.diff(dim=-1).clamp(min=1e-6)
    if not trainer.downgrades:  # no action saves time on this machine
        return torch.zeros_like(found)
    costs = trainer.costs.clone()
    costs[0, skip] = costs[0, skip - 1]  # never taken, so any value will do
    return (static.increments_of(trainer.downgrades, costs, found) / found).log()
