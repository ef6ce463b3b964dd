"""The search for static assignments: what it measures, and what it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dash_onnx.exporters.train import static

LOSSES = torch.tensor(
    [[0.0, 0.1, 9.0], [0.0, 0.02, 0.3], [0.0, 0.05, 0.2], [0.0, 0.01, 0.9], [0.0, 0.2, 9.0]]
)
"""Nats of each layer's actions alone; here they add up."""

COSTS = torch.tensor([2.0, 1.0, 0.5]).expand(5, 3)
ENV: Any = SimpleNamespace(
    layers=5, actions=("int8", "int4", "skip"), frozen=SimpleNamespace(head="int8")
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Paths that the search has measured."""
    paths: list[tuple[int, ...]] = []

    def path_kl(_env: Any, _ids: Any, _reference: Any, path: Any, _heads: Any) -> list[float]:
        paths.append(tuple(path))
        return [float(sum(LOSSES[layer, action] for layer, action in enumerate(path)))]

    monkeypatch.setattr(static, "path_kl", path_kl)
    return paths


def search(values: torch.Tensor, tried: int, start: Any = None) -> list[static.Move]:
    nothing = torch.zeros(())
    return list(static.search(ENV, nothing, nothing, COSTS, values, tried, start))


def test_each_step_loses_least_per_time_saved(measured: list[Any]) -> None:
    moves = search(LOSSES, 4)
    assert [(move.layer, move.action) for move in moves[:4]] == [(3, 1), (1, 1), (2, 1), (0, 1)]
    multipliers = [move.multiplier for move in moves]
    assert multipliers == pytest.approx(sorted(multipliers))
    for move in moves:
        assert move.path[0] < 2 and move.path[4] < 2  # the ends are never skipped
    skips = [move.path for move in moves if 2 in move.path]
    # What is between precisions is taken as predicted; where predictions hold, a skip is measured
    # once, against what the path before the first one measures.
    assert measured == [moves[-len(skips) - 1].path, *skips]


def test_a_wrong_prediction_is_found_out_by_measuring_more(measured: list[Any]) -> None:
    hopeful, start = LOSSES.clone(), (1, 1, 1, 1, 1)
    hopeful[1, 2] = 0.1  # it loses 0.3
    assert search(hopeful, 1, start)[0].layer == 1
    measured.clear()
    assert search(hopeful, 2, start)[0].layer == 2
    assert measured[:3] == [start, (1, 2, 1, 1, 1), (1, 1, 2, 1, 1)]


def test_it_begins_where_it_is_told_and_ends_where_nothing_is_useful(measured: list[Any]) -> None:
    start = (1, 1, 1, 1, 1)  # 0.38 nats
    moves = search(LOSSES, 3, start)
    assert measured[0] == start
    assert [(move.layer, move.action) for move in moves] == [(2, 2), (1, 2)]
    assert [move.kl for move in moves] == pytest.approx([0.53, 0.81])
