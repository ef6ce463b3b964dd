"""Chat templates: code that comes with a model, run in jinja2's sandbox within limits.

The sandbox keeps a template from what it must not touch. The limits keep it from running forever,
and from exhausting memory: jinja2 itself bounds only the length of a range.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_SOURCE = 100_000  # characters of a template, which take a second to compile
_MAX_SECONDS = 2.0  # of the thread's own time
_MAX_CHARACTERS = 10**7  # that one operation may produce, and of the result
_MAX_BITS = 100_000  # of an integer
_MAX_IN_ALL = 10**8  # that all operations together may produce
_ITEM = 8  # bytes of a list's item; a character is one or more
_NESTED = 50  # charged per nested item: for the time to measure a list, or the memory of an object
_NUMBER = re.compile(r"\d+")  # of a format: a width, perhaps

# Filters that keep references to what is in a list; all others may write it out.
_REFERRING = frozenset(
    "abs attr batch count d default dictsort first float groupby int items last length list map "
    "max min random reject rejectattr reverse round select selectattr slice sort unique".split()
)
_OF_JINJA = frozenset(("_loop_vars", "_block_vars"))  # that every call inside a loop gets
_PIECES = frozenset("batch list slice sort unique split rsplit splitlines".split())  # of a text
_MAKING = frozenset(
    "capitalize casefold center decode encode expandtabs hex join ljust lower lstrip removeprefix "
    "removesuffix replace rjust rsplit rstrip split splitlines strip swapcase title translate "
    "upper zfill format format_map".split()
)


def render(source: str, values: Mapping[str, Any]) -> str:
    """The text that a template produces.

    Args:
        source: source of the template.
        values: values of its variables.

    Raises:
        Exception: whatever the template, which is code, raises; `TemplateError` beyond the limits.
    """
    length, parts = 0, []
    with _limits():
        for part in _compiled(source).generate(values):
            length += len(part)
            _refuse_above(length)
            parts.append(part)
    return "".join(parts)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    if len(source) > _MAX_SOURCE:
        raise TemplateError(f"it has more than {_MAX_SOURCE} characters")
    environment = _Environment()
    return environment.from_string(_Counted().visit(environment.parse(source)))


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox with the functions that templates written for transformers expect."""

    intercepted_binops = frozenset("+ * ** %".split())

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=_written,
        )
        self.filters["tojson"] = _to_json
        self.filters = {n: _limited(n, function) for n, function in self.filters.items()}
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        del self.globals["lipsum"]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measures what `a * b` and the like would produce before they do."""
        if operator == "+":
            _refuse_above(_size(left) + _size(right))
            _spend(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            _spend(_formatted(left, (right,)))
        elif isinstance(left, int) and isinstance(right, int):
            bits = abs(left).bit_length()
            digits = bits * abs(right) if operator == "**" else bits + abs(right).bit_length()
            if digits > _MAX_BITS:
                raise TemplateError(f"it computes a number of more than {_MAX_BITS} bits")
        elif operator == "*":
            _spend(_product((left, right)))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Measures `"a".replace(b, c)` and other methods of texts, as `call_binop` does."""
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        name = getattr(method, "__name__", "")
        given = (*args, *(kwargs[key] for key in kwargs if key not in _OF_JINJA))
        if isinstance(owner, (str, bytes)) and name in _MAKING:
            _spend(_made(name, owner, given))
        elif isinstance(owner, (list, tuple, dict)):
            _bound(owner, *given)
            _spend(_length(owner))
        return super().call(context, function, *args, **kwargs)

    @staticmethod
    def made(value: Any = "") -> Any:
        """Measures what jinja2 has made without a call."""
        _spend(_length(value))
        return value

    @staticmethod
    def read(value: Any) -> Any:
        """Measures what jinja2 compares, or looks up, without a call."""
        _bound(value)
        _check_time()
        return value

    @staticmethod
    def joined(*parts: Any) -> str:
        """Measures what `a ~ b` would make before it is made."""
        _spend(sum(map(_size, parts)))
        return str_join(parts)


class _Counted(NodeTransformer):
    """Lets a template call the environment wherever it computes without a call."""

    def visit_For(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        """In every iteration of a loop, and where a macro begins."""
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("made")))
        return node

    visit_Macro = visit_For

    def visit_Compare(self, node: nodes.Compare | nodes.Operand) -> nodes.Node:
        """On both sides of each comparison."""
        self.generic_visit(node)
        node.expr = _call("read", node.expr)
        return node

    visit_Operand = visit_Compare

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        """Before each test."""
        self.generic_visit(node)
        node.node = _call("read", node.node)
        node.args = [_call("read", arg) for arg in node.args]
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        """Before a key is hashed."""
        self.generic_visit(node)
        node.key = _call("read", node.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Before an item is looked up; and after each slice, which is a copy."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _call("made", node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _call("read", node.arg)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`joined` in place of jinja2's own function."""
        self.generic_visit(node)
        return _call("joined", *node.nodes)


def _call(name: str, *args: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), [*args], [], None, None)


