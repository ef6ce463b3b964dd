"""The best static assignment for each cost: what the learned policy has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dash_onnx.actions import SKIP, Action
from dash_onnx.exporters.train.environment import Decide, Environment
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
    values = values.clone()
    while moves := _moves(env, path):
        ranked = sorted(
            (float(values[layer, action] - values[layer, path[layer]]) / saved, layer, action)
            for layer, action in moves
            if (saved := float(costs[layer, path[layer]] - costs[layer, action])) > 0
        )
        measured = []
        for _, layer, action in ranked[:tried]:
            before = path[layer]
            candidate = [*path]
            candidate[layer] = action
            (kl,) = path_kl(env, ids, reference, candidate, [env.frozen.head])
            loss, saved = kl - current, float(costs[layer, before] - costs[layer, action])
            values[layer, action] = values[layer, before] + max(loss, 1e-7)
            measured.append((loss / saved, kl, candidate))
        if not measured:
            return
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


def path_kl(
    env: Environment, ids: Tensor, reference: Tensor, path: list[int], heads: Sequence[Action]
) -> list[float]:
    """Mean KL of the decided tokens when every token takes the same path, with each head."""
    seen = slice(env.prompt_tokens, None)
    with torch.no_grad():
        parts = [env.run(part, fixed(env, path, part.shape)).final for part in ids.split(4)]
        final = torch.cat(parts)[:, seen]
        return [float(env.kl(reference[:, seen], final, head).mean()) for head in heads]


def fixed(env: Environment, path: list[int], shape: torch.Size) -> Decide:
    """The same path for every token of `[B, T]`."""
    chosen = torch.nn.functional.one_hot(torch.tensor(path), len(env.actions)).float()  # [L, A]
    return lambda state: chosen[state.layer].expand(*shape, -1)
