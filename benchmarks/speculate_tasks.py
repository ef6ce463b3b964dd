"""The built-in prompts of speculate.py."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

from dash_onnx.bench.prompts import PROMPTS
from dash_onnx.runtime import grammar

_FIELDS = "name surname street town country birthday profession language hobby".split()
_SCHEMA = {
    "type": "object",
    "properties": {
        **{name: {"type": "string", "maxLength": 20} for name in _FIELDS},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": [*_FIELDS, "age"],
    "additionalProperties": False,
}
_PEOPLE = ("a sailor from Norway", "a baker in Lyon", "a teacher", "a retired pilot", "a painter")
_SOURCE = "\n".join(Path(grammar.__file__).read_text("utf-8").splitlines()[:60])
_THINGS = "parcel letter crate barrel van ship harbor station driver ticket invoice pallet".split()
_AMOUNTS = "weight height length width volume depth price margin".split()


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt.

    Attributes:
        prompt: user message of a chat.
        expected: text that an app can send along: the file before the edit.
        schema: JSON schema of the answer.
    """

    prompt: str
    expected: str = ""
    schema: dict[str, Any] | None = None


def tasks(count: int) -> dict[str, list[Task]]:
    """Tasks by kind, up to a given number each."""
    return {
        "questions": [Task(prompt) for prompt in PROMPTS[:count]],
        "editing": _renamed(count),
        "edit of 150 lines": _changed(count),
        "JSON": [Task(f"Invent {who}, as JSON.", schema=_SCHEMA) for who in _PEOPLE[:count]],
    }


def _renamed(count: int) -> list[Task]:
    """Renames a name everywhere in a file of 60 lines."""
    names = [*dict.fromkeys(re.findall(r"\b[A-Za-z_]{6,}\b", _SOURCE))]
    names = names[:: max(len(names) // count, 1)][:count]
    return [_edit(f"Rename `{name}` to `new_{name}` in this file", _SOURCE) for name in names]


def _changed(count: int) -> list[Task]:
    """Changes one line in a file of 150 lines."""
    text = long_source()
    lines = re.findall(r"class (\w+):\n.*\n\n    (\w+): float = ([\d.]+)", text)
    ask = "Change the default of `{}` in the class `{}` from {} to {} in this file"
    return [
        _edit(ask.format(field, name, old, float(old) + 1), text)
        for name, field, old in lines[:: max(len(lines) // count, 1)][:count]
    ]


def _edit(what: str, source: str) -> Task:
    return Task(f"{what}, and print all of it:\n\n```python\n{source}\n```", expected=source)


def long_source() -> str:
    """A file of 150 lines: similar classes with different names and numbers."""
    rng = random.Random(0)
    lines = ['"""What a forwarder knows of its trade."""', "", "from __future__ import annotations"]
    lines += ["", "import math", "from dataclasses import dataclass"]
    for thing in _THINGS:
        first, second = rng.sample(_AMOUNTS, 2)
        lines += f'''

@dataclass
class {thing.title()}:
    """What is known of a {thing}."""

    {first}: float = {rng.randrange(2, 400) / 4}
    {second}: float = {rng.randrange(2, 400) / 4}

    def {first}_of(self, count: int) -> int:
        """Of so many, with what holds them."""
        return math.ceil(self.{first} * count * {1 + rng.randrange(1, 99) / 100})
'''.splitlines()
    return "\n".join(lines)
