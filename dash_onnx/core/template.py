"""Chat templates: code that comes with a model, run in jinja2's sandbox within limits.

The sandbox keeps a template from what it must not touch. The limits keep it from running for ever,
and from filling the memory: jinja2 itself bounds only the length of a range.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MOST_STEPS = 1_000_000  # lines of the compiled template, which take a second or two
_MOST_CHARACTERS = 100_000_000  # that one operation may make, and of the result
_LONG_NUMBER = re.compile(r"\d{7}")  # of a format: a width


def render(source: str, values: Mapping[str, Any]) -> str:
    """The text that a template makes.

    Args:
        source: of the template.
        values: of its variables.

    Raises:
        Exception: whatever the template raises, which is code; `TemplateError` beyond the limits.
    """
    template = _compiled(source)
    length, parts = 0, []
    with _step_limit():
        for part in template.generate(values):
            length += len(part)
            _refuse_above(length)
            parts.append(part)
    return "".join(parts)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    template = _Environment().from_string(source)
    # `a ~ b` compiles to a call of this one.
    template.root_render_func.__globals__["str_join"] = _joined
    return template


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox with the functions that templates written for transformers expect."""

    intercepted_binops = frozenset("+ * ** %".split())

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
        self.filters = {name: _limited(function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        del self.globals["lipsum"]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measures what `a * b` and the like would make before they make it."""
        if operator == "+":
            _refuse_above(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            _check((left, *(right if isinstance(right, tuple) else (right,))))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _refuse_above(abs(left).bit_length() * right)
        elif operator == "*" and not (isinstance(left, int) and isinstance(right, int)):
            _check((left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Likewise `"a".replace(b, c)` and other methods of texts."""
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            if method.__name__.startswith("format"):
                _check_format(owner)
            _check((owner, *args, *kwargs.values()))
        return super().call(context, function, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}` marks the answer for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)


@contextmanager
def _step_limit() -> Iterator[None]:
    """Ends a template that runs too long; a trace function is its thread's alone."""
    steps = 0

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > _MOST_STEPS:
            raise TemplateError(f"it did not end after {_MOST_STEPS} steps")
        return step

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return step if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that measures what it would make."""

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        if function.__name__ == "do_format":
            _check_format(str(args[0]))
        _check((*args, *kwargs.values()))
        return function(*args, **kwargs)

    return limited


def _joined(parts: Iterable[Any]) -> str:
    parts = [*parts]
    _refuse_above(sum(map(_size, parts)))
    return str_join(parts)


def _check(values: tuple[Any, ...]) -> None:
    """Refuses what could become as large as the product of what it is made from."""
    _refuse_above(math.prod(max(abs(v) if isinstance(v, int) else _size(v), 1) for v in values))


def _check_format(text: str) -> None:
    if _LONG_NUMBER.search(text):
        _refuse_above(_MOST_CHARACTERS + 1)


def _size(value: Any) -> int:
    """Characters of a text, or of the texts in a list."""
    if isinstance(value, (list, tuple)):
        return sum(len(item) if isinstance(item, str) else 1 for item in value)
    return len(value) if isinstance(value, str) else 1


def _refuse_above(count: float) -> None:
    if count > _MOST_CHARACTERS:
        raise TemplateError(f"it makes more than {_MOST_CHARACTERS} characters")
