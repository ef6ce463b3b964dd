"""The user's own calibration text: plain files, or JSON lines of prompts and responses."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import refusal_of, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from dash_onnx.core.arrays import Ids
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.conversation import Message
from dash_onnx.core.documents import plain
from dash_onnx.core.errors import SourceError
from dash_onnx.core.text import TextCodec
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.calibration.draw import draw
from dash_onnx.exporters.calibration.texts import TextLike, text_sources
from dash_onnx.exporters.calibration.tokens import calibration_ids
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.exporters.sources import Source, open_source
from dash_onnx.exporters.train.options import TrainOptions

CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the keeper"}]


def render(messages: Sequence[Message]) -> str:
    return "|".join(f"{message['role']}:{message['content']}" for message in messages)


def joined(*given: TextLike) -> str:
    """All that sources hold."""
    parts = [source.content.excerpt(render, 1_000_000, 1000) for source in text_sources(given)]
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


def refusal(files: Sequence[TextLike]) -> str:
    return refusal_of(SourceError, lambda: joined(*files))


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


def test_a_folder_is_its_texts_in_the_order_of_their_paths(tmp_path: Path) -> None:
    """Neither other files, nor hidden or empty ones."""
    contents = {
        "b/one.md": "second",
        "b/two.jsonl": '{"text": "third"}\n',
        "a.txt": "first",
        "c.py": "code",
        "d.txt": "",
        ".venv/licence.txt": "hidden",
    }
    for name, content in contents.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(content)
    assert joined(str(tmp_path / "texts")) == "first\n\nsecond\n\nthird"
    assert text_sources([str(tmp_path / "texts/")])[0].name == "texts"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"plain\ntext {x}\n", "plain\ntext {x}\n"),
        (b'\n{"text": "a"}\n\n{"prompt": "p", "response": "r"}\n', "a\n\nuser:p|assistant:r"),
        (b'"a": 1}', '"a": 1}'),
    ],
)
def test_standard_input_is_text_or_json_lines_and_read_once(
    monkeypatch: pytest.MonkeyPatch, content: bytes, text: str
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    export = ExportOptions(calibration=("-",))
    assert joined(*export.texts) == text
    training = TrainOptions(calibration=export.texts)
    assert joined(*training.texts) == text and training.texts[0].sha256()
    assert training.texts[0].name == "-"


def test_a_name_that_is_not_utf8_can_be_written(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xfcr.txt"))
    path.write_text("the keeper")
    (source,) = text_sources([path])
    assert source.name == "f\\udcfcr.txt" and source.name.encode()
    assert joined(path) == "the keeper"


def test_the_checksum_follows_the_text_and_the_weight(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = text_sources([path])[0].sha256()
    assert text_sources([str(tmp_path)])[0].sha256() == first  # the folder holds the same
    found = {first, text_sources([f"{path}@2"])[0].sha256()}
    path.write_text("two")
    assert len({*found, text_sources([path])[0].sha256()}) == 3


@pytest.mark.parametrize("name", ["keeper@night.txt", "a@0.5", "hub:it", "a@-1"])
def test_what_exists_under_the_whole_spelling_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("found")
    assert joined(name) == "found"
    (source,) = text_sources([f"{name}@3"])
    assert (source.weight, source.name) == (3, f"{name}@3")


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
    ("spellings", "message"),
    [
        (["FOLDER/empty"], "FOLDER/empty holds no text: no .txt, .md, .jsonl below it"),
        (["FOLDER/empty@0.5"], "FOLDER/empty holds no text"),
        (["FOLDER/none.txt@0.5"], "cannot read FOLDER/none.txt:"),
        (["FOLDER/none@home"], "cannot read FOLDER/none@home:"),
        (["a.txt@0"], "the weight of a.txt@0 must lie in 1e-06..1e+06, as in a.txt@0.5"),
        (["a.txt@-1"], "must lie in"),
        (["a.txt@nan"], "must lie in"),
        (["a.txt@inf"], "must lie in"),
        (["@1"], "cannot read @1:"),
        (["a.txt@0.5", "b.txt"], "give every text a weight, as in b.txt@0.5, or none"),
        (["-", "-"], "one text may come from standard input (-) or a pipe"),
        ([""], "a text has an empty name"),
    ],
)
def test_a_source_that_cannot_be_is_told_with_its_remedy(
    tmp_path: Path, spellings: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/code.py").touch()
    found = refusal([spelling.replace("FOLDER", str(tmp_path)) for spelling in spellings])
    assert message.replace("FOLDER", str(tmp_path)) in found


def test_a_pipe_is_read_once_as_standard_input_is(tmp_path: Path) -> None:
    """As the shell gives `<(zcat chats.jsonl.gz)`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"text": "piped"}\n',))
    writer.start()
    (source,) = text_sources([str(pipe)])
    assert source.sha256() and joined(source) == "piped"
    writer.join()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n", "is empty"), (b"\xff", "is not UTF-8 text"), (b'{"a": 1}\n[', ":1 needs `text`")],
)
def test_standard_input_without_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert refusal(["-"]).startswith(f"standard input{' ' * (message[0] != ':')}{message}")


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


