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

_RATE, _EPOCHS = 2e-3, 10  # of the scorer's fit; the rate falls to 0


def regress(trainer: Trainer) -> None:
    """Fits the scorer, unless an earlier run did; the checkpoint keeps it and the static search."""
    state = trainer.checkpoint.state
    if "scorer" in state:
        trainer.downgrades = [static.Downgrade(**one) for one in state["downgrades"]]
        return
    hidden, samples = collect(trainer)
    values = samples.mean(0)  # [L, A], nats
    if trainer.options.start is None:
        trainer.scorer.standardise(torch.cat(hidden).float())
        with torch.no_grad():
            trainer.scorer.bias.copy_(values.diff(dim=-1).clamp(min=1e-6).log())
        fit(trainer.scorer, trainer.env.segments, hidden, samples, trainer.generator)
    else:
        centre(trainer.scorer, trainer.env.segments, hidden, values)
    _correct(trainer, values)
    trainer.checkpoint.save(
        scorer=trainer.scorer.state_dict(),
        downgrades=[dataclasses.asdict(one) for one in trainer.downgrades],
        generator=trainer.generator.get_state(),
    )


def collect(trainer: Trainer) -> tuple[list[Tensor], Tensor]:
    """Runs the batches of the regression.

    Returns:
        Hidden states `[n, D]` that each decision point sees; samples `[n, L, A]` in nats of the
        same tokens, and of most of the prompt.
    """
    seen = slice(trainer.env.prompt_tokens // 8, None)
    hidden: list[list[Tensor]] = [[] for _ in trainer.scorer.decision_points]
    samples: list[Tensor] = []
    for number in Loop("values", range(trainer.plan.regression_batches)):
        with trainer.autocast():
            states, sampled, final = sampled_values(
                trainer.env, trainer.batch(number), trainer.generator
            )
        trainer.keep_reference(number, final)
        samples.append(sampled[:, seen].flatten(0, 1))
        for part, state in zip(hidden, states[1:], strict=True):
            part.append(state.hidden[:, seen].flatten(0, 1).to(trainer.dtype))
    return [torch.cat(part) for part in hidden], torch.cat(samples)


def fit(
    scorer: Scorer,
    segments: list[slice],
    hidden: list[Tensor],
    samples: Tensor,
    generator: torch.Generator,
) -> None:
    """Regresses samples on hidden states, by Gamma deviance.

    Args:
        scorer: that learns.
        segments: of layers; the first one's values depend on no hidden state.
        hidden: `[n, D]` of each further segment.
        samples: `[n, L, A]` nats.
        generator: of the order.
    """
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=_RATE, weight_decay=0.1)
    inputs = [samples.new_empty(len(samples), 0), *hidden]
    for epoch in range(_EPOCHS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * epoch / _EPOCHS)) / 2
        for rows in torch.randperm(len(samples), generator=generator).split(256):
            loss = torch.zeros(())
            for layers, part in zip(segments, inputs, strict=True):
                state = State(layers, part[rows].float())
                loss = loss + regression_loss(scorer, state, samples[rows, layers])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def centre(scorer: Scorer, segments: list[slice], hidden: list[Tensor], values: Tensor) -> None:
    """Gives each increment of a scorer from elsewhere the mean that it has here.

    What it knows about tokens stays: few samples would teach it less than they make it forget.

    Args:
        scorer: of a sibling.
        segments: of layers.
        hidden: `[n, D]` of each segment but the first.
        values: `[L, A]` nats, means of the samples.
    """
    found = values.diff(dim=-1).clamp(min=1e-6)
    with torch.no_grad():
        scorer.bias[segments[0]] = found[segments[0]].log()
        for layers, part in zip(segments[1:], hidden, strict=True):
            told = scorer.log_increments(State(layers, part.float())).exp().mean(0)
            scorer.bias[layers] += (found[layers] / told).log()


def _correct(trainer: Trainer, values: Tensor) -> None:
    """Corrects the mean value `[L, A]` of each increment by what a static search measures.

    Samples of single deviations do not see that losses add up to more than their sum; the search
    does. What the scorer learned about tokens stays: each is moved by its layer's correction.
    """
    ids, skip = trainer.ids[: trainer.plan.batch], trainer.actions.index(SKIP)
    with trainer.autocast():
        trainer.downgrades = trainer.static_search(ids, trainer.env.reference(ids), values, 1)
    if not trainer.downgrades:  # no action saves time on this machine
        return
    costs = trainer.costs.clone()
    costs[0, skip] = costs[0, skip - 1]  # not taken, so no matter
    wanted = static.increments_of(trainer.downgrades, costs)
    found = values.diff(dim=-1).clamp(min=1e-6)
    with torch.no_grad():
        trainer.scorer.bias.add_((wanted / found).log())
