"""The best static assignment for each cost: what the learned policy has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dash_onnx.actions import SKIP, Action
from dash_onnx.exporters.train.environment import Decide, Environment
from dash_onnx.exporters.train.frozen import Tensor

_LIMIT = 1.0  # nats; worse assignments interest nobody


@dataclass(frozen=True)
class Move:
    """One step of the descent.

    Attributes:
        layer: that became cheaper.
        action: index of its new action.
        path: action indices of all layers after the move.
        kl: measured mean KL of that path in nats.
        price: nats lost per unit of cost saved by this move.
    """

    layer: int
    action: int
    path: tuple[int, ...]
    kl: float
    price: float


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

    Every step measures the moves with the best predicted ratio of KL to cost, until no other is
    predicted to be better or `tried` are measured, and takes the best. A move that turned out
    worse than predicted is predicted worse from then on.

    Args:
        env: the process, whose actions go from dear to cheap.
        ids: `[B, T]` to measure on.
        reference: input of the LM head on the reference path, `[B, T, D]`.
        costs: `[L, A]`, in any unit.
        values: predicted KL of each action alone, `[L, A]` nats.
        tried: moves that are measured per step at most.
        start: path to begin with, the reference path if none.

    Yields:
        The moves, from dear to cheap.
    """
    path, current = start or (0,) * env.layers, 0.0
    if start:
        (current,) = path_kl(env, ids, reference, path, [env.frozen.head])
    values = values.clone()
    while current <= _LIMIT:
        ranked = sorted(
            (float(values[layer, action] - values[layer, path[layer]]) / saved, layer, action)
            for layer, action in _moves(env, path)
            if (saved := float(costs[layer, path[layer]] - costs[layer, action])) > 0
        )
        best: Move | None = None
        for predicted, layer, action in ranked[:tried]:
            if best and best.price <= predicted:
                break
            before = path[layer]
            candidate = (*path[:layer], action, *path[layer + 1 :])
            (kl,) = path_kl(env, ids, reference, candidate, [env.frozen.head])
            loss, saved = kl - current, float(costs[layer, before] - costs[layer, action])
            values[layer, action] = values[layer, before] + max(loss, 1e-7)
            if best is None or loss / saved < best.price:
                best = Move(layer, action, candidate, kl, loss / saved)
        if best is None:
            return
        current, path = best.kl, best.path
        yield best


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
    seen = slice(env.prompt_tokens, None)
    with torch.no_grad():
        parts = [env.run(part, fixed(env, path, part.shape)).final for part in ids.split(4)]
        final = torch.cat(parts)[:, seen]
        return [float(env.kl(reference[:, seen], final, head).mean()) for head in heads]


def fixed(env: Environment, path: Sequence[int], shape: torch.Size) -> Decide:
    """The same path for every token of `[B, T]`."""
    chosen = torch.nn.functional.one_hot(torch.tensor(path), len(env.actions)).float()  # [L, A]
    return lambda state: chosen[state.layers].expand(*shape, -1, -1)


def step_values(moves: Sequence[Move], costs: Tensor) -> Tensor:
    """Values that make the price alone reproduce a descent: `[L, A-1]` nats per step.

    A layer leaves an action when the price reaches what that move lost per unit of cost, or what
    an earlier move lost, if that was more. Steps that the descent never took are worth half as
    much again as its last one.

    Args:
        moves: of `search`, in order.
        costs: `[L, A]`, in any unit.
    """
    saved = (costs[:, :-1] - costs[:, 1:]).clamp(min=1e-6)
    highest = 0.0
    prices = torch.zeros_like(saved)
    now = [0] * len(costs)
    for move in moves:
        highest = max(highest, move.price, 1e-6)
        prices[move.layer, now[move.layer] : move.action] = highest
        now[move.layer] = move.action
    prices[prices == 0] = 1.5 * highest
    return prices * saved
