"""The report as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dash_onnx.core.actions import LETTERS
from dash_onnx.core.colors import DARK, LIGHT, css
from dash_onnx.report.report import Report
from dash_onnx.report.scale import Scale, decades, padded
from dash_onnx.report.tokens import visible


def render(report: Report) -> str:
    """Renders the page: its text from `report.html.jinja`, its charts from `charts.svg.jinja`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_short,
    )
    environment.filters.update(number=number, percent=percent, visible=visible)
    environment.globals.update(Scale=Scale, decades=decades, padded=padded, letters=LETTERS)
    environment.globals.update(css=css, LIGHT=LIGHT, DARK=DARK)
    return environment.get_template("report.html.jinja").render(report=report)


def number(value: float) -> str:
    """A number with as many digits as a reader needs."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.3g}"


def percent(value: float, digits: int = 1) -> str:
    """A fraction in percent."""
    return f"{value:.{digits}%}"


def _short(value: object) -> object:
    """Coordinates rounded to hundredths: more digits would only make the page larger."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
