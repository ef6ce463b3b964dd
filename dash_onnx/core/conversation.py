"""Conversations: messages, their form, and their text by a model's chat template."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from dash_onnx.core.errors import PolicyError

Message: TypeAlias = Mapping[str, Any]
"""A chat message: at least `role` and `content`."""

_ASKED = "What is the capital of France?"  # whether a template shows it
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's thoughts
_MARK = "\ue000begun\ue001"  # where the text of a begun answer ends


def rendered(
    template: str,
    messages: Sequence[Message],
    values: Mapping[str, Any],
    special: Mapping[str, str],
) -> str:
    """The text of a conversation by a chat template.

    If an answer is wanted and the last message is the assistant's, the text ends inside it.

    Args:
        template: its source.
        messages: in order.
        values: other variables.
        special: the model's special tokens by their names, such as `bos_token`.

    Raises:
        PolicyError: the messages are not valid, or the template refuses them.
    """
    messages = checked_messages(messages)
    from dash_onnx.core.template import render  # jinja2 takes a while to import

    model = template, tuple(special.items())
    if messages[0]["role"] == "system" and not _takes_system(*model):
        messages = _without_system(messages)
    begun = begun_answer(messages) if values.get("add_generation_prompt") else ""
    if begun:
        values = {**values, "add_generation_prompt": False}
        messages = [*messages[:-1], {**messages[-1], "content": begun + _MARK}]
    if _takes_parts(*model):
        messages = [{**one, "content": _parts(one.get("content") or "")} for one in messages]
    usual = {"tools": None, "documents": None, "add_generation_prompt": False}
    try:
        text = render(template, {**usual, **values, **special, "messages": messages})
    except Exception as error:  # the template is the model's code: it may raise anything
        raise PolicyError(f"the chat template refuses these messages: {error}") from None
    if begun and _MARK not in text:
        raise PolicyError("the chat template changes the begun answer, so it cannot be continued")
    return text.rpartition(_MARK)[0] if begun else text


def begun_answer(messages: Sequence[Message]) -> str:
    """The text of a last message from the assistant, which is to be continued; empty if none is."""
    last = messages[-1]
    begun = last["role"] == "assistant" and not last.get("tool_calls")
    return (last.get("content") or "") if begun else ""


@functools.lru_cache
def _takes_parts(template: str, special: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template leaves out text that is not in a list of parts, as for images."""
    asked, parts = ({"role": "user", "content": one} for one in (_ASKED, _parts(_ASKED)))
    return not _shows(template, special, asked) and _shows(template, special, parts)


@functools.lru_cache
def _takes_system(template: str, special: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template takes system messages; Gemma 2's refuses them, others leave them out."""
    told, asked = {"role": "system", "content": _ASKED}, {"role": "user", "content": "."}
    alone = {**asked, "content": _ASKED}
    return _shows(template, special, told, asked) or not _shows(template, special, alone)


def _shows(template: str, special: tuple[tuple[str, str], ...], *messages: Message) -> bool:
    from dash_onnx.core.template import render

    try:
        return _ASKED in render(template, {"tools": None, "messages": [*messages], **dict(special)})
    except Exception:  # see `rendered`
        return False


def _without_system(messages: list[Message]) -> list[Message]:
    """Messages whose first ones, from the system, are part of the user's first."""
    count = next((n for n, one in enumerate(messages) if one["role"] != "system"), len(messages))
    told, rest = [one.get("content") or "" for one in messages[:count]], messages[count:]
    for number, message in enumerate(rest):
        if message["role"] == "user":
            content = "\n\n".join(filter(None, [*told, message.get("content")]))
            rest[number] = {**message, "content": content}
            return rest
    return messages


def _parts(text: str) -> list[dict[str, str]]:
    """The content of a message as a list of parts."""
    return [{"type": "text", "text": text}]


def checked_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages with their content as text; a list of parts, as in OpenAI's API, is joined.

    Thoughts get the names by which templates know them.

    Raises:
        PolicyError: there are none, one has another form, a part is not text, or the last one is an
            empty user message and no other has text.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise PolicyError(f"messages must be a list, not {type(messages).__name__}")
    if not messages:
        raise PolicyError("there is no message to answer")
    checked: list[Message] = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PolicyError("a message must be a dict with `role` and `content`, both text")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) < len(parts):
                raise PolicyError("a part of a message is not text, and this model reads only text")
            message = {**message, "content": "".join(texts)}
        elif content is not None and not isinstance(content, str):
            raise PolicyError(f"the content of a message is {type(content).__name__}, not text")
        thoughts = next((message[key] for key in _REASONING if message.get(key)), None)
        if isinstance(thoughts, str):  # as in transformers: templates read the first or the second
            message = {**message, "thinking": thoughts, "reasoning_content": thoughts}
        checked.append(message)
    if checked[-1]["role"] == "user" and not any(
        (message.get("content") or "").strip() for message in checked
    ):
        raise PolicyError("the last message is empty")
    return checked
