"""JSON schemas, as a grammar can hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_DATA = ("const", "default", "enum", "examples")  # their values are no schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
_OTHERS = ("$ref", "anyOf", "oneOf", "if", "dependentSchemas")  # schemas of the same object
_OWN = ("properties", "required", "patternProperties")
_OPEN = ("additionalProperties", "unevaluatedProperties")
_MORE = ("additionalProperties", "patternProperties", "minProperties")


def closed(schema: Any, holds: Callable[[str], bool]) -> Any:
    """A schema whose objects have the properties that it lists, and no others.

    JSON Schema allows others by default, and small models then invent some. As in llama.cpp, they
    must be allowed explicitly; or be required. A schema that combines several for one object, as
    with `allOf`, stays as it is: what one of them does not list, another may.

    Args:
        schema: the schema.
        holds: whether a grammar can hold a regular expression; a pattern that it cannot hold, as
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
    all_of = schema.get("allOf", [])
    own = any(key in schema for key in _OWN) or any(schema.get(key, False) for key in _OPEN)
    several = own + sum(key in schema for key in _OTHERS)
    if several + (len(all_of) if isinstance(all_of, list) else 1) > 1:
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
    found, dropped = dict(schema), False
    for key, value in _parts(schema).items():
        if key in _NAMED and isinstance(value, Mapping):
            kept = [name for name in value if key != "patternProperties" or holds(name)]
            found[key] = {name: _rewritten(value[name], holds, close) for name in kept}
            dropped |= len(kept) < len(value)
        elif key == "pattern" and isinstance(value, str) and not holds(value):
            del found[key]
        else:
            found[key] = _rewritten(value, holds, close)
    if dropped:  # what a left-out pattern allows must not fall under this
        found.pop("additionalProperties", None)
    listed, required = schema.get("properties"), schema.get("required", ())
    if (
        close
        and isinstance(listed, Mapping)
        and not any(key in schema for key in _MORE)
        and schema.get("unevaluatedProperties", False) is False
        and all(name in listed for name in required if isinstance(name, str))
    ):
        found["additionalProperties"] = False
    return found
