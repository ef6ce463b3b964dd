"""The user's own calibration text: plain text, or JSON lines of prompts and responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from dash_onnx.core.errors import SourceError
from dash_onnx.core.text import Message, json_lines, read_text

Render: TypeAlias = Callable[[Sequence[Message]], str]
"""A whole conversation as text."""

_ASKED = ("prompt", "instruction", "question", "input")
_ANSWERED = ("response", "output", "answer", "completion")


def calibration_text(files: Sequence[Path], render: Render) -> str:
    """Joins calibration files.

    Args:
        files: UTF-8 text, or `.jsonl` whose lines hold `text`, `messages`, or a prompt and a
            response.
        render: turns a conversation into text.

    Raises:
        SourceError: a file is missing, empty, not text, or a line is not of this form.
    """
    parts = []
    for path in files:
        if path.suffix == ".jsonl":
            parts += [_record(record, where, render) for where, record in json_lines(path)]
        else:
            parts.append(read_text(path))
    return "\n\n".join(parts)


def _record(record: Any, where: str, render: Render) -> str:
    if not isinstance(record, dict):
        raise SourceError(f"{where} is not a JSON object")
    if isinstance(record.get("text"), str):
        return _encodable(record["text"], where)
    messages = record.get("messages")
    if not isinstance(messages, list):
        asked = next((record[key] for key in _ASKED if record.get(key)), None)
        answered = next((record[key] for key in _ANSWERED if record.get(key)), None)
        if not isinstance(asked, str) or not isinstance(answered, str):
            raise SourceError(
                f"{where} needs `text`, `messages`, or a prompt and a response "
                f"({'/'.join(_ASKED)} and {'/'.join(_ANSWERED)})"
            )
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    if not messages or not all(
        isinstance(message, dict) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise SourceError(f"{where}: every message needs a role and a text as content")
    try:
        return _encodable(render(messages), where)
    except SourceError:
        raise
    except Exception as error:  # the template is the model's code: it may raise anything
        raise SourceError(f"{where}: the chat template refuses it: {error}") from None


def _encodable(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SourceError(f"{where} is not valid Unicode") from None
    return text


def plain(messages: Sequence[Message]) -> str:
    """A conversation for models without a chat template."""
    return "\n".join(str(message.get("content", "")) for message in messages)
