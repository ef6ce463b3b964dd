"""The search for static assignments: what it measures, and what it takes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dash_onnx.exporters.train.static import Downgrade, increments_of, search

LOSSES = torch.tensor(
    [[0.0, 0.1, 0.1], [0.0, 0.02, 0.3], [0.0, 0.05, 0.2], [0.0, 0.01, 0.9], [0.0, 0.2, 9.0]]
)
"""Nats of each layer's actions alone; here they add up."""

COSTS = torch.tensor([2.0, 1.0, 0.5]).expand(5, 3)
START = (1, 1, 1, 1, 1)  # loses 0.38 nats

Path = tuple[int, ...]


def searched(
    values: torch.Tensor, candidates: int, start: Path | None = None
) -> tuple[list[Downgrade], list[Path]]:
    """What the search finds, and the paths that it measures."""
    measured: list[Path] = []

    def measure(path: Path) -> float:
        measured.append(path)
        return float(sum(LOSSES[layer, action] for layer, action in enumerate(path)))

    return list(search(COSTS, values, measure, candidates, 2, start)), measured


def test_each_downgrade_loses_least_per_time_saved() -> None:
    found, measured = searched(LOSSES, 4)
    assert [(one.layer, one.action) for one in found[:4]] == [(3, 1), (1, 1), (2, 1), (0, 1)]
    multipliers = [one.multiplier for one in found]
    assert multipliers == pytest.approx(sorted(multipliers))
    assert all(one.path[0] < 2 for one in found)  # skipping it is never tried
    skips = [one.path for one in found if 2 in one.path]
    # What is between precisions is taken as predicted; where predictions hold, a skip is measured
    # once, against what the path before the first one measures.
    assert measured == [found[-len(skips) - 1].path, *skips]


def test_a_wrong_prediction_is_found_out_by_measuring_more() -> None:
    hopeful = LOSSES.clone()
    hopeful[1, 2] = 0.1  # it loses 0.3
    assert searched(hopeful, 1, START)[0][0].layer == 1
    found, measured = searched(hopeful, 2, START)
    assert found[0].layer == 2
    assert measured[:3] == [START, (1, 2, 1, 1, 1), (1, 1, 2, 1, 1)]


def test_it_begins_where_it_is_told_and_ends_where_nothing_is_useful() -> None:
    found, measured = searched(LOSSES, 3, START)
    assert measured[0] == START
    assert [(one.layer, one.action) for one in found] == [(2, 2), (1, 2)]
    assert [one.kl for one in found] == pytest.approx([0.53, 0.81])


def test_increments_make_the_multiplier_alone_repeat_the_search() -> None:
    found, _ = searched(LOSSES, 3)
    increments = increments_of(found, COSTS, LOSSES.diff(dim=-1))
    values = torch.nn.functional.pad(increments.cumsum(-1), (1, 0))
    for one, later in pairwise(found):
        if later.multiplier > one.multiplier * 1.001:
            multiplier = (one.multiplier * later.multiplier) ** 0.5
            assert tuple((values + multiplier * COSTS).argmin(-1).tolist()) == one.path


def test_an_action_that_a_downgrade_passes_over_stays_too_dear() -> None:
    # The third action saves a fifth of the last one's time for two thirds of its loss.
    costs = torch.tensor([[2.0, 1.0, 0.9, 0.5]])
    single = torch.tensor([[0.1, 0.4, 0.2]])
    found = [Downgrade(0, 1, (1,), 0.1, 0.1), Downgrade(0, 3, (3,), 0.7, 1.2)]
    increments = increments_of(found, costs, single)
    torch.testing.assert_close(increments, single)
    # What it saves is the least that it may lose: the search preferred the last.
    cheap = increments_of(found, costs, torch.tensor([[0.1, 0.0, 0.6]]))
    torch.testing.assert_close(cheap, torch.tensor([[0.1, 0.12, 0.48]]))
