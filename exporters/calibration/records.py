"""A record of JSON lines or of a dataset, as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from dash_onnx.core.errors import SourceError
from dash_onnx.core.text import Message

Render: TypeAlias = Callable[[Sequence[Message]], str]
"""A whole conversation as text."""

ASKED = ("prompt", "instruction", "question", "input")
ANSWERED = ("response", "output", "answer", "completion")


def record_text(record: Any, where: str, render: Render) -> str:
    """The text of a record.

    Args:
        record: holds `text`, `messages`, or one of `ASKED` and one of `ANSWERED`.
        where: names it in messages.
        render: turns a conversation into text.

    Raises:
        SourceError: it is not of this form, or the chat template refuses it.
    """
    if not isinstance(record, dict):
        raise SourceError(f"{where} is not a JSON object")
    if isinstance(record.get("text"), str):
        return _encodable(record["text"], where)
    messages = record.get("messages")
    if not isinstance(messages, list):
        asked = next((record[key] for key in ASKED if record.get(key)), None)
        answered = next((record[key] for key in ANSWERED if record.get(key)), None)
        if not isinstance(asked, str) or not isinstance(answered, str):
            raise SourceError(
                f"{where} needs `text`, `messages`, or a prompt and a response "
                f"({'/'.join(ASKED)} and {'/'.join(ANSWERED)})"
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
