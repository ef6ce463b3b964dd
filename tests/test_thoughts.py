"""Thoughts: told apart from the answer, limited, free of its grammar, turned on and off."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cli_tool import Capture, Tool
from conftest import save_tiny, tiny_tokenizer
from test_serve import Server
from test_show_path import pretend_terminal

import dash_onnx
from dash_onnx.cli.run import main
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.text import TextCodec
from dash_onnx.core.thoughts import Tags, Thoughts
from dash_onnx.runtime.grammar import Grammar
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions, LogitsProcessor
from dash_onnx.runtime.results import GeneratedToken
from dash_onnx.runtime.writer import TextWriter

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m['content'] }}</s>\n{% endfor %}{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"
    "{% if add_generation_prompt %}<s>assistant\n{% if enable_thinking is defined %}<think>\n"
    "{% if not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}{% endif %}"
)
"""Like Qwen's: it opens thoughts, closes them at once, or leaves both to the model."""

ASKED = [{"role": "user", "content": "the keeper"}]
TOOL = Tool("dash-run", main)
THINK: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}


def save_thinking(folder: Path) -> Path:
    """A tiny model whose tokenizer and template know thoughts."""
    save_tiny(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, night: Path, export_tiny: Callable[..., Path]
) -> Path:
    source = save_thinking(tmp_path_factory.mktemp("thinking") / "tiny")
    return export_tiny(source, calibration=(night,))


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with dash_onnx.load(bundle, policy="full") as model:
        yield model


def saying(model: Model, *parts: str) -> LogitsProcessor:
    """Makes a model say something, and then end."""
    encode = model.text.encode
    ids = [t for part in parts for t in encode(part, add_special_tokens=False).tolist()]
    start: list[int] = []

    def processed(text: Sequence[int], logits: np.ndarray) -> np.ndarray:
        start.append(len(text))
        left = ids[len(text) - start[0] :]
        wanted = left[0] if left else min(model.text.eos_token_ids)
        return np.where(np.arange(len(logits)) == wanted, np.float32(9), np.float32(-9))

    return processed


@pytest.mark.parametrize(
    ("said", "given", "reasoning", "text"),
    [
        ("<think>\nships, ünd  \n</think>\n\n the night", {}, "ships, ünd", "the night"),
        ("ships \n</think>\n\nthe night", THINK, "ships", "the night"),
        ("\n\n</think>\n\n", THINK, "", ""),
        ("ships, but", THINK, "ships, but", ""),  # it ends inside
        (" the <think> and </think>", {}, "", " the <think> and </think>"),
        ("<think>a</think>b <think>c</think>", {}, "a", "b <think>c</think>"),
        ("\n<think>a</think>", {"max_thinking_tokens": 0}, "", "\n<think>a</think>"),
    ],
)
def test_an_answer_is_told_apart_from_its_thoughts(
    said: str, given: dict[str, Any], reasoning: str, text: str, model: Model
) -> None:
    answer = model.chat(ASKED, logits_processor=saying(model, said), **given)
    assert (answer.reasoning, str(answer)) == (reasoning, text)
    chunks = [*model.stream(ASKED, logits_processor=saying(model, said), **given)]
    assert "".join(chunk.reasoning for chunk in chunks) == reasoning
    assert all(chunk.thinking or not chunk.reasoning for chunk in chunks)
    assert not any(chunk.thinking and chunk.text for chunk in chunks)
    encoded = model.text.encode(said, add_special_tokens=False).tolist()
    assert [chunk.token for chunk in chunks][:-1] == encoded


HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]  # gpt-oss's
GEMMA4 = ["<|channel>", "<channel|>"]
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
TO_F = "<|end|><|start|>\u0120to=f<|channel|>analysis"


