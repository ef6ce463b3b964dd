"""JSON schemas, as a grammar can hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_DATA = ("const", "default", "enum", "examples")  # their values are no schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
_BESIDE = ("$ref", "anyOf", "oneOf", "if", "dependentSchemas")
_MORE = ("additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties")


def closed(schema: Any, holds: Callable[[str], bool]) -> Any:
    """A schema whose objects have the properties that it lists, and no others.

    JSON Schema allows others by default, and small models then invent some. As in llama.cpp, they
    must be allowed explicitly; or be required. A schema that combines several for one object, as
    with `allOf`, stays as it is: what one of them does not list, another may.

    Args:
        schema: the schema.
        holds: whether a grammar can hold a regular expression; a `pattern` that it cannot hold, as
            one with a look-ahead, is left out.
    """
    return _rewritten(schema, holds, close=not _combines(schema))


def _parts(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are schemas, or hold some."""
    return {key: value for key, value in schema.items() if key not in _DATA}


def _combines(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_combines, schema))
    if not isinstance(schema, Mapping):
        return False
    listed, all_of = isinstance(schema.get("properties"), Mapping), schema.get("allOf", ())
    if listed and any(key in schema for key in ("allOf", *_BESIDE)):
        return True
    if isinstance(all_of, list) and len(all_of) > 1:
        return True
    return any(
        any(map(_combines, value.values()))
        if key in _NAMED and isinstance(value, Mapping)
        else _combines(value)
        for key, value in _parts(schema).items()
    )


def _rewritten(schema: Any, holds: Callable[[str], bool], close: bool) -> Any:
    if isinstance(schema, list):
        return [_rewritten(one, holds, close) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key, value in _parts(schema).items():
        if key in _NAMED and isinstance(value, Mapping):
            found[key] = {name: _rewritten(one, holds, close) for name, one in value.items()}
        elif key == "pattern" and isinstance(value, str) and not holds(value):
            del found[key]
        else:
            found[key] = _rewritten(value, holds, close)
    listed, required = schema.get("properties"), schema.get("required", ())
    if (
        close
        and isinstance(listed, Mapping)
        and not any(key in schema for key in _MORE)
        and all(name in listed for name in required if isinstance(name, str))
    ):
        found["additionalProperties"] = False
    return found