class _Generation(Extension):
    """`{% generation %}` marks the answer for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, with the parameters and defaults that it has in transformers."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


class _Spent(threading.local):
    """What this thread's rendering has used up; outside a rendering there is no deadline."""

    characters = 0.0
    deadline = math.inf


_SPENT = _Spent()


@contextmanager
def _limits() -> Iterator[None]:
    """Counts from zero inside the context."""
    _SPENT.characters, _SPENT.deadline = 0.0, time.thread_time() + _MAX_SECONDS
    try:
        yield
    finally:
        _SPENT.deadline = math.inf


def _check_time() -> None:
    if time.thread_time() > _SPENT.deadline:
        raise TemplateError(f"it did not end after {_MAX_SECONDS:.0f} seconds")


def _spend(characters: float) -> None:
    """Counts characters before an operation produces them."""
    _refuse_above(characters)
    _SPENT.characters += characters
    if _SPENT.characters > _MAX_IN_ALL:
        raise TemplateError(f"it produces more than {_MAX_IN_ALL} characters in total")
    _check_time()


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that measures what it would produce."""

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        # The first may be an environment or a context, of length 1.
        given = (*args, *kwargs.values())
        owner = next((i for i, x in enumerate(given) if not isinstance(x, _JINJA)), 0)
        _spend(_made(name, given[owner], given[owner + 1 :]))
        return function(*args, **kwargs)

    return limited


_JINJA = (ImmutableSandboxedEnvironment, Context, nodes.EvalContext)


def _made(name: str, owner: Any, args: tuple[Any, ...]) -> float:
    """The most characters that a filter or a method makes from its first value and the others."""
    if name in ("length", "count"):  # reads no item: templates ask for it in each turn of a loop
        return 1
    if name in ("format", "format_map"):
        return _formatted(str(owner), args)
    if name == "replace" and len(args) >= 2 and isinstance(args[0], str):
        times = _size(owner) / max(len(args[0]), 1) + 1
        return _size(owner) + times * _size(args[1])
    if name in ("d", "default", "trim", "truncate"):
        return _length(owner) + sum(map(_length, args))
    if name in _REFERRING:
        _bound(owner, *args)
        weight = _ITEM if name in _PIECES and isinstance(owner, str) else 1
        return weight * _product((owner, *args), _length)
    if name in _PIECES:
        separator = args[0] if args and isinstance(args[0], type(owner)) else owner[:1]
        return len(owner) * (1 + _ITEM / max(len(separator), 1))
    return _product((owner, *args))


def _formatted(text: str, args: tuple[Any, ...]) -> float:
    """The same for a format: its text, the widths in it, and each value in each of its fields."""
    widths = sum(float(number[:300]) for number in _NUMBER.findall(text))
    fields = 1 + text.count("{") + text.count("%")
    flat = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]
    return len(text) + widths + fields * _product(tuple(flat))


def _written(value: Any) -> Any:
    """What `{{ value }}` writes."""
    _spend(_size(value))
    return value


def _product(values: tuple[Any, ...], size: Callable[[Any], float] | None = None) -> float:
    """A bound for what may become as large as the product of its inputs."""
    sizes = (abs(v) if isinstance(v, int) else (size or _size)(v) for v in values)
    return math.prod(max(one, 1) for one in sizes)


def _length(value: Any) -> int:
    """Characters of a text, or what the references in a list take."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return _ITEM * len(value) if isinstance(value, (list, tuple, dict, set, range)) else 1


def _size(value: Any) -> float:
    """The length with all that is in a list: nested lists may be few, but long when written."""
    total = float(_length(value))
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple, set)):
        for item in value:
            total += _size(item) if isinstance(item, str) else _NESTED + _size(item)
            _refuse_above(total)
    return total


def _bound(*values: Any) -> None:
    """Refuses what would take too long to compare or to hash: lists in lists may be shared."""
    for value in values:
        _refuse_above(_size(value))


def _refuse_above(count: float) -> None:
    if count > _MAX_CHARACTERS:
        raise TemplateError(f"it produces more than {_MAX_CHARACTERS} characters")