@pytest.mark.parametrize(
    ("tags", "said", "most", "reasoning", "text"),
    [
        (HARMONY, f"<|channel|>analysis<|message|>Count.{FINAL}Seven", None, "Count.", "Seven"),
        (HARMONY, "<|channel|>final<|message|>Seven", None, "", "Seven"),
        (HARMONY, "Seven", None, "", "Seven"),
        (HARMONY, "<|channel|>analysis<|message|>Count", None, "Count", ""),
        (HARMONY, "<|channel|>", 0, "", ""),
        (HARMONY, "<|channel|>analysis<|message|>aa", 3, "a", ""),
        (HARMONY, "<|channel|>\u0120to=f<|message|>Seven", 5, "Seven", ""),  # a call is not cut
        (HARMONY, "<|channel|>\u0120to=f<|channel|>analysis<|message|>Seven", 7, "S", ""),
        (HARMONY, f"<|channel|>analysis<|message|>a{TO_F}<|message|>Seven", 12, "aSeven", ""),
        (GEMMA4, "<|channel>thought\nCount.<channel|>Seven", None, "Count.", "Seven"),
        (GEMMA4, "<|channel>thought\n<channel|>Seven", None, "", "Seven"),
        (GEMMA4, "Seven", None, "", "Seven"),
        (GEMMA4, "<|channel>", 0, "", ""),
    ],
)
def test_channels_are_told_apart(
    tags: list[str], said: str, most: int | None, reasoning: str, text: str, tiny_bundle: Path
) -> None:
    codec = TextCodec(Bundle(tiny_bundle))
    codec.tokenizer.add_special_tokens(tags)
    codec.tokenizer.add_tokens(["analysis", "assistant", "final", "thought", "\u0120to"])
    codec.tags = Tags.of(codec.tokenizer)
    thoughts, writer = Thoughts(codec.tags, None, most), TextWriter(codec, 1, ())
    left = codec.encode(said, add_special_tokens=False).tolist()
    found, forced = [], 0
    while left or thoughts.due:
        token = thoughts.due[0] if thoughts.due else left.pop(0)
        forced += bool(thoughts.due)
        if forced:  # nothing else follows here
            left = []
        thinking = thoughts.took(token)
        found.append(writer.add(GeneratedToken(token, ("full",), 0.0, thinking=thinking)))
    found.append(writer.add(GeneratedToken(1, ("full",), 0.0, "stop")))
    assert "".join(chunk.reasoning for chunk in found) == reasoning
    assert "".join(chunk.text for chunk in found) == text
    assert not thoughts.open or text == "" != reasoning
    limited = most is not None and "Seven" not in reasoning
    assert bool(forced) == limited and not (forced and thoughts.open)


def test_raw_text_keeps_its_tags(model: Model) -> None:
    said = "<think>ships</think>night"
    answer = model.generate("the <think>", logits_processor=saying(model, said))
    assert (str(answer), answer.reasoning) == (said, "")


def test_stop_strings_end_the_answer_alone(model: Model) -> None:
    said = saying(model, "<think>\nships\nnight\n</think>\n\nthe keeper\ncounts")
    answer = model.chat(ASKED, logits_processor=said, stop="\n")
    assert (answer.reasoning, str(answer)) == ("ships\nnight", "the keeper")
    assert answer.finish_reason == "stop"


def test_messages_with_thoughts_reach_the_template(model: Model) -> None:
    said = {"role": "assistant", "content": "night", "reasoning_content": "ships"}
    text = model.text.render_chat([*ASKED, said, *ASKED], variables={"reasoning_effort": "high"})
    assert "<think>\nships\n</think>\n\nnight</s>" in text and "high" in text
    with pytest.raises(PolicyError, match="chat_template_kwargs cannot set messages, tools"):
        model.chat(ASKED, chat_template_kwargs={"messages": [], "tools": []})


# A limit


