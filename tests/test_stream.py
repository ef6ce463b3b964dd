"""Generations under way: ended, redirected and awaited from elsewhere; and their text."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import dash_onnx
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.deciders import Decider, decider_of
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.stream import Completion

PROMPT = "the keeper"
ENDLESS: dict[str, Any] = {"ignore_eos": True, "max_new_tokens": 200}


def test_a_closed_stream_yields_nothing_more_and_frees_its_cache(tiny_model: Model) -> None:
    cache = tiny_model.new_cache()
    with tiny_model.stream(PROMPT, cache=cache, **ENDLESS) as chunks:
        next(chunks)
    assert [*chunks] == []
    assert tiny_model.generate(PROMPT, cache=cache, max_new_tokens=2)


def test_another_thread_may_close_a_stream(tiny_model: Model) -> None:
    cache = tiny_model.new_cache()
    chunks, seen = tiny_model.stream(PROMPT, cache=cache, **ENDLESS), threading.Event()
    counted = []

    def read() -> None:
        for chunk in chunks:
            counted.append(chunk)
            seen.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert seen.wait(10)
    chunks.close()
    reader.join(10)
    assert not reader.is_alive()
    assert 1 <= len(counted) < 200
    assert tiny_model.generate(PROMPT, cache=cache, max_new_tokens=2)  # it is free


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Passes of a tenth of a second, and prompts that run in passes of two tokens; set by each."""
    layers, passed = SequenceState.layers, threading.Event()

    def slowly(self: SequenceState, *given: Any) -> Any:
        time.sleep(0.1)
        found = layers(self, *given)
        passed.set()
        return found

    monkeypatch.setattr(SequenceState, "layers", slowly)
    monkeypatch.setattr("dash_onnx.runtime.scheduler.PREFILL_CHUNK", 2)
    return passed


def test_a_stream_may_be_closed_while_its_prompt_runs(
    tiny_model: Model, slow: threading.Event
) -> None:
    cache = tiny_model.new_cache()
    chunks = tiny_model.stream([5] * 100, cache=cache, **ENDLESS)
    reader = threading.Thread(target=lambda: [*chunks])
    reader.start()
    assert slow.wait(10)
    started = time.monotonic()
    chunks.close()
    reader.join(10)
    assert time.monotonic() - started < 2  # of five
    assert len(cache.tokens) < 50 and Completion.of(chunks) == ""
    assert tiny_model.generate(PROMPT, cache=cache, max_new_tokens=2)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("prompt", [[5, 6], [5] * 100], ids=["answer", "prompt"])
def test_the_cache_of_a_cancelled_task_is_free(prompt: list[int], tiny_model: Model) -> None:
    cache = tiny_model.new_cache()

    async def read(prompt: list[int], most: int) -> int:
        chunks = tiny_model.astream(prompt, cache=cache, ignore_eos=True, max_new_tokens=most)
        return len([chunk async for chunk in chunks])

    async def talk() -> int:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read(prompt, 100), 0.5)
        return await read([7], 2)

    assert asyncio.run(talk()) == 2


def test_a_budget_may_change_between_two_tokens(scored: Model) -> None:
    def shares(budget: float | None) -> float:
        with scored.stream(PROMPT, budget=0.99, **ENDLESS) as chunks:
            for _ in range(20):
                next(chunks)
            if budget:
                chunks.set_budget(budget)
            paths = [chunk.path for chunk in chunks][50:]
        return sum(path.count("full") + path.count("int8") for path in paths) / len(paths)

    assert shares(0.25) < shares(None)


def test_the_same_budget_set_again_keeps_what_the_text_has_cost(
    scored: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Policy] = []

    def counted(policy: Policy, sequence: SequenceState) -> Decider:
        made.append(policy)
        return decider_of(policy, sequence)

    monkeypatch.setattr("dash_onnx.runtime.generate.decider_of", counted)
    with scored.stream(PROMPT, policy="dash", budget=0.5, **ENDLESS) as chunks:
        for _ in range(8):
            next(chunks)
            chunks.set_budget(0.5)
        chunks.set_budget(0.4)
        chunks.set_budget(0.5)
        next(chunks)
        assert len(made) == 1 and chunks.policy.budget == 0.5
        chunks.set_budget(0.4)
        next(chunks)
    assert [policy.budget for policy in made] == [0.5, 0.4]


