"""The best static assignment for each cost: what the learned policy has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.exporters.train.environment import Decide, Environment
from dash_onnx.exporters.train.frozen import Tensor

LIMIT = 0.8  # nats; what loses more interests nobody


@dataclass(frozen=True)
class Move:
    """One step of the descent.

    Attributes:
        layer: that became cheaper.
        action: index of its new action.
        path: action indices of all layers after the move.
        kl: mean KL of that path in nats.
        multiplier: nats lost per unit of cost saved by this move.
    """

    layer: int
    action: int
    path: tuple[int, ...]
    kl: float
    multiplier: float


def search(
    env: Environment,
    ids: Tensor,
    reference: Tensor,
    costs: Tensor,
    values: Tensor,
    tried: int,
    start: tuple[int, ...] | None = None,
) -> Iterator[Move]:
    """Greedy descent, one layer one action cheaper at a time, as far as assignments are useful.

    A move between precisions is taken as predicted: such losses are small and add up. Where a skip
    is predicted to have the best ratio of KL to cost, the best moves are measured, until no other
    is predicted to be better or `tried` are measured, and the best is taken. A move that turned
    out worse than predicted is predicted worse from then on.

    Args:
        env: the process, whose actions go from dear to cheap.
        ids: `[B, T]` to measure on.
        reference: input of the LM head on the reference path, `[B, T, D]`.
        costs: `[L, A]`, in any unit.
        values: predicted KL of each action alone, `[L, A]` nats.
        tried: moves that are measured per step at most, at least 1.
        start: path to begin with, the reference path if none.

    Yields:
        The moves, from dear to cheap.
    """
    path, current, known = start or (0,) * env.layers, 0.0, start is None
    values = values.clone()
    while current <= LIMIT:
        ranked = sorted(
            (
                float(values[layer, action] - values[layer, path[layer]]) / saved,
                layer,
                action,
                saved,
            )
            for layer, action in _moves(env, path)
            if (saved := float(costs[layer, path[layer]] - costs[layer, action])) > 0
        )
        if not ranked:
            return
        multiplier, layer, action, saved = ranked[0]
        if env.actions[action] != SKIP:
            path, current, known = _moved(path, layer, action), current + multiplier * saved, False
            yield Move(layer, action, path, current, multiplier)
            continue
        if not known:
            (current,) = path_kl(env, ids, reference, path, [env.frozen.head])
            known = True
        best: Move | None = None
        for multiplier, layer, action, saved in ranked[:tried]:
            if best and best.multiplier <= multiplier:
                break
            candidate = _moved(path, layer, action)
            (kl,) = path_kl(env, ids, reference, candidate, [env.frozen.head])
            loss = kl - current
            values[layer, action] = values[layer, path[layer]] + max(loss, 1e-7)
            if best is None or loss / saved < best.multiplier:
                best = Move(layer, action, candidate, kl, loss / saved)
        assert best
        current, path = best.kl, best.path
        yield best


def _moved(path: tuple[int, ...], layer: int, action: int) -> tuple[int, ...]:
    return (*path[:layer], action, *path[layer + 1 :])


def _moves(env: Environment, path: Sequence[int]) -> list[tuple[int, int]]:
    ends = {0, env.layers - 1}
    return [
        (layer, action)
        for layer, now in enumerate(path)
        for action in range(now + 1, len(env.actions))
        if not (env.actions[action] == SKIP and layer in ends)
    ]


def path_kl(
    env: Environment, ids: Tensor, reference: Tensor, path: Sequence[int], heads: Sequence[Action]
) -> list[float]:
    """Mean KL of the decided tokens when every token takes the same path, with each head."""
    with torch.no_grad():
        parts = [env.run(part, fixed(env, path, part.shape)).final for part in ids.split(4)]
    return env.mean_kl(reference, torch.cat(parts), heads)


def fixed(env: Environment, path: Sequence[int], shape: torch.Size) -> Decide:
    """The same path for every token of `[B, T]`."""
    chosen = torch.nn.functional.one_hot(torch.tensor(path), len(env.actions)).float()  # [L, A]
    return lambda state: chosen[state.layers].expand(*shape, -1, -1)


def step_values(moves: Sequence[Move], costs: Tensor) -> Tensor:
    """Values that make the multiplier alone reproduce a descent: `[L, A-1]` nats per step.

    A layer leaves an action when the multiplier reaches what that move lost per unit of cost, or
    what an earlier move lost, if that was more. Steps that the descent never took are worth half as
    much again as its last one.

    Args:
        moves: of `search`, in order.
        costs: `[L, A]`, in any unit.
    """
    saved = (costs[:, :-1] - costs[:, 1:]).clamp(min=1e-6)
    highest = 0.0
    multipliers = torch.zeros_like(saved)
    now = [0] * len(costs)
    for move in moves:
        highest = max(highest, move.multiplier, 1e-6)
        multipliers[move.layer, now[move.layer] : move.action] = highest
        now[move.layer] = move.action
    multipliers[multipliers == 0] = 1.5 * highest
    return multipliers * saved
