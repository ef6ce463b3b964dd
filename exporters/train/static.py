"""The best static assignment for each cost: what the learned policy has to beat."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dash_onnx.actions import SKIP
from dash_onnx.exporters.train.environment import Environment
from dash_onnx.exporters.train.frozen import Tensor


def search(
    env: Environment, ids: Tensor, reference: Tensor, costs: Tensor, values: Tensor, tried: int
) -> Iterator[tuple[list[int], float]]:
    """Greedy descent from the reference path, one layer one action cheaper at a time.

    Every step takes, among the `tried` moves with the best predicted ratio of KL to milliseconds,
    the one with the best measured ratio. A move that turned out worse than predicted is
    predicted worse from then on.

    Args:
        env: the process, whose actions go from dear to cheap.
        ids: `[B, T]` to measure on.
        reference: input of the LM head on the reference path, `[B, T, D]`.
        costs: milliseconds `[L, A]`.
        values: predicted KL of each action alone, `[L, A]` nats.
        tried: moves that are measured per step.

    Yields:
        Action indices per layer and the measured mean KL, from dear to cheap.
    """
    path = [0] * env.layers
    current = 0.0
    correction = torch.ones_like(values)
    while moves := _moves(env, path):

        def predicted(move: tuple[int, int]) -> float:
            layer, action = move
            before = path[layer]
            loss = values[layer, action] * correction[layer, action] - values[layer, before]
            return float(loss.clamp(min=1e-7) / (costs[layer, before] - costs[layer, action]))

        measured = []
        for layer, action in sorted(moves, key=predicted)[:tried]:
            candidate = [*path]
            candidate[layer] = action
            kl = path_kl(env, ids, reference, candidate)
            ratio = (kl - current) / float(costs[layer, path[layer]] - costs[layer, action])
            expected = predicted((layer, action))
            correction[layer, action] *= min(max(ratio / expected, 0.5), 4.0)
            measured.append((ratio, kl, candidate))
        _, current, path = min(measured)
        yield path, current


def _moves(env: Environment, path: list[int]) -> list[tuple[int, int]]:
    ends = {0, env.layers - 1}
    return [
        (layer, action)
        for layer, now in enumerate(path)
        for action in range(now + 1, len(env.actions))
        if not (env.actions[action] == SKIP and layer in ends)
    ]


def path_kl(env: Environment, ids: Tensor, reference: Tensor, path: list[int]) -> float:
    """Mean KL of the decided tokens when every token takes the same path."""
    chosen = torch.nn.functional.one_hot(torch.tensor(path), len(env.actions)).float()  # [L, A]
    total, count = 0.0, 0
    with torch.no_grad():
        for part, wanted in zip(ids.split(4), reference.split(4), strict=True):
            rollout = env.run(
                part, lambda state, part=part: chosen[state.layer].expand(*part.shape, -1)
            )
            kl = env.kl(wanted, rollout.final)[:, env.prompt_tokens :]
            total, count = total + float(kl.sum()), count + kl.numel()
    return total / count
