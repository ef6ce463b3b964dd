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
from dash_onnx.core.errors import DashError, SourceError
from dash_onnx.core.text import Message, TextCodec
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.calibrate import calibration_ids
from dash_onnx.exporters.sources import Source, open_source
from dash_onnx.exporters.texts import calibration_text, plain

CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the keeper"}]


def render(messages: Sequence[Message]) -> str:
    return "|".join(f"{message['role']}:{message['content']}" for message in messages)


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
        calibration_text(files, render)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# What is read


def test_a_text_file_is_taken_as_it_is(write: Callable[..., Path]) -> None:
    path = write("a.txt", "  one\n\ntwo {not json}")
    assert calibration_text([path], render) == "  one\n\ntwo {not json}\n"


def test_several_files_of_both_kinds_are_joined_in_their_order(write: Callable[..., Path]) -> None:
    text, lines = write("a.md", "first"), write("b.jsonl", {"text": "second"}, {"text": "third"})
    assert calibration_text([text, lines], render) == "first\n\n\nsecond\n\nthird"
    assert calibration_text([lines, text], render) == "second\n\nthird\n\nfirst\n"


def test_messages_are_rendered_as_a_conversation(write: Callable[..., Path]) -> None:
    path = write("a.jsonl", {"messages": CHAT, "id": 7})
    assert calibration_text([path], render) == "user:who?|assistant:the keeper"


@pytest.mark.parametrize("asked", ["prompt", "instruction", "question", "input"])
@pytest.mark.parametrize("answered", ["response", "output", "answer", "completion"])
def test_a_prompt_and_a_response_become_a_conversation_under_their_usual_names(
    write: Callable[..., Path], asked: str, answered: str
) -> None:
    path = write("a.jsonl", {asked: "who?", answered: "the keeper"})
    assert calibration_text([path], render) == "user:who?|assistant:the keeper"


def test_an_empty_input_beside_an_instruction_does_not_count(write: Callable[..., Path]) -> None:
    path = write("a.jsonl", {"instruction": "count", "input": "", "output": "1 2 3"})
    assert calibration_text([path], render) == "user:count|assistant:1 2 3"


def test_text_is_preferred_and_then_messages(write: Callable[..., Path]) -> None:
    pair = {"prompt": "p", "response": "r"}
    path = write("a.jsonl", {"text": "t", "messages": CHAT, **pair}, {"messages": CHAT, **pair})
    assert calibration_text([path], render) == "t\n\nuser:who?|assistant:the keeper"


def test_blank_lines_between_records_are_left_out(write: Callable[..., Path]) -> None:
    path = write("a.jsonl", {"text": "a"}, "", "  \t", {"text": "b"})
    assert calibration_text([path], render) == "a\n\nb"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_line_separator_of_unicode_inside_a_record_does_not_end_it(
    write: Callable[..., Path], separator: str
) -> None:
    path = write("a.jsonl", {"text": f"one{separator}two"})
    assert calibration_text([path], render) == f"one{separator}two"


def test_records_may_end_as_windows_ends_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert calibration_text([tmp_path / "a.jsonl"], render) == "a\n\nb"


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


BAD_MESSAGES: list[list[Any]] = [["hello"], [3], [{}], [{"role": "user"}], [{"content": None}]]


@pytest.fixture(scope="module")
def source(tiny_folder: Path) -> Source:
    return open_source(str(tiny_folder), REGISTRY)


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=str)
def test_messages_that_are_no_messages_never_end_in_a_traceback(
    write: Callable[..., Path], source: Source, messages: list[Any]
) -> None:
    path = write("a.jsonl", {"messages": messages})
    with pytest.raises(DashError) as caught:  # refused, or too short
        calibration_ids(source, [path], 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=str)
def test_nor_do_they_without_a_template(write: Callable[..., Path], messages: list[Any]) -> None:
    path = write("a.jsonl", {"messages": messages})
    try:
        calibration_text([path], plain)
    except DashError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_a_lone_surrogate_never_ends_in_a_traceback(tmp_path: Path, source: Source) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud800 ' + "night " * 2000 + '"}\n')
    try:
        calibration_ids(source, [path], 0)
    except DashError as error:
        assert "\n" not in str(error)


def test_a_template_that_refuses_is_one_line(write: Callable[..., Path], source: Source) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write("a.jsonl", {"messages": CHAT})
    with pytest.raises(DashError, match="roles must alternate") as caught:
        calibration_ids(dataclasses.replace(source, tokenizer=tokenizer), [path], 0)
    assert "\n" not in str(caught.value)


def test_calibration_on_conversations_uses_the_chat_template(
    write: Callable[..., Path], source: Source, tiny_bundle: Path
) -> None:
    path = write("a.jsonl", *[{"messages": CHAT}] * 100)
    ids, facts = calibration_ids(source, [path], 0)
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
    ids, facts = calibration_ids(source, files, 0)
    assert facts.source == "a.txt, b.jsonl"
    assert facts.tokens == ids.size > 0
