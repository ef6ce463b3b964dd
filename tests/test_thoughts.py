"""Thoughts: told apart from the answer, limited, free of its grammar, turned on and off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny, tiny_tokenizer

import dash_onnx
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.thoughts import Tags, Thoughts
from dash_onnx.runtime.grammar import Grammar
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions, LogitsProcessor

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m['content'] }}</s>\n{% endfor %}{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"
    "{% if add_generation_prompt %}<s>assistant\n{% if enable_thinking is defined %}<think>\n"
    "{% if not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}{% endif %}"
)
"""Like Qwen's: it opens thoughts, closes them at once, or leaves both to the model."""

ASKED = [{"role": "user", "content": "the keeper"}]
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
def bundle(tmp_path_factory: pytest.TempPathFactory, export_tiny: Callable[..., Path]) -> Path:
    return export_tiny(save_thinking(tmp_path_factory.mktemp("thinking") / "tiny"))


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

ENDING = "\n</think>\n\n"


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
    ending = model.text.encode(ENDING, add_special_tokens=False).tolist()
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


def test_limits_hold_with_guesses_and_in_batches(model: Model) -> None:
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
            expected = alone.reasoning + str(alone)  # guesses run on where the limit ends thoughts
            options = GenerationOptions(
                max_thinking_tokens=most, expected=expected, speculate=True, **given
            )
            batch.submit(model.request(prompt, pieces.append, options))
        while batch.step():
            pass
        found = [dash_onnx.Completion.of(pieces) for pieces in told]
        assert found == plain
        assert [one.reasoning for one in found] == [one.reasoning for one in plain]
        assert any(chunk.guess.right for pieces in told for chunk in pieces if chunk.guess)


# A grammar


@pytest.mark.parametrize("given", [{}, THINK, {"max_thinking_tokens": 0}], ids=str)
def test_a_grammar_is_of_the_answer(given: dict[str, Any], model: Model) -> None:
    grammar = Grammar.json_schema({"enum": ["night", "noon"]})
    said = saying(model, *(["<think>"] if not given else []), 'ships"\n', "</think>")
    if "max_thinking_tokens" in given:
        answer = model.chat(ASKED, grammar=grammar, **given)  # they are off: it begins at once
        assert answer.reasoning == ""
    else:  # what is said ends inside the thoughts, and the processor asks for the end then
        answer = model.chat(ASKED, grammar=grammar, logits_processor=said, **given)
        assert answer.reasoning == 'ships"'
    assert json.loads(answer) in ("night", "noon") and answer.finish_reason == "stop"


def test_a_limit_leads_to_the_grammar(model: Model) -> None:
    grammar = Grammar.json_schema({"enum": ["night", "noon"]})
    options = GenerationOptions(grammar=grammar, max_thinking_tokens=4, temperature=3.0)
    answers = model.batch([ASKED] * 6, options=options, parallel=4)
    assert all(json.loads(answer) in ("night", "noon") for answer in answers)
    assert all(answer.reasoning for answer in answers)


def test_a_model_that_may_think_may_answer_at_once(model: Model) -> None:
    grammar = Grammar.regex("(aye|nay)!")
    assert model.chat(ASKED, grammar=grammar, logits_processor=saying(model, "nay!")) == "nay!"


def test_thoughts_before_a_grammar_do_not_end_the_answer(model: Model) -> None:
    ends = saying(model, "ships")  # then it wants to end
    answer = model.chat(
        ASKED, grammar=Grammar.regex("aye"), logits_processor=ends, max_new_tokens=9, **THINK
    )
    assert answer.finish_reason == "length" and answer.generated_tokens == 9
    assert str(answer) == ""


# Where an answer begins


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


def test_a_vocabulary_without_tags_has_no_thoughts() -> None:
    assert Tags.of(tiny_tokenizer().backend_tokenizer) is None
    thoughts = Thoughts(None, None, 0)
    assert not any(thoughts.took(token) for token in range(9)) and not thoughts.due


def test_tags_of_other_families_are_known() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    tags = Tags.of(tokenizer.backend_tokenizer)
    assert tags is not None and tags.ending == (tags.close,) and tags.open != tags.close
