"""The colors of the actions, in every page and picture."""

from __future__ import annotations

from collections.abc import Mapping

from dash_onnx.core.actions import Action

LIGHT: dict[Action, str] = {
    "full": "#16325c",
    "int8": "#2f7ebc",
    "int4": "#93cbe6",
    "int2": "#bfe6d2",
    "skip": "#f2a33a",
}
"""On a light background: darker where more is computed."""

DARK: dict[Action, str] = {
    "full": "#eef4fa",
    "int8": "#6fb1e6",
    "int4": "#2d668f",
    "int2": "#2f7a5c",
    "skip": "#e58f1c",
}
"""On a dark background: lighter where more is computed."""


def css(colors: Mapping[Action, str]) -> str:
    """Custom properties of a style sheet, one for each action."""
    return " ".join(f"--{action}: {color};" for action, color in colors.items())
