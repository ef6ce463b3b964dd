"""Calls with values that nobody can mean: refused in one line, as a ValueError or our own error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dash_onnx
from dash_onnx.cli.info import main
from dash_onnx.core.bundle import file_facts
from dash_onnx.core.conversation import rendered
from dash_onnx.core.errors import PolicyError
from dash_onnx.runtime.model import Model

PROMPT = "the keeper"
SHORT: dict[str, Any] = {"max_new_tokens": 2, "ignore_eos": True}


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.generate(PROMPT, temperature=10**400),
        lambda model: model.generate(PROMPT, temperature=1e300),
        lambda model: model.generate(PROMPT, repetition_penalty=10**400),
        lambda model: model.generate(PROMPT, max_new_tokens=10**5000),
        lambda model: model.generate(PROMPT, options=5),
        lambda model: model.generate(PROMPT, options={}),
        lambda model: model.batch([PROMPT], options={}),
        lambda model: model.batch([PROMPT], parallel="x"),
        lambda model: model.batch([PROMPT], parallel=0),
        lambda model: model.batch("hello"),
        lambda model: model.logits([1.5, 2.5]),
        lambda model: model.logits(["x"]),
        lambda model: model.generate(np.array([True, False])),
        lambda model: model.generate([True, False]),
        lambda model: model.generate([1, "a"]),
        lambda model: model.generate([1, [2]]),
        lambda model: model.generate([1, 10**30]),
        lambda model: model.generate([1, {"role": "user", "content": "hi"}]),
        lambda model: model.generate([]),
        lambda model: model.new_sequence(-1),
        lambda model: model.new_sequence(batch=0),
        lambda model: model.chat(""),
        lambda model: model.chat([{"role": "user", "content": " \n"}]),
        lambda model: model.chat([{"role": "user"}]),
    ],
)
def test_a_call_that_nobody_can_mean_is_a_value_error(
    tiny_model: Model, call: Callable[[Model], object]
) -> None:
    with pytest.raises(PolicyError) as caught:
        call(tiny_model)
    assert isinstance(caught.value, ValueError) and str(caught.value).isprintable()


@pytest.mark.parametrize("ids", [[5, 6, 7], (5, 6, 7), range(5, 8), [np.int32(5), 6, 7]])
def test_token_ids_are_a_prompt_in_any_sequence(tiny_model: Model, ids: Any) -> None:
    wanted = tiny_model.generate(np.array([5, 6, 7]), **SHORT)
    assert tiny_model.generate(ids, **SHORT) == wanted
    assert [chunk.text for chunk in tiny_model.stream(ids, **SHORT)]
    assert tiny_model.batch([ids], options=dash_onnx.GenerationOptions(**SHORT)) == [wanted]


@pytest.mark.parametrize(
    "options",
    [
        {"policy": 5},
        {"policy": ["int4"]},
        {"budget": []},
        {"budget": 10**400},
        {"device": []},
        {"sha256": 5},
        {"threads": True},
        {"threads": 0},
        {"threads": "2"},
        {"memory": []},
    ],
    ids=str,
)
def test_loading_with_a_value_that_nobody_can_mean_is_a_value_error(
    tiny_bundle: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(PolicyError):
        dash_onnx.load(tiny_bundle, **options)


@pytest.mark.parametrize("folder", ["x" * 300, "", 5, None, "a\0b", b"x"])
def test_a_folder_that_cannot_be_is_refused(folder: Any) -> None:
    with pytest.raises(dash_onnx.DashError) as caught:
        dash_onnx.load(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": True, "top_k": 1.5},
        {"do_sample": True, "temperature": 10**400},
        {"repetition_penalty": 10**400},
    ],
    ids=["top_k", "temperature", "penalty"],
)
def test_a_model_with_sampling_that_cannot_be_is_refused(
    tiny_bundle: Path, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    name = "generation_config.json"
    (bundle / name).write_text(json.dumps(sampling))
    data = json.loads((bundle / "dash.json").read_text("utf-8"))
    data["files"][name] = vars(file_facts(bundle / name))
    (bundle / "dash.json").write_text(json.dumps(data))
    with pytest.raises(dash_onnx.DashError, match=r"generation_config\.json: "):
        dash_onnx.load(bundle)


def test_an_answer_after_a_tool_needs_no_text_of_the_user(tiny_model: Model) -> None:
    call = {"type": "function", "function": {"name": "ships", "arguments": {}}}
    messages = [
        {"role": "user", "content": "how many?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": ""},
    ]
    assert tiny_model.text.render_chat([messages[0], {"role": "assistant", "content": ""}])
    template = "{% for one in messages %}{{ one.role }}: {{ one.content or '' }}|{% endfor %}"
    assert rendered(template, messages, {}, {}) == "user: how many?|assistant: |tool: |"


def test_what_a_bundle_says_moves_no_cursor(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    data = json.loads((bundle / "dash.json").read_text("utf-8"))
    data["model"]["name"] = "a\x1b[2Jb\u202ec\nd 小"
    data["costs"]["machine"] = data["export"]["source"] = "\x1b[2J"
    (bundle / "dash.json").write_text(json.dumps(data))
    assert main([str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "a\\x1b[2Jb\\u202ec\\nd 小" in shown and "\x1b" not in shown
    with dash_onnx.load(bundle) as model:
        assert repr(model).isprintable()


def test_a_completion_keeps_its_log_probabilities(tiny_model: Model) -> None:
    assert tiny_model.generate(PROMPT, **SHORT).logprobs == ()
    found = tiny_model.generate(PROMPT, logprobs=3, **SHORT)
    assert len(found.logprobs) == found.generated_tokens == 2
    assert all(len(one.top) == 3 and one.token <= 0 for one in found.logprobs)


def test_what_a_notebook_shows_is_short(tiny_model: Model) -> None:
    cache = tiny_model.new_cache()
    with tiny_model.stream(PROMPT, policy="int4", cache=cache, **SHORT) as stream:
        assert repr(stream) == "<Stream: int4>"
        chunk = next(stream)
        assert repr(chunk).startswith(f"<Chunk {chunk.text!r}: token {chunk.token}, ")
    assert repr(stream) == "<Stream: closed>"
    assert repr(cache) == f"<Cache: {len(cache)} tokens>"