def no_draft() -> Bundle:
    raise AssertionError("there is text")


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
        calibration_ids(
            dataclasses.replace(source, tokenizer=tokenizer),
            text_sources([path]),
            0,
            no_draft,
        )
    assert "\n" not in str(caught.value)


def test_calibration_on_conversations_uses_the_chat_template(
    write: Callable[..., Path], source: Source, tiny_bundle: Path
) -> None:
    path = write("a.jsonl", *[{"messages": CHAT}] * 100)
    ids, facts = calibration_ids(source, text_sources([path]), 0, no_draft)
    text = source.tokenizer.decode(ids[0])
    assert "<s>user\nwho?</s>\n<s>assistant\nthe keeper</s>\n" in text
    assert "<s>assistant\n<s>" not in text  # no answer is asked for
    assert facts.source == "a.jsonl"
    codec = TextCodec(Bundle(tiny_bundle))
    assert codec.render_chat(CHAT, answer_next=False) in text


def test_calibration_on_conversations_gives_a_template_the_parts_that_it_takes(
    write: Callable[..., Path], source: Source
) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
        "{{ part.text }}{% endfor %};{% endfor %}"
    )
    tokenizer = copy.copy(source.tokenizer)
    tokenizer.chat_template = template
    path = write("a.jsonl", *[{"messages": CHAT}] * 200)
    ids, _ = calibration_ids(
        dataclasses.replace(source, tokenizer=tokenizer), text_sources([path]), 0, no_draft
    )
    assert "user: who?;assistant: the keeper;" in source.tokenizer.decode(ids[0])


def test_texts_begin_with_what_stands_before_them_alone(
    write: Callable[..., Path], source: Source
) -> None:
    """Some tokenizers also put an end behind a text."""
    tokenizer = copy.deepcopy(source.tokenizer)
    frame = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer._tokenizer.post_processor = frame
    assert tokenizer("")["input_ids"] == [0, 1]
    framed = dataclasses.replace(source, tokenizer=tokenizer)
    path = write("a.txt", "night " * 3000)
    ids, _ = calibration_ids(framed, text_sources([path]), 0, no_draft)
    assert (ids[:, 0] == 0).all() and not (ids[:, 1] == 1).any()


def test_several_files_are_all_named_in_the_facts(
    write: Callable[..., Path], source: Source
) -> None:
    files = [write("a.txt", "night " * 800), write("b.jsonl", {"text": "night " * 800})]
    ids, facts = calibration_ids(source, text_sources(files), 0, no_draft)
    assert facts.source == "a.txt, b.jsonl"
    assert facts.tokens == ids.size > 0


# Which tokens are drawn


def bytes_of(text: str) -> Ids:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def drawn(*given: TextLike, sequences: int = 12, least: int = 8, begin: str = "") -> list[str]:
    """Sequences of 8 tokens, a byte each."""
    ids = draw(
        text_sources(given),
        render,
        bytes_of,
        sequences=sequences,
        length=8,
        least=least,
        purpose="a test",
        begin=bytes_of(begin),
    )
    assert ids.dtype == np.int64
    return [bytes(row.tolist()).decode() for row in ids]


def letters_of(rows: Sequence[str]) -> list[str]:
    """The letter of each sequence; a text and the next may lie a line apart."""
    return [row.strip()[0] for row in rows]