@pytest.mark.parametrize("most", [0, 1, 5])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_thoughts_end_at_their_limit(
    most: int, opened: bool, logprobs: int | None, model: Model
) -> None:
    tags = model.text.tags
    assert tags is not None
    prompt = model.text.encode_chat(ASKED, variables={"enable_thinking": True} if opened else {})

    def opens(text: Sequence[int], logits: np.ndarray) -> np.ndarray:
        return np.eye(len(logits))[tags.open] if len(text) == len(prompt) else logits

    given: dict[str, Any] = {} if opened else {"logits_processor": opens}
    given |= {"max_thinking_tokens": most, "logprobs": logprobs, "max_new_tokens": 20}
    found = [*model.generate_step(prompt, **given)]
    thoughts = [step.token for step in found if step.thinking]
    ending = model.text.encode("\n</think>\n\n", add_special_tokens=False).tolist()
    assert [*tags.ending] == ending
    assert len(thoughts) == most + len(ending) + (not opened)
    assert thoughts[-len(ending) :] == ending
    assert all(step.thinking for step in found[: len(thoughts)])
    assert len(found) > len(thoughts)  # the answer goes on
    assert all((step.logprobs is not None) == (logprobs is not None) for step in found)


def test_a_limit_switches_the_template(model: Model) -> None:
    whole = model.chat(ASKED, max_thinking_tokens=0, max_new_tokens=8)
    off = model.text.encode_chat(ASKED, variables={"enable_thinking": False})
    assert whole.prompt_tokens == len(off) and whole.reasoning == ""
    on = model.chat(ASKED, max_thinking_tokens=3, max_new_tokens=8)
    wanted = model.text.encode_chat(ASKED, variables={"enable_thinking": True})
    assert on.prompt_tokens == len(wanted)
    chosen = model.chat(ASKED, max_thinking_tokens=0, max_new_tokens=8, **THINK)
    assert chosen.prompt_tokens == len(wanted)  # what is said in words counts
    assert chosen.reasoning == ""
    for wrong in (-1, True, "5"):
        with pytest.raises(PolicyError, match="max_thinking_tokens"):
            model.chat(ASKED, max_thinking_tokens=wrong)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="chat_template_kwargs"):
        model.chat(ASKED, chat_template_kwargs=[1])  # type: ignore[arg-type]


def test_limits_hold_with_drafts_and_in_batches(model: Model) -> None:
    prompts = [
        [{"role": "user", "content": text}] for text in ("the ships", "night", "a b a b a b")
    ]
    given: dict[str, Any] = {"policy": "full", "max_new_tokens": 60, "ignore_eos": True}
    plain = [
        model.chat(prompt, speculate=False, max_thinking_tokens=most, **given)
        for prompt, most in zip(prompts, (7, 20, 33), strict=True)
    ]
    for rows in (1, 3):
        batch, told = model.new_scheduler(rows), [list[Any]() for _ in prompts]
        for prompt, pieces, alone, most in zip(prompts, told, plain, (7, 20, 33), strict=True):
            expected = alone.reasoning + str(alone)  # drafts run on where the limit ends thoughts
            options = GenerationOptions(
                max_thinking_tokens=most, expected=expected, speculate=True, **given
            )
            batch.submit(model.request(prompt, pieces.append, options))
        while batch.step():
            pass
        found = [dash_onnx.Completion.of(pieces) for pieces in told]
        assert found == plain
        assert [one.reasoning for one in found] == [one.reasoning for one in plain]
        assert any(chunk.draft.accepted for pieces in told for chunk in pieces if chunk.draft)


# A grammar


@pytest.mark.parametrize("given", [{}, THINK], ids=str)
def test_a_grammar_is_of_the_answer(given: dict[str, Any], model: Model) -> None:
    grammar = Grammar.json_schema({"enum": ["night", "noon"]})
    said = saying(model, "" if given else "<think>", 'ships"\n', "</think>")
    answer = model.chat(ASKED, grammar=grammar, logits_processor=said, **given)
    assert answer.reasoning == 'ships"'
    assert json.loads(answer) in ("night", "noon") and answer.finish_reason == "stop"
    off = model.chat(ASKED, grammar=grammar, max_thinking_tokens=0)
    assert json.loads(off) in ("night", "noon") and off.reasoning == ""
    at_once = saying(model, '"noon"')  # though it may think
    assert model.chat(ASKED, grammar=grammar, logits_processor=at_once) == '"noon"'


def test_a_limit_leads_to_the_grammar(model: Model) -> None:
    grammar = Grammar.json_schema({"enum": ["night", "noon"]})
    options = GenerationOptions(grammar=grammar, max_thinking_tokens=4, temperature=3.0, seed=1)
    answers = model.batch([ASKED] * 6, options=options, parallel=4)
    assert all(json.loads(answer) in ("night", "noon") for answer in answers)
    assert all(answer.reasoning for answer in answers)


