"""The chat page: one file that loads nothing else and runs only its own scripts."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

from dash_onnx.core.colors import DARK, LIGHT, css


@functools.cache
def page() -> tuple[str, dict[str, str]]:
    """The page, and headers that block any scripts in a model's answer."""
    folder = files("dash_onnx.serve")
    html, style, *scripts = (
        folder.joinpath(name).read_text("utf-8")
        for name in ("page.html", "page.css", "markdown.js", "page.js")
    )
    style = style.replace("/* light */", css(LIGHT)).replace("/* dark */", css(DARK))
    script = "".join(scripts)
    html = html.replace("<style></style>", f"<style>{style}</style>")
    html = html.replace("<script></script>", f"<script>{script}</script>")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = (
        *("default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"),
        *("style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'", "form-action 'none'"),
    )
    return html, {"Content-Security-Policy": "; ".join(rules)}
