"""The keys of `dash.json` as tables, from the dataclasses that read and write it."""

from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from dash_onnx.core.actions import ACTIONS
from dash_onnx.core.manifest import Manifest

_MARK = re.compile("^<!-- keys of dash.json -->$", re.M)
_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the tables where a page asks for them."""
    return _MARK.sub(lambda _: "\n".join(tables(Manifest)), markdown)


def tables(record: type, path: str = "") -> list[str]:
    """The table of a dataclass, then those of the dataclasses inside it.

    Raises:
        PluginError: a docstring says nothing of a key.
    """
    meanings, inside = _meanings(record), []
    lines = [f"## `{path or 'dash.json'}` {{#{_anchor(path)}}}", "", _first_line(record), ""]
    lines += ["| key | type | |", "|---|---|---|"]
    for key, hint in get_type_hints(record).items():
        if key not in meanings:
            raise PluginError(f"{record.__name__} does not say what {key} means")
        where = f"{path}.{key}" if path else key
        text, nested = _kind(hint, where)
        inside += nested
        lines.append(f"| `{key}` | {text} | {meanings[key]} |")
    return [*lines, ""] + [line for part in inside for line in tables(*part)]


def _kind(hint: Any, path: str) -> tuple[str, list[tuple[type, str]]]:
    """A type as JSON has it, and the dataclasses in it with their paths."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        same = set(args) == set(ACTIONS)
        return ("action" if same else " or ".join(f'`"{value}"`' for value in args)), []
    if get_origin(hint) is tuple:
        text, nested = _kind(args[0], f"{path}[]")
        return f"list of {text}", nested
    if get_origin(hint) is dict:
        (by, _), (text, nested) = _kind(args[0], path), _kind(args[1], f"{path}{{}}")
        return f"object: {text} by {'name' if by == 'string' else by}", nested
    if is_dataclass(hint):
        return f"[object](#{_anchor(path)})", [(hint, path)]
    if args:  # a union
        parts = [_kind(arg, path) for arg in args]
        return " or ".join(text for text, _ in parts), [one for _, more in parts for one in more]
    return _SCALARS[hint], []


def _anchor(path: str) -> str:
    return "-".join(re.findall(r"\w+", path)) or "keys"


def _first_line(record: type) -> str:
    return (inspect.getdoc(record) or "").splitlines()[0]


def _meanings(record: type) -> dict[str, str]:
    """The `Attributes:` of a docstring."""
    text = (inspect.getdoc(record) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", text, re.M)
    return {key: " ".join(meaning.split()).replace("None", "null") for key, meaning in found}