def test_thoughts_before_a_grammar_do_not_end_the_answer(model: Model) -> None:
    ends = saying(model, "ships")  # then it wants to end
    given = {"grammar": Grammar.regex("aye"), "max_new_tokens": 9, **THINK}
    answer = model.chat(ASKED, logits_processor=ends, **given)
    assert answer.finish_reason == "length" and answer.generated_tokens == 9
    assert str(answer) == ""


def test_a_prompt_that_ends_with_a_tag_opens_or_closes_thoughts(model: Model) -> None:
    tags = model.text.tags
    assert tags is not None

    def begins(prompt: str) -> tuple[bool, int | None]:
        thoughts = model.text.thoughts(model.text.encode(prompt))
        return thoughts.open, thoughts.opening

    assert begins("<s>assistant\n<think>\n") == (True, None)
    assert begins("<s>assistant\n<think>\n\n</think>\n\n") == (False, None)
    assert begins("<s>user\nwhat is <think></s>\n<s>assistant\n") == (False, tags.open)
    assert begins("<s>user\n</think></s><s>") == (False, tags.open)


def test_tags_of_other_families_are_known() -> None:
    tokenizer = tiny_tokenizer()
    assert Tags.of(tokenizer.backend_tokenizer) is None
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    tags = Tags.of(tokenizer.backend_tokenizer)
    assert tags is not None and tags.ending == (tags.close,) and tags.open != tags.close
    assert not any(Thoughts(None, None, 0).took(token) for token in range(9))


# On the command line

LIMITED = ("--max-thinking-tokens", 5, "--max-tokens", 20, "--ignore-eos", "--policy", "full")


@pytest.fixture(scope="module")
def limited(model: Model) -> dash_onnx.Completion:
    given: dict[str, Any] = {"max_thinking_tokens": 5, "max_new_tokens": 20, "ignore_eos": True}
    answer = model.chat(ASKED, **given)
    assert answer.reasoning and str(answer)
    return answer


def test_the_command_prints_the_answer_and_at_a_terminal_dimmed_thoughts(
    bundle: Path,
    limited: dash_onnx.Completion,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = TOOL.json_of(capsys, bundle, "the keeper", *LIMITED)
    assert (found["text"], found["reasoning"]) == (str(limited), limited.reasoning)
    assert TOOL.run(bundle, "the keeper", *LIMITED) == 0
    printed = capsys.readouterr()
    assert printed.out == limited + "\n" and "thoughts took all" not in printed.err
    cut = ("--max-thinking-tokens", 50, "--max-tokens", 4, "--ignore-eos", "--policy", "full")
    assert TOOL.run(bundle, "the keeper", *cut) == 0
    assert "thoughts took all of --max-tokens" in capsys.readouterr().err
    assert "--max-thinking-tokens" in TOOL.refused(
        capsys, bundle, "the keeper", "--max-thinking-tokens", -1
    )
    pretend_terminal(monkeypatch)
    for more in ((), ("--show-path",)):
        assert TOOL.run(bundle, "the keeper", *LIMITED, *more) == 0
        shown = capsys.readouterr().out
        assert re.sub(r"\x1b\[[\d;]*m", "", shown) == f"{limited.reasoning}\n\n{limited}\n"
        assert ("\x1b[2m" in shown) == (not more)


def test_a_batch_and_a_trace_tell_thoughts(
    bundle: Path, limited: dash_onnx.Completion, tmp_path: Path, capsys: Capture
) -> None:
    file, trace = tmp_path / "batch.jsonl", tmp_path / "trace.jsonl"
    file.write_text('{"prompt": "the keeper"}\n')
    assert TOOL.run(bundle, "--batch", file, *LIMITED) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["reasoning"]) == (str(limited), limited.reasoning)
    assert TOOL.run(bundle, "the keeper", *LIMITED, "--trace", trace) == 0
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert "".join(line.get("reasoning", "") for line in lines) == limited.reasoning
    assert "".join(line["text"] for line in lines) == limited