def test_a_budget_that_cannot_be_met_leaves_the_stream_as_it_is(
    scored: Model, tiny_model: Model
) -> None:
    with scored.stream(PROMPT, **ENDLESS) as chunks:
        for budget in (7, 10**400, "cheap"):
            with pytest.raises(PolicyError, match="budget"):
                chunks.set_budget(budget)
        assert next(chunks)
    with tiny_model.stream(PROMPT, policy="int4", **ENDLESS) as chunks:
        with pytest.raises(PolicyError, match="takes no budget"):
            chunks.set_budget(0.5)


def test_an_asynchronous_stream_yields_the_same_chunks(tiny_model: Model) -> None:
    async def read() -> list[str]:
        chunks = tiny_model.astream(PROMPT, max_new_tokens=12, ignore_eos=True)
        return [chunk.text async for chunk in chunks]

    expected = [c.text for c in tiny_model.stream(PROMPT, max_new_tokens=12, ignore_eos=True)]
    assert asyncio.run(read()) == expected


def test_a_cancelled_task_ends_its_stream(tiny_model: Model) -> None:
    cache = tiny_model.new_cache()

    async def read(started: asyncio.Event) -> None:
        async for _ in tiny_model.astream(PROMPT, cache=cache, **ENDLESS):
            started.set()

    async def main() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(read(started))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert tiny_model.generate(PROMPT, cache=cache, max_new_tokens=2)


def test_a_completion_is_text_that_knows_how_it_came_about(tiny_model: Model) -> None:
    text = tiny_model.generate(PROMPT, policy="static:int8,skip,int4,full", **ENDLESS)
    assert isinstance(text, str) and isinstance(text, dash_onnx.Completion)
    assert (text.finish_reason, text.generated_tokens, len(text.ms)) == ("length", 200, 200)
    assert text.prompt_tokens == len(tiny_model.text.encode(PROMPT))
    assert text.actions == {"full": 0.25, "int4": 0.25, "int8": 0.25, "skip": 0.25}
    assert pickle.loads(pickle.dumps(text)).actions == text.actions


def test_chat_takes_one_message_as_text_and_content_in_parts(tiny_model: Model) -> None:
    answers = {
        str(tiny_model.chat(messages, max_new_tokens=4))
        for messages in (
            "hello",
            [{"role": "user", "content": "hello"}],
            ({"role": "user", "content": [{"type": "text", "text": "hello"}]},),
        )
    }
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no message"),
        (["hi"], "must be a dict"),
        ({"role": "user", "content": "hi"}, "must be a list"),
        ([{"content": "hi"}], "must be a dict"),
        ([{"role": "user", "content": 5}], "int, not text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "is not text"),
        (5, "must be a list"),
        (None, "must be a list"),
    ],
)
def test_messages_of_another_form_are_refused(tiny_model: Model, prompt: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        tiny_model.chat(prompt)


@pytest.mark.parametrize(
    "option",
    [
        {"max_new_tokens": "5"},
        {"max_new_tokens": 5.0},
        {"max_new_tokens": True},
        {"stop": 5},
        {"stop": [5]},
        {"cache": 5},
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"seed": "x"},
        {"policy": 5},
        {"budget": [0.5]},
        {"prefill": 4},
        {"ignore_eos": "no"},
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_refused_by_their_name(
    tiny_model: Model, option: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        tiny_model.stream(PROMPT, **option)


@pytest.mark.parametrize("option", [{"memory": "x"}, {"threads": 10**9}, {"threads": "2"}])
def test_load_refuses_what_no_option_can_be(tiny_bundle: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        dash_onnx.load(tiny_bundle, **option)


def test_every_generating_method_tells_its_options() -> None:
    expected = [*inspect.signature(Model.stream).parameters]
    for method in (Model.generate, Model.chat, Model.astream):
        assert [*inspect.signature(method).parameters] == expected


def test_the_top_of_the_package_lists_its_public_names(tiny_model: Model) -> None:
    assert {"load", "Model", "Stream", "Completion", "Chunk"} <= set(dir(dash_onnx))
    assert not [name for name in dir(dash_onnx) if name.startswith("_") and name != "__version__"]
    assert "4 layers in full, int8, int4, skip" in repr(tiny_model)
