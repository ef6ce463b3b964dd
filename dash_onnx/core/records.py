"""Frozen dataclasses to JSON and back, strictly: an unknown, missing or mistyped key is refused."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_LARGEST = 2**63  # no number reaches it
_SHOWN = 80  # characters of a key


class RecordError(ValueError):
    """The JSON does not have the form of the record; the message names the key."""


def from_json(cls: type[T], data: Any, where: str = "") -> T:
    """Builds a dataclass from parsed JSON.

    Args:
        cls: the dataclass; its fields may be scalars, `None` unions, `Literal`s, homogeneous
            tuples, string-keyed dicts and further dataclasses.
        data: the parsed JSON object.
        where: the path of `data` inside the document, for messages.

    Raises:
        RecordError: a key is unknown, missing, or holds the wrong type.
    """
    if not isinstance(data, dict):
        raise RecordError(f"{where or 'document'} must be an object")
    fields = _fields(cls)  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise RecordError(f"unknown key {_join(where, key)!r}")
    values = {}
    for name, (field, hint) in fields.items():
        if name in data:
            values[name] = _value(hint, data[name], _join(where, name))
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise RecordError(f"missing key {_join(where, name)!r}")
    return cls(**values)


@functools.cache
def _fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(cls)
    fields = dataclasses.fields(cls)
    return {field.name: (field, hints[field.name]) for field in fields}


def _join(where: str, key: str) -> str:
    """A path that a message can show: keys of a document may be of any length."""
    key = key if len(key) <= _SHOWN else key[:_SHOWN] + "…"
    return f"{where}.{key}" if where else key


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), data, where)
    if origin is Literal:
        if data not in args:
            raise RecordError(f"{where!r} must be one of {', '.join(map(str, args))}")
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise RecordError(f"{where!r} must be a list")
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise RecordError(f"{where!r} must be an object")
        for key in data:
            _value(args[0], key, _join(where, key))
        return {key: _value(args[1], item, _join(where, key)) for key, item in data.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(hint, data, where)  # type: ignore[arg-type]
    number = hint in (int, float) and type(data) in (int, float)
    if number and not (-_LARGEST < data < _LARGEST):  # nor NaN
        raise RecordError(f"{where!r} is too large, or not a number")
    if hint is float and type(data) is int:
        return float(data)
    if type(data) is not hint:
        raise RecordError(f"{where!r} must be {hint.__name__}, not {type(data).__name__}")
    return data
