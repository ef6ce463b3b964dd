"""The user's own calibration text: plain files, or JSON lines of prompts and responses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import SourceError
from dash_onnx.core.text import Message, TextCodec
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.calibration.records import plain
from dash_onnx.exporters.calibration.texts import TextLike, text_sources
from dash_onnx.exporters.calibration.tokens import calibration_ids
from dash_onnx.exporters.sources import Source, open_source

CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the keeper"}]


def render(messages: Sequence[Message]) -> str:
    return "|".join(f"{message['role']}:{message['content']}" for message in messages)


def joined(*given: TextLike) -> str:
    """All that sources hold."""
    parts = [source.content.excerpt(render, 1_000_000) for source in text_sources(given)]
    return "\n\n".join(part.text for part in parts)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as JSON lines, or a string as it is."""

    def run(name: str, *records: object) -> Path:
        path = tmp_path / name
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return path

    return run


def refusal(files: Sequence[Path]) -> str:
    with pytest.raises(SourceError) as caught:
        joined(*files)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# What is read


def test_files_of_both_kinds_are_joined_in_their_order(write: Callable[..., Path]) -> None:
    text = write("a.md", "  one\n\ntwo {not json}")
    lines = write("b.jsonl", {"text": "second"}, "", "  \t", {"text": "third"})
    assert joined(text, lines) == "  one\n\ntwo {not json}\n\n\nsecond\n\nthird"
    assert joined(lines, text) == "second\n\nthird\n\n  one\n\ntwo {not json}\n"


PAIR = {"prompt": "p", "response": "r"}
ASKED = ("prompt", "instruction", "question", "input")
ANSWERED = ("response", "output", "answer", "completion")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"messages": CHAT, "id": 7}, "user:who?|assistant:the keeper"),
        *(({a: "p", b: "r"}, "user:p|assistant:r") for a in ASKED for b in ANSWERED),
        ({"instruction": "count", "input": "", "output": "1 2"}, "user:count|assistant:1 2"),
        ({"text": "t", "messages": CHAT, **PAIR}, "t"),
        ({"messages": CHAT, **PAIR}, "user:who?|assistant:the keeper"),
        *(({"text": f"one{line}two"}, f"one{line}two") for line in "\u2028\u2029\u0085"),
    ],
)
def test_a_record_is_a_text_or_a_conversation(
    record: dict[str, Any], text: str, write: Callable[..., Path]
) -> None:
    """Under the usual names; separators of Unicode inside a text do not end it."""
    assert joined(write("a.jsonl", record)) == text


def test_records_may_end_as_windows_ends_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert joined(tmp_path / "a.jsonl") == "a\n\nb"


def test_a_conversation_without_a_template_is_its_contents() -> None:
    assert plain([*CHAT, {"role": "user"}]) == "who?\nthe keeper\n"


# What is refused


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"", "is empty"), (b" \n\n", "is empty"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_a_file_that_holds_no_text_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    found = refusal([path])
    assert str(path) in found and message in found


def test_the_file_at_fault_is_named_among_several(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    assert str(tmp_path / "none.txt") in refusal([write("a.txt", "text"), tmp_path / "none.txt"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ('{"text": "a"} x', "is not JSON"),
        ("text", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a JSON object"),
        ('"text"', "is not a JSON object"),
        ("3", "is not a JSON object"),
        ("null", "is not a JSON object"),
        ("{}", "needs `text`, `messages`, or a prompt and a response"),
        ('{"text": 3}', "needs `text`"),
        ('{"messages": "hello"}', "needs `text`"),
        ('{"prompt": "who?"}', "needs `text`"),
        ('{"response": "the keeper"}', "needs `text`"),
        ('{"prompt": "", "response": "r"}', "needs `text`"),
        ('{"prompt": ["p"], "response": "r"}', "needs `text`"),
        ('{"prompt": "p", "response": {"r": 1}}', "needs `text`"),
    ],
)
def test_a_line_of_another_form_is_named_by_its_number(
    write: Callable[..., Path], line: str, message: str
) -> None:
    path = write("a.jsonl", {"text": "fine"}, "", line)
    found = refusal([path])
    assert found.startswith(f"{path}:3 ") and message in found


# Records in the pipelines: the template is the model's own


@pytest.fixture(scope="module")
def source(tiny_folder: Path) -> Source:
    return open_source(str(tiny_folder), REGISTRY)


@pytest.mark.parametrize(
    "messages", [["hello"], [3], [{}], [{"role": "user"}], [{"content": None}]], ids=str
)
def test_messages_that_are_no_messages_are_refused_in_one_line(
    write: Callable[..., Path], messages: list[Any]
) -> None:
    path = write("a.jsonl", {"messages": messages})
    with pytest.raises(SourceError, match="every message needs a role and a text") as caught:
        joined(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_lone_surrogate_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud800 night"}\n')
    assert refusal([path]) == f"{path}:1 is not valid Unicode"


def test_a_template_that_refuses_is_one_line(write: Callable[..., Path], source: Source) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write("a.jsonl", {"messages": CHAT})
    with pytest.raises(SourceError, match="roles must alternate") as caught:
        calibration_ids(dataclasses.replace(source, tokenizer=tokenizer), text_sources([path]), 0)
    assert "\n" not in str(caught.value)


def test_calibration_on_conversations_uses_the_chat_template(
    write: Callable[..., Path], source: Source, tiny_bundle: Path
) -> None:
    path = write("a.jsonl", *[{"messages": CHAT}] * 100)
    ids, facts = calibration_ids(source, text_sources([path]), 0)
    text = source.tokenizer.decode(ids[0])
    assert "<s>user\nwho?</s>\n<s>assistant\nthe keeper</s>\n" in text
    assert "<s>assistant\n<s>" not in text  # no answer is asked for
    assert facts.source == "a.jsonl"
    codec = TextCodec(Bundle(tiny_bundle))
    assert codec.render_chat(CHAT, answer_next=False) in text


def test_several_files_are_all_named_in_the_facts(
    write: Callable[..., Path], source: Source
) -> None:
    files = [write("a.txt", "night " * 800), write("b.jsonl", {"text": "night " * 800})]
    ids, facts = calibration_ids(source, text_sources(files), 0)
    assert facts.source == "a.txt, b.jsonl"
    assert facts.tokens == ids.size > 0
