"""Figures drawn from a measured run: shares, token classes, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dash_onnx.core.actions import Action
from dash_onnx.report.sample import Measured
from dash_onnx.report.tokens import KINDS, LETTERS, Kind, Token

_BINS = 10


@dataclass(frozen=True)
class KindFacts:
    """How one class of tokens fared.

    Attributes:
        tokens: how many.
        cost: mean, as a fraction of the full time.
        skipped: share of skips among the decisions.
        kl: mean, in nats.
    """

    kind: Kind
    tokens: int
    cost: float
    skipped: float
    kl: float


@dataclass(frozen=True)
class Bin:
    """Tokens whose predicted KL is about the same.

    Attributes:
        predicted: mean, in nats.
        realised: mean, in nats.
        low: lower quartile of the realised KL.
        high: upper quartile.
        tokens: how many.
    """

    predicted: float
    realised: float
    low: float
    high: float
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """Predicted against realised KL per token.

    Attributes:
        bins: by ascending prediction, a tenth of the tokens each.
        rank_correlation: Spearman's; 0 where either is constant.
    """

    bins: tuple[Bin, ...]
    rank_correlation: float


@dataclass(frozen=True)
class Analysis:
    """One run of the scorer, in figures.

    Attributes:
        layers: share of each action per layer.
        kinds: classes that occur in the sample.
        calibration: of the predicted KL.
    """

    layers: tuple[dict[Action, float], ...]
    kinds: tuple[KindFacts, ...]
    calibration: Calibration


def analyse(run: Measured, tokens: Sequence[Token], actions: Sequence[Action]) -> Analysis:
    """Draws the figures of one run.

    Args:
        run: of the scorer.
        tokens: that it decoded.
        actions: of the bundle.
    """
    return Analysis(
        layer_shares(run, actions), _kinds(run, tokens), calibration(run.predicted, run.kl)
    )


def layer_shares(run: Measured, actions: Sequence[Action]) -> tuple[dict[Action, float], ...]:
    """Share of each action per layer."""
    return tuple(
        {action: column.count(LETTERS[action]) / len(column) for action in actions}
        for column in zip(*run.paths, strict=True)
    )


def _kinds(run: Measured, tokens: Sequence[Token]) -> tuple[KindFacts, ...]:
    found = []
    for kind in KINDS:
        rows = [i for i, token in enumerate(tokens) if token.kind == kind]
        if rows:
            skips = [run.paths[i].count(LETTERS["skip"]) / len(run.paths[i]) for i in rows]
            cost, kl = (float(np.mean([part[i] for i in rows])) for part in (run.cost, run.kl))
            found.append(KindFacts(kind, len(rows), cost, float(np.mean(skips)), kl))
    return tuple(found)


def calibration(predicted: Sequence[float], realised: Sequence[float]) -> Calibration:
    """Bins tokens by predicted KL."""
    x, y = np.asarray(predicted), np.asarray(realised)
    order = np.argsort(x, kind="stable")
    bins = [
        Bin(
            float(x[part].mean()),
            float(y[part].mean()),
            float(np.quantile(y[part], 0.25)),
            float(np.quantile(y[part], 0.75)),
            len(part),
        )
        for part in np.array_split(order, _BINS)
        if len(part)
    ]
    return Calibration(tuple(bins), _correlation(_ranks(x), _ranks(y)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    result: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return result


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