def test_a_chat_keeps_thoughts_for_the_template(
    bundle: Path,
    limited: dash_onnx.Completion,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "chat.json"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"the keeper\n/save {path}\n"))
    assert TOOL.run(bundle, *LIMITED) == 0
    assert capsys.readouterr().out == limited + "\n"
    assert json.loads(path.read_text("utf-8"))[1] == {
        "role": "assistant",
        "content": str(limited),
        "reasoning_content": limited.reasoning,
    }


# Served


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Server]:
    with Server({"out": model}) as running:
        yield running


def test_the_server_sends_thoughts_apart(server: Server, model: Model) -> None:
    client = server.client()
    given: dict[str, Any] = {"model": "out", "messages": ASKED, "max_tokens": 20, "n": 2, "seed": 1}
    given |= {"temperature": 1.0, "extra_body": {"max_thinking_tokens": 5}}
    whole = client.chat.completions.create(**given)
    options: dict[str, Any] = {"max_thinking_tokens": 5, "max_new_tokens": 20, "temperature": 1.0}
    thought = 0
    for seed, choice in enumerate(whole.choices, 1):
        steps = [*model.stream(ASKED, seed=seed, **options)]
        wanted = dash_onnx.Completion.of(steps)
        assert wanted.reasoning and str(wanted)
        assert choice.message.content == wanted
        assert choice.message.to_dict()["reasoning_content"] == wanted.reasoning
        thought += sum(step.thinking for step in steps)
    assert whole.usage is not None and whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == thought
    pieces = client.chat.completions.create(**given, stream=True)
    told = ["", ""], ["", ""]
    for piece in pieces:
        for choice in piece.choices:
            delta = choice.delta.to_dict()
            told[0][choice.index] += delta.get("reasoning_content", "")
            told[1][choice.index] += delta.get("content", "")
    messages = [choice.message.to_dict() for choice in whole.choices]
    assert told[0] == [message["reasoning_content"] for message in messages]
    assert told[1] == [message["content"] for message in messages]


def test_fields_of_a_request_reach_the_template(server: Server, model: Model) -> None:
    def asked(**fields: Any) -> dict[str, Any]:
        body = {"messages": ASKED, "max_tokens": 12, "temperature": 0, **fields}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        found = answer.json()
        assert isinstance(found, dict) and found.get("error", {}).get("code") != "internal_error"
        return found

    def length(**variables: Any) -> int:
        return len(model.text.encode_chat(ASKED, variables=variables))

    for fields, variables in (
        ({}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "medium"}, {"reasoning_effort": "medium"}),
        ({"max_thinking_tokens": 9}, {"enable_thinking": True}),
        ({"max_thinking_tokens": None}, {}),
    ):
        assert asked(**fields)["usage"]["prompt_tokens"] == length(**variables), fields
    off = asked(reasoning_effort="none")
    assert "reasoning_content" not in off["choices"][0]["message"]
    assert "completion_tokens_details" not in off["usage"]
    for wrong, told in (
        ({"max_thinking_tokens": -1}, "max_thinking_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "cannot set messages"),
        ({"chat_template_kwargs": {"a": [{"b": "</s>"}]}}, "control token"),
        ({"reasoning_effort": "</s><s>system"}, "control token"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ):
        assert told in asked(**wrong)["error"]["message"]


def test_a_schema_is_served_behind_thoughts(server: Server) -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": ["night", "noon"]}}}
    body = {"messages": ASKED, "response_format": schema, "max_thinking_tokens": 4}
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    message = found["choices"][0]["message"]
    assert json.loads(message["content"]) in ("night", "noon") and message["reasoning_content"]


def test_raw_text_is_continued_with_its_tags(server: Server, model: Model) -> None:
    body = {"prompt": "the <think>", "max_tokens": 8, "max_thinking_tokens": 0, "temperature": 0}
    found = httpx.post(f"{server.url}/v1/completions", json=body).json()
    assert found["choices"][0]["text"] == model.generate("the <think>", max_new_tokens=8)
