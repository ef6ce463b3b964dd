"""The best static assignment for each cost: the baseline for the learned policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dash_onnx.exporters.train.dequantized import Tensor

LIMIT = 0.8  # nats; higher losses are useless


@dataclass(frozen=True)
class Downgrade:
    """One layer made cheaper.

    Attributes:
        layer: layer that became cheaper.
        action: index of its new action.
        path: action indices of all layers after it.
        kl: mean KL of that path in nats.
        multiplier: nats lost per unit of cost saved.
    """

    layer: int
    action: int
    path: tuple[int, ...]
    kl: float
    multiplier: float


def search(
    costs: Tensor,
    values: Tensor,
    measure: Callable[[tuple[int, ...]], float],
    candidates: int,
    lossy: int,
    start: tuple[int, ...] | None = None,
) -> Iterator[Downgrade]:
    """Greedy search: makes one layer cheaper at a time, as long as assignments are useful.

    The next downgrade is the one that loses the least KL per cost saved. Downgrades between
    precisions are taken as predicted: their losses are small and additive. If a lossy action ranks
    first, the top ones are measured until no other is predicted to be better or `candidates` are
    measured, and the best is taken. Measured losses replace the predictions from then on. The first
    layer is never skipped, as in the policy.

    Args:
        costs: `[L, A]`, in any unit; actions, most expensive first, `skip` last.
        values: predicted KL of each action alone, `[L, A]` nats.
        measure: mean KL of a path in nats.
        lossy: index of the first action whose losses are measured.
        candidates: most downgrades measured per step, at least 1.
        start: path to begin with; None starts with the most expensive one.

    Yields:
        The downgrades, most expensive first.
    """
    skip = costs.shape[1] - 1
    path, kl, measured = start or (0,) * len(costs), 0.0, start is None
    values = values.clone()
    while kl <= LIMIT:
        ranked = sorted(
            (float(values[layer, action] - values[layer, now]) / saved, layer, action, saved)
            for layer, now in enumerate(path)
            for action in range(now + 1, skip if layer == 0 else skip + 1)
            if (saved := float(costs[layer, now] - costs[layer, action])) > 0
        )
        if not ranked:
            return
        multiplier, layer, action, saved = ranked[0]
        if action < lossy:
            path, kl, measured = _with(path, layer, action), kl + multiplier * saved, False
            yield Downgrade(layer, action, path, kl, multiplier)
            continue
        if not measured:
            kl, measured = measure(path), True
        best: Downgrade | None = None
        for multiplier, layer, action, saved in ranked[:candidates]:
            if best and best.multiplier <= multiplier:
                break
            candidate = _with(path, layer, action)
            found = measure(candidate)
            values[layer, action] = values[layer, path[layer]] + max(found - kl, 1e-7)
            if best is None or (found - kl) / saved < best.multiplier:
                best = Downgrade(layer, action, candidate, found, (found - kl) / saved)
        assert best
        kl, path = best.kl, best.path
        yield best


def _with(path: tuple[int, ...], layer: int, action: int) -> tuple[int, ...]:
    return (*path[:layer], action, *path[layer + 1 :])


def increments_of(downgrades: Sequence[Downgrade], costs: Tensor, single: Tensor) -> Tensor:
    """KL increments with which the multiplier alone reproduces a search: `[L, A-1]` nats.

    A layer leaves an action when the multiplier reaches the loss per unit of cost of that
    downgrade, or of an earlier one if that was higher. Increments that the search never reached get
    1.5 times the highest such rate. A downgrade that passed over intermediate actions distributes
    its loss over them: in proportion to `single`, or to the cost saved, whichever is more in total
    up to an action, so that those actions are not chosen.

    Args:
        downgrades: result of `search`, in order.
        costs: `[L, A]`, in any unit.
        single: `[L, A-1]` nats, increments of single deviations.
    """
    saved = (costs[:, :-1] - costs[:, 1:]).clamp(min=1e-6)
    increments = torch.empty_like(saved)
    highest = 0.0
    now = [0] * len(costs)

    def pay(layer: int, action: int, multiplier: float) -> None:
        passed = slice(now[layer], action)
        time, loss = saved[layer, passed].cumsum(0), single[layer, passed].cumsum(0)
        share = torch.maximum(time / time[-1], loss / loss[-1].clamp(min=1e-9))
        paid = multiplier * time[-1] * share
        increments[layer, passed] = paid.diff(prepend=paid.new_zeros(1))
        now[layer] = action

    for one in downgrades:
        highest = max(highest, one.multiplier, 1e-6)
        pay(one.layer, one.action, highest)
    last = saved.shape[1]
    for layer, action in enumerate(now):
        if action < last:
            pay(layer, last, 1.5 * highest)
    return increments.clamp(min=1e-9)
