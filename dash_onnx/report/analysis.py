"""Figures of a run of the scorer: shares per layer, kinds of tokens, reliability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_onnx.core.actions import LETTERS, SKIP, Action
from dash_onnx.report.sample import PolicyRun
from dash_onnx.report.tokens import KINDS, Token, TokenKind

_BINS = 10


@dataclass(frozen=True)
class KindFacts:
    """How one kind of tokens fared.

    Attributes:
        tokens: number of tokens.
        cost: mean cost, as a fraction of the reference's time.
        skipped: share of skips among the decisions.
        kl: mean KL, in nats.
    """

    kind: TokenKind
    tokens: int
    cost: float
    skipped: float
    kl: float


@dataclass(frozen=True)
class Bin:
    """Tokens whose predicted KL is about the same.

    Attributes:
        predicted: mean predicted KL, in nats.
        realised: mean realised KL, in nats.
        low: lower quartile of the realised KL.
        high: upper quartile of the realised KL.
        tokens: number of tokens.
    """

    predicted: float
    realised: float
    low: float
    high: float
    tokens: int


@dataclass(frozen=True)
class Reliability:
    """Predicted against realised KL per token (a reliability diagram).

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
        kinds: kinds of tokens that occur in the sample.
        reliability: reliability of the predicted KL.
    """

    layers: tuple[dict[Action, float], ...]
    kinds: tuple[KindFacts, ...]
    reliability: Reliability


def analyse(run: PolicyRun, tokens: Sequence[Token], actions: Sequence[Action]) -> Analysis:
    """Computes the figures of one run.

    Args:
        run: run of the scorer.
        tokens: tokens that it decoded.
        actions: actions of the bundle.
    """
    layers = tuple(
        {action: column.count(LETTERS[action]) / len(column) for action in actions}
        for column in zip(*run.paths, strict=True)
    )
    skipped = [path.count(LETTERS[SKIP]) / len(path) for path in run.paths]
    kinds = []
    for kind in KINDS:
        rows = [i for i, token in enumerate(tokens) if token.kind == kind]
        if rows:
            means = (float(np.take(part, rows).mean()) for part in (run.cost, skipped, run.kl))
            kinds.append(KindFacts(kind, len(rows), *means))
    return Analysis(layers, tuple(kinds), reliability(run.predicted, run.kl))


def reliability(predicted: Sequence[float], realised: Sequence[float]) -> Reliability:
    """Bins tokens by predicted KL."""
    x, y = np.asarray(predicted), np.asarray(realised)
    bins = []
    for part in np.array_split(np.argsort(x, kind="stable"), min(_BINS, len(x))):
        low, high = np.quantile(y[part], (0.25, 0.75)).tolist()
        bins.append(Bin(float(x[part].mean()), float(y[part].mean()), low, high, len(part)))
    constant = np.ptp(x) == 0 or np.ptp(y) == 0
    correlation = 0.0 if constant else float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])
    return Reliability(tuple(bins), correlation)


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    result: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return result
