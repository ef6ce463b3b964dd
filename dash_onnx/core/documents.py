"""Text files, and records of JSON lines or of a dataset, as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from dash_onnx.core.conversation import Message
from dash_onnx.core.errors import PolicyError, SourceError
from dash_onnx.core.text import TextCodec, json_lines, read_text

Render: TypeAlias = Callable[[Sequence[Message]], str]
"""A whole conversation as text."""

ASKED = ("prompt", "instruction", "question", "input")
ANSWERED = ("response", "output", "answer", "completion")


def read_document(path: Path, codec: TextCodec) -> str:
    """The text of a file; for one with the suffix `.jsonl`, that of its records, one after another.

    Args:
        path: the file.
        codec: whose chat template turns conversations into text.

    Raises:
        SourceError: missing, empty, not text, or a record is not of `record_text`'s form.
    """
    return "\n".join(file_texts(path, renderer(codec)))


def file_texts(path: Path, render: Render) -> Iterator[str]:
    """The text of a file, or the texts of its records.

    Raises:
        SourceError: see `read_document`.
    """
    if path.suffix != ".jsonl":
        yield read_text(path)
        return
    for where, record in json_lines(path):
        yield record_text(record, where, render)


def renderer(codec: TextCodec) -> Render:
    """What turns conversations into text: a model's chat template, if it has one."""
    if codec.chat_template is None:
        return plain
    return lambda messages: codec.render_chat(messages, answer_next=False)


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
    except PolicyError as error:
        raise SourceError(f"{where}: {error}") from None


def _encodable(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SourceError(f"{where} is not valid Unicode") from None
    return text


def plain(messages: Sequence[Message]) -> str:
    """A conversation for models without a chat template."""
    return "\n".join(str(message.get("content", "")) for message in messages)