@pytest.fixture
def letters(tmp_path: Path) -> Callable[[str, int], str]:
    """A file of one letter so many times; returns its path."""

    def run(letter: str, count: int) -> str:
        path = tmp_path / f"{letter}.txt"
        path.write_text(letter * count)
        return str(path)

    return run


def test_without_weights_texts_count_by_their_size(letters: Callable[[str, int], str]) -> None:
    for times in (1, 1000):  # read whole, or in part
        rows = drawn(letters("a", 300 * times), letters("b", 100 * times))
        assert letters_of(rows) == [*"aaaaaaaaabbb"]


@pytest.mark.parametrize(
    ("first", "second"), [("3", "1"), ("0.75", "0.25"), ("1e-3", "0.00033333")]
)
def test_weights_are_shares_of_the_tokens(
    letters: Callable[[str, int], str], first: str, second: str
) -> None:
    a, b = letters("a", 500), letters("b", 5000)
    assert letters_of(drawn(f"{a}@{first}", f"{b}@{second}")) == [*"aaaaaaaaabbb"]


def test_the_first_calibration_sequences_are_of_all_texts(
    letters: Callable[[str, int], str], source: Source
) -> None:
    """They alone tell how good a plan is."""
    texts = text_sources([letters("a", 9000), letters("b", 9000)])
    ids, _ = calibration_ids(source, texts, 0, no_draft)
    assert 0 < sum("a" in source.tokenizer.decode(row) for row in ids[:6]) < 6
    again, _ = calibration_ids(source, texts, 0, no_draft)
    assert np.array_equal(ids, again)


def test_shares_hold_where_a_text_is_short(letters: Callable[[str, int], str]) -> None:
    short, long = letters("a", 16), letters("b", 5000)
    assert letters_of(drawn(f"{short}@1", f"{long}@2")) == [*"aabbbb"]
    with pytest.raises(SourceError) as caught:
        drawn(f"{short}@1", f"{long}@2", least=80)
    assert str(caught.value) == (
        "a.txt@1 has 16 tokens, with which its weight allows 48 in all; a test needs at least 80"
    )


def test_weighted_texts_too_short_for_passages_of_their_own_are_refused(
    letters: Callable[[str, int], str],
) -> None:
    texts = [f"{letters(letter, 7)}@1" for letter in "abcdefghij"]
    with pytest.raises(SourceError, match="hold 0 passages of 8 tokens; a test needs at least 8"):
        drawn(*texts, least=64)


def test_every_sequence_begins_as_texts_do(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz")
    assert drawn(path, begin="^") == ["^abcdefg", "^jklmnop", "^tuvwxyz"]
    assert drawn(path) == ["abcdefgh", "jklmnopq", "stuvwxyz"]


@pytest.mark.parametrize("count", [100, 1000, 100_000])
def test_sequences_are_spread_over_all_of_a_text(tmp_path: Path, count: int) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{number:07d} " for number in range(count)))
    rows = drawn(path)
    assert rows == drawn(path)
    places = [int((row + row)[(row + row).index(" ") + 1 :][:7]) / count for row in rows]
    assert len(rows) == 12
    assert np.allclose(places, np.linspace(0, 1, 12), atol=0.12)


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("the keeper counts 42 ships, a longer story than that\n", False),
        ("3141592653589793238462643383279", False),
        ("灯台守は夜に通り過ぎる船を数え、それを本に書き留める。", True),
    ],
)
def test_a_text_that_is_split_into_bytes_is_taken_with_one_warning(
    write: Callable[..., Path],
    source: Source,
    tiny_bundle: Path,
    caplog: pytest.LogCaptureFixture,
    text: str,
    warned: bool,
) -> None:
    texts = text_sources([write("a.txt", text * 90)])
    codec = TextCodec(Bundle(tiny_bundle))
    with caplog.at_level(logging.WARNING, "dash_onnx"):
        ids, _ = calibration_ids(source, texts, 0, no_draft)
        sizes = {"sequences": 8, "length": 64, "least": 8}
        draw(texts, plain, codec.encode, **sizes, purpose="training", begin=codec.encode(""))
    assert len(ids) >= 2
    assert len(caplog.records) == warned
    for record in caplog.records:
        message = record.getMessage()
        assert message.startswith("a.txt is a text that the tokenizer does not know")
        assert "3.0 tokens per character" in message and "\n" not in message
