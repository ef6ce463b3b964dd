"""The layer x token picture: which layer did what for which token, and what each token cost."""

from __future__ import annotations

from collections.abc import Sequence

from dash_onnx.core.actions import Action
from dash_onnx.report.sample import Measured
from dash_onnx.report.svg import Scale, chart, label, line, number, tag, title
from dash_onnx.report.tokens import LETTERS, Token, visible

_COLUMNS = 60  # tokens per row of the picture
_CELL = 13  # width of a token
_LEFT = 52
_COST = 46  # height of the cost above the layers
_SHOWN = 11  # characters of a token


def picture(run: Measured, tokens: Sequence[Token], actions: Sequence[Action]) -> str:
    """Draws one row after the other, each with as many tokens as fit."""
    low, high = min(run.cost), max(run.cost)
    ends = (low, high) if high > low else (low * 0.9, high * 1.1)
    starts = range(0, len(tokens), _COLUMNS)
    return "".join(_row(run, tokens, actions, start, ends) for start in starts)


def _row(
    run: Measured,
    tokens: Sequence[Token],
    actions: Sequence[Action],
    start: int,
    ends: tuple[float, float],
) -> str:
    part = range(start, min(start + _COLUMNS, len(tokens)))
    layers = len(run.paths[0])
    cell = 9 if layers <= 40 else 6
    top = _COST + 24
    bottom = top + layers * cell
    right = _LEFT + _CELL * _COLUMNS
    cost = Scale(*ends, top - 12, 10)
    parts = [_cost_axis(cost, ends, run.budget, right)]
    parts.append(_cost_line([cost(run.cost[i]) for i in part]))
    for action in actions:
        cells = "".join(
            f"M{_LEFT + (i - start) * _CELL} {top + layer * cell}h{_CELL - 1}v{cell - 1}"
            f"h{1 - _CELL}z"
            for i in part
            for layer, letter in enumerate(run.paths[i])
            if letter == LETTERS[action]
        )
        if cells:
            parts.append(tag("path", d=cells, class_=f"a-{action}"))
    for layer in range(0, layers, max(1, round(layers / 6))):
        at = top + (layer + 0.5) * cell + 4
        parts.append(label(_LEFT - 8, at, str(layer), class_="tick", text_anchor="end"))
    parts.append(label(0, top + 9, "layer", class_="tick"))
    for i in part:
        x = _LEFT + (i - start) * _CELL
        parts.append(
            label(
                0.0,
                0.0,
                visible(tokens[i].text, _SHOWN),
                class_="token",
                text_anchor="end",
                transform=f"translate({x + _CELL / 2 + 2.5:.1f} {bottom + 6}) rotate(-90)",
            )
            + tag(
                "rect",
                title(_told(run, tokens[i], i)),
                x=x,
                y=0,
                width=_CELL,
                height=bottom + 70,
                class_="over",
            )
        )
    return chart("".join(parts), right + 8, bottom + 76, "actions per layer and token", "wide")


def _cost_axis(cost: Scale, ends: tuple[float, float], budget: float, right: float) -> str:
    parts = []
    for value in ends:
        at = cost(value)
        shown = f"{value:.1%}"
        parts.append(line(_LEFT, at, right, at, "grid"))
        parts.append(label(_LEFT - 6, at + 4, shown, class_="tick", text_anchor="end"))
    if ends[0] < budget < ends[1]:
        parts.append(line(_LEFT, cost(budget), right, cost(budget), "mark"))
    return "".join(parts)


def _cost_line(heights: Sequence[float]) -> str:
    """A step per token."""
    path = f"M{_LEFT} {heights[0]:.1f}" + "".join(f"V{at:.1f}h{_CELL}" for at in heights)
    return tag("path", d=path, class_="line s-dash")


def _told(run: Measured, token: Token, index: int) -> str:
    return (
        f"{token.text!r} ({token.kind})\n{run.cost[index]:.1%} of the full time\n"
        f"KL {number(run.kl[index])}, predicted {number(run.predicted[index])}\n{run.paths[index]}"
    )
