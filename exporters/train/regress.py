"""The first phase of a training: value regression along the reference path."""

from __future__ import annotations

import dataclasses
import math

import torch
from tqdm import tqdm

from dash_onnx.core.actions import SKIP
from dash_onnx.exporters.train import static
from dash_onnx.exporters.train.environment import State
from dash_onnx.exporters.train.frozen import Tensor
from dash_onnx.exporters.train.learning import BATCH, Learning
from dash_onnx.exporters.train.values import regression_loss, sampled_values

_RATE, _EPOCHS = 2e-3, 10  # of the scorer's fit; the rate falls to 0


def regress(run: Learning) -> None:
    """The scorer learns each action's KL; the checkpoint keeps it and the static descent."""
    state = run.checkpoint.state
    if "scorer" in state:
        run.moves = [static.Move(**move) for move in state["descent"]]
        return
    seen = slice(run.env.prompt_tokens // 8, None)
    hidden: list[list[Tensor]] = [[] for _ in run.scorer.decision_points]
    samples: list[Tensor] = []
    for number in tqdm(range(run.effort.batches), desc="values", disable=None):
        with run.autocast():
            states, sampled, final = sampled_values(run.env, run.batch(number), run.generator)
        run.keep_reference(number, final)
        samples.append(sampled[:, seen].flatten(0, 1))
        for part, at in zip(hidden, states[1:], strict=True):
            part.append(at.hidden[:, seen].flatten(0, 1).to(run.dtype))
    inputs, targets = [torch.cat(part) for part in hidden], torch.cat(samples)
    values = targets.mean(0)  # [L, A], nats
    run.scorer.calibrate(torch.cat(inputs).float())
    with torch.no_grad():
        run.scorer.bias.copy_(values.diff(dim=-1).clamp(min=1e-6).log())
    _fit(run, inputs, targets)
    _descend(run, values)
    run.checkpoint.save(
        scorer=run.scorer.state_dict(),
        descent=[dataclasses.asdict(move) for move in run.moves],
        generator=run.generator.get_state(),
    )


def _fit(run: Learning, inputs: list[Tensor], targets: Tensor) -> None:
    """Regresses samples `[n, L, A]` on the hidden states `[n, D]` of each decision point."""
    optimizer = torch.optim.AdamW(run.scorer.parameters(), lr=_RATE, weight_decay=0.1)
    nothing = targets.new_empty(len(targets), 0)  # the first segment sees no token
    for epoch in range(_EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 + math.cos(math.pi * epoch / _EPOCHS)) / 2
        for rows in torch.randperm(len(targets), generator=run.generator).split(256):
            loss = torch.zeros(())
            for layers, hidden in zip(run.env.segments, (nothing, *inputs), strict=True):
                state = State(layers, hidden[rows].float())
                loss = loss + regression_loss(run.scorer, state, targets[rows, layers])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _descend(run: Learning, values: Tensor) -> None:
    """Corrects the mean value `[L, A]` of each step by what a static descent measures.

    Single deviations do not see that losses add up to more than their sum; the descent does.
    What the scorer learned about tokens stays: each is moved by its layer's correction.
    """
    ids = run.ids[:BATCH]
    with run.autocast():
        reference = run.env.reference(ids, run.actions[0])
        moves = static.search(run.env, ids, reference, run.costs, values, tried=1)
        run.moves = list(tqdm(moves, desc="static", disable=None))
    if not run.moves:  # no action saves time on this machine
        return
    costs = run.costs.clone()
    costs[0, run.actions.index(SKIP)] = costs[0, -2]  # not taken, so no matter
    wanted = static.step_values(run.moves, costs)
    found = values.diff(dim=-1).clamp(min=1e-6)
    with torch.no_grad():
        run.scorer.bias.add_((wanted / found).log())
