"""dash-serve: OpenAI's own client, hostile requests, load."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from cli_tool import Capture, Tool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount

import dash_onnx
from dash_onnx.cli.serve import _origin, main
from dash_onnx.core.errors import DashError, PolicyError
from dash_onnx.runtime.generate import Generation, Request
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.results import Chunk
from dash_onnx.runtime.sessions import Sessions
from dash_onnx.serve.answer import Choice
from dash_onnx.serve.app import create_app
from dash_onnx.serve.calls import CallReader
from dash_onnx.serve.limits import BusyError, Limits
from dash_onnx.serve.pool import ModelPool, Source, open_bundles
from dash_onnx.serve.server import Server as DrainingServer
from dash_onnx.serve.service import Job, Service, Tally, check_words

MESSAGES: list[Any] = [{"role": "user", "content": "the keeper counts the ships"}]
TOOL = Tool("dash-serve", main)
JSON_TYPE = {"content-type": "application/json; charset=utf-8"}
NO_END = {"type": "regex", "regex": "[a-z ]{10000}"}  # an answer that ends by its limit alone
OURS: dict[str, Any] = {"policy": "int8"}


class Server:
    """An app behind uvicorn, in a thread."""

    def __init__(
        self, models: Mapping[str, Model | Source], limits: Limits | None = None, **options: Any
    ):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        bundles = {
            name: Source.of_model(model) if isinstance(model, Model) else model
            for name, model in models.items()
        }
        self.app = create_app(bundles, limits, **options)
        self._server = DrainingServer(self.app)
        self._server.config.loop = "asyncio"  # not uvloop, where it is installed
        self._thread = threading.Thread(target=self._server.run, args=([self.socket],))
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def terminate(self) -> None:
        self._server.handle_exit(signal.SIGTERM, None)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self.join()

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def server(scored: Model, tiny_model: Model) -> Iterator[Server]:
    limits = Limits(parallel=2, max_tokens=200)
    with Server({"scored": scored, "tiny": tiny_model}, limits) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


# OpenAI's client


def test_an_answer_is_that_of_the_runtime(client: openai.OpenAI, tiny_model: Model) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=12, extra_body=OURS
    )
    text = tiny_model.chat(MESSAGES, policy="int8", max_new_tokens=12)
    choice = found.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert choice.finish_reason == ("stop" if text.finish_reason == "stop" else "length")
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(tiny_model.text.encode_chat(MESSAGES))
    assert found.usage.completion_tokens == text.generated_tokens
    ours = found.to_dict()["dash"]
    assert ours["policy"] == "int8" and ours["actions"] == {"int8": 1.0} and ours["cost"] > 0


def test_a_stream_has_the_same_text_and_the_path_of_each_token(client: openai.OpenAI) -> None:
    options: Any = {"model": "scored", "messages": MESSAGES, "max_tokens": 20}
    whole = client.chat.completions.create(**options).choices[0].message.content
    pieces = [
        *client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    ]
    *chunks, last = pieces
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert last.usage is not None and last.choices == []
    paths = [c.to_dict()["dash"]["path"] for c in chunks[1:-1]]
    assert len(paths) == last.usage.completion_tokens
    assert all(set(path) <= set("F84.") and len(path) == 4 for path in paths)


def test_text_is_continued(client: openai.OpenAI, tiny_model: Model) -> None:
    found = client.completions.create(
        model="tiny", prompt="the keeper", max_tokens=8, extra_body={"policy": "int4"}
    )
    assert found.choices[0].text == tiny_model.generate(
        "the keeper", policy="int4", max_new_tokens=8
    )


def test_several_choices_and_a_seed(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 1.5}
    first, again = (client.chat.completions.create(**options, n=3, seed=5) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]


@pytest.mark.usefixtures("slow")
def test_choices_run_together_on_one_run_of_the_prompt(tiny_model: Model) -> None:
    messages = [{"role": "user", "content": "the keeper counts the ships that pass " * 4}]
    options: Any = {"model": "tiny", "messages": messages, "max_tokens": 12, "n": 4}
    options["extra_body"] = {**OURS, "response_format": NO_END}
    with Server({"tiny": tiny_model}, Limits(parallel=2, waiting=1)) as running:
        pieces = [*running.client().chat.completions.create(**options, stream=True)]
        order = [piece.choices[0].index for piece in pieces if piece.choices]
        changes = sum(one != other for one, other in itertools.pairwise(order))
        assert {*order} == {0, 1, 2, 3}
        assert changes > 8  # two at a time, token by token: one after the other it would be three
        whole = running.client().chat.completions.create(**options)
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 48
        reused = metric(running, "dash_prompt_tokens_reused")
        assert reused >= 7 * (whole.usage.prompt_tokens - 8)
        details = whole.usage.prompt_tokens_details
        assert details is not None and details.cached_tokens is not None
        assert whole.usage.prompt_tokens - 8 <= details.cached_tokens < whole.usage.prompt_tokens


@pytest.mark.parametrize("running", [1, 2])
@pytest.mark.parametrize("speculate", [False, True])
def test_choices_wait_for_each_other_and_no_request_for_ever(
    running: int, speculate: bool, tiny_model: Model
) -> None:
    body = {
        "prompt": "the keeper",
        "max_tokens": 6,
        "n": 3,
        "speculate": speculate,
        "policy": "int8",
        **OURS,
    }
    with Server({"tiny": tiny_model}, Limits(parallel=running, waiting=4, seconds=20)) as server:

        def ask(_: int) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)

        with ThreadPoolExecutor(4) as pool:
            answers = [*pool.map(ask, range(4))]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert {len(answer.json()["choices"]) for answer in answers} == {3}
        assert metric(server, "dash_running") == metric(server, "dash_waiting") == 0


@pytest.mark.usefixtures("slow")
def test_a_client_that_leaves_ends_choices_that_wait(tiny_model: Model) -> None:
    body = {"prompt": "the keeper", "max_tokens": 200, "n": 4, "response_format": NO_END, **OURS}
    with Server({"tiny": tiny_model}, Limits(parallel=1, seconds=20)) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.5)
        begun = time.monotonic()
        while metric(server, "dash_running"):
            assert time.monotonic() - begun < 2  # of the sixteen that it would take
            time.sleep(0.05)


def test_a_choice_that_fails_ends_its_request(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "the keeper", "max_tokens": 30, "n": 3, "temperature": 1, "seed": 1}
    begun: list[int] = []
    request = Model.request

    def third_fails(self: Model, *given: Any, **more: Any) -> Request:
        begun.append(1)
        if len(begun) == 3:
            raise PolicyError("no such luck")
        return request(self, *given, **more)

    monkeypatch.setattr(Model, "request", third_fails)
    with Server({"tiny": tiny_model}, Limits(parallel=2)) as running:
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 400
        assert "no such luck" in answer.text
        assert metric(running, "dash_running") == 0
        body["n"] = 1
        assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 200


def test_budgets_and_drafts_are_ours(client: openai.OpenAI) -> None:
    def told(**body: Any) -> dict[str, Any]:
        return client.chat.completions.create(
            model="scored", messages=MESSAGES, max_tokens=30, extra_body=body
        ).to_dict()["dash"]

    assert told(budget="fast")["budget"] < told(budget="quality")["budget"]
    for speculate in (True, 2, 0):
        assert told(policy="int8", speculate=speculate)["actions"] == {"int8": 1.0}
    with pytest.raises(openai.BadRequestError, match=r"speculate=16 must be in 0\.\.15"):
        told(policy="int8", speculate=16)


@pytest.mark.parametrize("parts", [False, True])
def test_a_prediction_is_drafted_from_and_counted(parts: bool, client: openai.OpenAI) -> None:
    def told(prediction: Any) -> Any:
        return client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=60,
            temperature=0,
            prediction=prediction,
            extra_body=OURS,
        )

    alone = told(openai.NOT_GIVEN)
    assert alone.usage.completion_tokens_details is None
    text = alone.choices[0].message.content
    content = [{"type": "text", "text": text[:20]}, {"type": "text", "text": text[20:]}]
    found = told({"type": "content", "content": content if parts else text})
    assert found.choices[0].message.content == text
    assert found.usage.completion_tokens_details.accepted_prediction_tokens > 0
    wrong = told({"type": "content", "content": "no such words " * 5})
    assert wrong.choices[0].message.content == text
    assert wrong.usage.completion_tokens_details.accepted_prediction_tokens == 0


def test_null_stands_for_a_field_that_is_not_there(server: Server) -> None:
    names = (
        "n stream frequency_penalty presence_penalty response_format tools tool_choice logprobs "
        "top_logprobs stop seed policy budget speculate stream_options temperature top_p logit_bias"
    ).split()
    nothing = dict.fromkeys(names)
    body = {"model": "tiny", "messages": MESSAGES, "prompt": "the", "max_tokens": 2, **nothing}
    for route in ("chat/completions", "completions"):
        found = httpx.post(f"{server.url}/v1/{route}", json=body)
        assert found.status_code == 200, found.text
    form = {"type": "text", "json_schema": None, "regex": None}
    body |= {"response_format": form, "stream": True, "stream_options": {"include_usage": None}}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200


def test_a_bias_forces_a_token(client: openai.OpenAI) -> None:
    def told(bias: dict[str, int], **more: Any) -> list[str]:
        options: Any = {"model": "tiny", "prompt": "the", "max_tokens": 3, "logprobs": 0}
        made = client.completions.create(**options, logit_bias=bias, **more)
        assert made.choices[0].logprobs is not None
        return made.choices[0].logprobs.tokens or []

    usual = told({})
    forced = told({"70": 100})
    assert len(set(forced)) == 1
    assert forced[0] != usual[0]
    assert told({"70": 100}, temperature=1.0) == forced
    with pytest.raises(openai.BadRequestError, match="logit_bias: no token has the id 999999"):
        told({"5": 1, "999999": 1})
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        told({"70": 101})


def test_a_seed_may_be_any_integer(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 1.5}
    first, again = (
        [c.message.content for c in client.chat.completions.create(**options, seed=s, n=2).choices]
        for s in (-2, 2**63 - 2)
    )
    assert first == again
    random = {
        client.chat.completions.create(**options, seed=-1).choices[0].message.content
        for _ in range(8)
    }
    assert len(random) > 1  # as in llama.cpp and vLLM


@pytest.fixture
def two(tiny_bundle: Path, tmp_path: Path) -> Iterator[Server]:
    """Two bundles, and memory for one."""
    folders = [shutil.copytree(tiny_bundle, tmp_path / name) for name in ("one", "other")]
    with dash_onnx.load(tiny_bundle, policy="int8") as model:
        needed = model.bytes_to_load()
    limits = Limits(memory_bytes=needed * 3 // 2)
    with Server(open_bundles(folders, policy="int8"), limits) as running:
        yield running


def test_a_bundle_loads_when_it_is_asked_for_and_takes_the_place_of_an_idle_one(
    two: Server, tiny_model: Model
) -> None:
    client, options = two.client(), {"messages": MESSAGES, "max_tokens": 8}
    assert [model.id for model in client.models.list()] == ["one", "other"]
    assert metric(two, "dash_loaded_bundles ") == 0
    text = tiny_model.chat(MESSAGES, policy="int8", max_new_tokens=8)
    for name in ("one", "other", "other", "one"):
        found = client.chat.completions.create(model=name, **options)  # type: ignore[call-overload]
        assert found.choices[0].message.content == text
        assert metric(two, "dash_loaded_bundles ") == 1
    assert metric(two, "dash_prompt_tokens_reused ") > 0  # by a bundle that is unloaded again


def test_a_bundle_in_use_stays_loaded(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [shutil.copytree(tiny_bundle, tmp_path / name) for name in ("one", "other")]
    with dash_onnx.load(tiny_bundle, policy="int8") as model:
        needed = model.bytes_to_load()
    caplog.set_level("INFO", "dash_onnx.serve.pool")

    async def used() -> None:
        pool = ModelPool(open_bundles(folders, policy="int8"), Limits(memory_bytes=needed * 3 // 2))
        async with pool.using("one") as served:
            with pytest.raises(BusyError, match="in use"):
                async with pool.using("other"):
                    pass
            assert pool.loaded == 1 and served.loaded
        await asyncio.gather(*(hold(pool, "other") for _ in range(4)))
        assert pool.loaded == 1 and not served.loaded
        pool.close()
        assert pool.loaded == 0

    async def hold(pool: ModelPool, name: str) -> None:
        async with pool.using(name) as served:
            await asyncio.sleep(0.01)
            assert served.model.bytes_to_load() == 0

    asyncio.run(used())
    loads = [record for record in caplog.records if "<Model" in record.getMessage()]
    assert len(loads) == 2  # four who wait for one bundle load it once


def test_a_bundle_larger_than_the_memory_is_refused(tiny_bundle: Path) -> None:
    with Server(open_bundles([tiny_bundle]), Limits(memory_bytes=1000)) as running:
        with pytest.raises(openai.BadRequestError, match="more than"):  # a retry helps none
            running.client().completions.create(model=tiny_bundle.name, prompt="the", max_tokens=2)


def test_a_policy_that_memory_does_not_hold_is_refused(tiny_bundle: Path) -> None:
    with dash_onnx.load(tiny_bundle, policy="int8") as model:
        needed = model.bytes_to_load()
    limits = Limits(memory_bytes=needed * 5 // 4)
    with Server(open_bundles([tiny_bundle], policy="int8"), limits) as running:
        client, options = running.client(), {"model": "", "prompt": "the", "max_tokens": 2}
        assert client.completions.create(**options)  # type: ignore[call-overload]
        with pytest.raises(openai.BadRequestError, match="ask for another policy"):
            client.completions.create(**options, extra_body={"policy": "full"})  # type: ignore[call-overload]
        assert client.completions.create(**options)  # type: ignore[call-overload]


def test_answers_go_on_while_the_graphs_of_another_policy_load(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    session = Sessions._get

    def watched(sessions: Sessions, path: str, *rest: Any, **options: Any) -> Any:
        if path not in sessions.loaded:
            names.append(threading.current_thread().name)
        return session(sessions, path, *rest, **options)

    monkeypatch.setattr(Sessions, "_get", watched)
    with Server(open_bundles([tiny_bundle], policy="int8")) as running:
        for policy in ("int4", "full", "random:1"):
            body = {"prompt": "the", "max_tokens": 4, "policy": policy}
            assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 200
    assert names and "batch" not in names


def test_a_folder_that_keeps_nothing_is_told_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    limits = Limits(memory_bytes=1 << 30, prefix_folder=file)
    with Server(open_bundles([tiny_bundle]), limits) as running:
        found = httpx.post(f"{running.url}/v1/completions", json={"prompt": "the"})
        assert found.status_code == 503 and "choose another folder" in found.text


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token takes some 20 ms."""
    take = Generation.take

    def slowly(going: Generation, *arguments: Any) -> Any:
        found = take(going, *arguments)
        time.sleep(0.02 * len(found.tokens))
        return found

    monkeypatch.setattr(Generation, "take", slowly)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends_in_words(tiny_model: Model, stream: bool) -> None:
    body = {"prompt": "the keeper", "max_tokens": 200, "stream": stream}
    with Server({"tiny": tiny_model}, Limits(seconds=0.3)) as running:
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=30)
        assert "it took longer than 0.3 s" in answer.text
        assert metric(running, "dash_running ") == 0


def test_a_reader_that_is_too_slow_loses_its_place(tiny_model: Model) -> None:
    body = {"messages": MESSAGES, "max_tokens": 230, "stream": True, "logprobs": True}
    content = json.dumps({**body, "top_logprobs": 20, "response_format": NO_END}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}"
    head += "\r\nContent-Type: application/json\r\n\r\n"
    with Server({"tiny": tiny_model}, Limits(seconds=5, parallel=1)) as running:
        running.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(running.socket.getsockname())
            reader.sendall(head.encode() + content)
            assert reader.recv(12) == b"HTTP/1.1 200"  # it streams; nobody reads on
            deadline = time.monotonic() + 30
            name = 'dash_requests_total{outcome="timeout"}'
            assert not metric(running, name)
            while not metric(running, name) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert metric(running, name) == 1
            assert metric(running, "dash_running ") == 0


@pytest.mark.usefixtures("slow")
def test_a_server_that_ends_says_so_and_finishes_its_answers(tiny_model: Model) -> None:
    running = Server({"tiny": tiny_model})
    body = {"messages": MESSAGES, "max_tokens": 200, "stream": True, "response_format": NO_END}
    url = f"{running.url}/v1/chat/completions"
    try:
        with httpx.stream("POST", url, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.terminate()
            assert httpx.get(f"{running.url}/ready").status_code == 503
            refused = httpx.post(url, json=body)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            rest = [line for line in lines if line]
        assert len(rest) > 200 and rest[-1] == "data: [DONE]"
    finally:
        running.join()


@pytest.mark.usefixtures("slow")
def test_a_handler_that_is_cancelled_leaves_nothing_running(tiny_model: Model) -> None:
    async def stays() -> None:
        await asyncio.Event().wait()

    async def cancelled(speculate: Any) -> None:
        service = Service({"tiny": Source.of_model(tiny_model)}, Limits(parallel=1))
        prompt = tiny_model.text.encode("the keeper")
        options = GenerationOptions(policy="int8", max_new_tokens=200, speculate=speculate)
        chunks = service.generate(Job("tiny", [prompt], options, [Tally(), Tally()]), stays())
        await anext(chunks)
        assert service.metrics.running._value.get() == 1
        task = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert service.metrics.running._value.get() == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await asyncio.to_thread(service.pool.close)

    for speculate in (None, False):
        asyncio.run(cancelled(speculate))


@pytest.mark.usefixtures("slow")
def test_all_choices_of_a_request_share_its_time(tiny_model: Model) -> None:
    body = {"prompt": "the keeper", "max_tokens": 12, "n": 3}
    with Server({"tiny": tiny_model}, Limits(parallel=1, seconds=0.4)) as running:
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 504


@pytest.mark.usefixtures("slow")
def test_a_client_that_leaves_the_queue_gives_up_its_place(tiny_model: Model) -> None:
    body = {"prompt": "the keeper", "max_tokens": 200, "stream": True}
    with Server({"tiny": tiny_model}, Limits(parallel=1, waiting=1)) as running:
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as first:
            lines = first.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout):  # waits, and leaves
                httpx.post(f"{running.url}/v1/completions", json=body, timeout=0.2)
            deadline = time.monotonic() + 2
            while metric(running, "dash_waiting ") and time.monotonic() < deadline:
                time.sleep(0.05)
            assert metric(running, "dash_waiting ") == 0


def test_json_that_names_no_tool_is_text() -> None:
    tool = {"type": "function", "function": {"name": "find"}}
    for text in ('{"name": ["find"]}', '{"name": {"find": 1}}', '["find"]'):
        reader = CallReader([tool])
        assert reader.add(text) + reader.finish()[0] == text and reader.finish()[1] == []
    reader = CallReader([tool])
    assert reader.add("a set is ") + reader.add("{1, 2}") == "a set is {1, 2}"


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["scored", "tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize(
    ("wrong", "status", "word"),
    [
        ({"model": "none"}, openai.NotFoundError, "available: scored, tiny"),
        ({"messages": []}, openai.BadRequestError, "no message"),
        ({"messages": [{"role": "king", "content": "x"}]}, openai.BadRequestError, "role"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"presence_penalty": 101}, openai.BadRequestError, "presence_penalty"),
        ({"extra_body": {"max_new_tokens": 9}}, openai.BadRequestError, "use max_tokens"),
        (
            {"extra_body": {"enable_thinking": False}},
            openai.BadRequestError,
            "use chat_template_kwargs",
        ),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "at most 16 strings"),
        ({"stop": "x" * 1001}, openai.BadRequestError, "at most 16 strings"),
        ({"extra_body": {"budget": "cheap"}}, openai.BadRequestError, "budget"),
        ({"extra_body": {"policy": "magic"}}, openai.BadRequestError, "policy"),
        ({"extra_body": {"policy": "static:@/etc/passwd"}}, openai.BadRequestError, "a file"),
        ({"messages": [{"role": "user", "content": "x " * 2000}]}, openai.BadRequestError, "256"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_refused_with_a_reason(
    wrong: dict[str, Any], status: type[Exception], word: str, stream: bool, client: openai.OpenAI
) -> None:
    options: Any = {"model": "scored", "messages": MESSAGES, "stream": stream, **wrong}
    with pytest.raises(status, match=word):
        client.chat.completions.create(**options)


def test_a_field_that_is_wrong_is_named(client: openai.OpenAI) -> None:
    options: Any = {"model": "scored", "messages": MESSAGES, "top_p": "much"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options)
    assert caught.value.param == "top_p"


def test_control_tokens_in_a_message_are_refused(client: openai.OpenAI, scored: Model) -> None:
    added = scored.text.tokenizer.get_added_tokens_decoder().values()
    word = next(token.content for token in added if token.special)
    with pytest.raises(openai.BadRequestError, match="control token"):
        client.chat.completions.create(
            model="scored", messages=[{"role": "user", "content": f"x{word}system"}]
        )


def test_control_tokens_in_the_arguments_of_a_call_are_refused(
    client: openai.OpenAI, scored: Model
) -> None:
    """However often they are written as JSON in JSON; and what was sent once may come back."""
    word = next(iter(scored.text.control)).replace("<", "\\u003c")
    answered = {"role": "tool", "tool_call_id": "1", "content": "7"}

    def ask(arguments: str) -> Any:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        called = {"role": "assistant", "content": None, "tool_calls": [call]}
        talk: Any = [*MESSAGES, called, answered]
        return client.chat.completions.create(model="scored", messages=talk, max_tokens=2)

    for arguments in (f'{{"q": "{word}"}}', json.dumps(f'{{"q": "{word}"}}')):
        try:
            ask(arguments)
        except openai.BadRequestError as error:
            assert "control token" in str(error)
        else:
            assert arguments.startswith('"')  # text with a backslash, which stays what it is
    assert ask('"Paris"').choices


def test_messages_are_searched_while_other_requests_are_served(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def watched(*given: Any) -> None:
        threads.append(threading.current_thread())
        check_words(*given)

    monkeypatch.setattr("dash_onnx.serve.app.check_words", watched)
    with Server({"tiny": tiny_model}) as running:
        body = {"messages": MESSAGES, "max_tokens": 1}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body).status_code == 200
        assert threads and running._thread not in threads


# Load


@pytest.mark.usefixtures("slow")
def test_a_client_that_goes_away_frees_its_place(server: Server, client: openai.OpenAI) -> None:
    for _ in range(4):  # more than run at once
        with client.completions.create(
            model="tiny",
            prompt="the keeper",
            stream=True,
            max_tokens=200,
            extra_body={"response_format": NO_END, **OURS},
        ) as stream:
            next(iter(stream))
    deadline = time.monotonic() + 2  # of the four seconds that each would take
    while metric(server, "dash_running ") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(server, "dash_running ") == 0
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)


def test_answers_at_once_are_those_alone(client: openai.OpenAI, tiny_model: Model) -> None:
    def ask(number: int) -> str | None:
        messages: Any = [{"role": "user", "content": f"the keeper counts {number} ships"}]
        found = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, extra_body=OURS
        )
        return found.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        together = [*pool.map(ask, range(16))]
    for number, text in enumerate(together):
        messages = [{"role": "user", "content": f"the keeper counts {number} ships"}]
        assert text == tiny_model.chat(messages, policy="int8", max_new_tokens=12)


def test_a_greedy_answer_is_the_same_alone_and_among_seven_others(
    tiny_model: Model, scored: Model
) -> None:
    with Server({"tiny": tiny_model, "scored": scored}, Limits(parallel=8)) as running:
        client = running.client()

        def ask(model: str, number: int, ours: dict[str, Any]) -> list[str]:
            """The tokens, streamed, so that all answers are under way at once."""
            messages: Any = [{"role": "user", "content": f"the keeper counts {number} ships"}]
            pieces = client.chat.completions.create(
                model=model, messages=messages, max_tokens=40, stream=True, extra_body=ours
            )
            return [piece.choices[0].delta.content or "" for piece in pieces]

        for model, ours in (
            ("tiny", {"policy": "int8"}),
            ("scored", {"budget": "balanced"}),
            ("scored", {"policy": "static:full,int8,skip,int4"}),
        ):
            alone = [ask(model, number, ours) for number in range(8)]
            with ThreadPoolExecutor(8) as pool:
                together = [*pool.map(lambda n: ask(model, n, ours), range(100, 108))]  # noqa: B023
                again = [*pool.map(lambda n: ask(model, n, ours), range(8))]  # noqa: B023
            assert again == alone and together != alone


@pytest.mark.usefixtures("slow")
def test_the_event_loop_wakes_once_for_the_tokens_of_a_step(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, tokens, woken = 4, 30, [0]
    call = asyncio.BaseEventLoop.call_soon_threadsafe

    def counted(loop: asyncio.BaseEventLoop, *given: Any, **options: Any) -> asyncio.Handle:
        woken[0] += threading.current_thread().name == "batch"
        return call(loop, *given, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", counted)
    body = {"prompt": "the keeper", "max_tokens": tokens, "response_format": NO_END, **OURS}
    with Server({"tiny": tiny_model}, Limits(parallel=rows)) as running:
        with ThreadPoolExecutor(rows) as pool:
            found = pool.map(
                lambda _: httpx.post(f"{running.url}/v1/completions", json=body, timeout=30),
                range(rows),
            )
            assert [answer.json()["usage"]["completion_tokens"] for answer in found] == [30] * 4
    assert tokens <= woken[0] < 2 * tokens  # alone each of them would wake it 30 times


def test_a_full_queue_refuses_and_says_when_to_come_back(tiny_model: Model) -> None:
    with Server({"tiny": tiny_model}, Limits(parallel=1, waiting=1)) as server:
        body = {"messages": MESSAGES, "max_tokens": 200}

        def ask(_: int) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)

        with ThreadPoolExecutor(16) as pool:
            found = [*pool.map(ask, range(32))]
    assert {response.status_code for response in found} == {200, 429}
    refused = next(response for response in found if response.status_code == 429)
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "busy"


# Keys, bodies, pages


def test_a_key_is_needed_where_one_is_set(tiny_model: Model) -> None:
    with Server({"tiny": tiny_model}, key="sesame") as server:
        with pytest.raises(openai.AuthenticationError):
            server.client("other").models.list()
        assert [model.id for model in server.client("sesame").models.list()] == ["tiny"]
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"[]", 400),
        (b'{"messages": "hi"}', 400),
        (b'{"messages": [5]}', 400),
        (b'{"messages": [{"role": "user", "content": "hi"}], "metadata": {"a": 1e400}}', 400),
        (b'{"messages": [{"role": "user", "content": "hi"}], "metadata": {"a": "\\ud800"}}', 400),
        (
            b'{"messages": [{"role": "user", "content": "hi"}], "metadata": {"a": "\xed\xa0\x80"}}',
            400,
        ),
        (b'{"messages": [{"role": "user", "content": "hi"}], "top_p": NaN}', 400),
        (b"\xff\xfe", 400),
        (b'"' + b"x" * (5 << 20) + b'"', 413),
    ],
)
def test_bodies_of_another_form_are_refused(body: bytes, status: int, server: Server) -> None:
    found = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=JSON_TYPE)
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in found.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    "model messages prompt stream n max_tokens temperature top_p stop seed policy budget speculate "
    "top_k min_p repetition_penalty response_format stream_options tools tool_choice logprobs "
    "top_logprobs max_completion_tokens prediction".split()
)
LONG = int(os.environ.get("FUZZ_CASES", "2000"))


@pytest.mark.parametrize(
    "cases", [150, pytest.param(LONG, marks=pytest.mark.slow)], ids=["quick", "long"]
)
def test_no_request_is_an_error_of_the_server(server: Server, cases: int) -> None:
    usual = {"model": "tiny", "messages": MESSAGES, "prompt": "x", "max_tokens": 2}

    @given(
        st.dictionaries(FIELDS, JSON, max_size=4),
        st.sampled_from(["chat/completions", "completions"]),
    )
    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck))
    def ask(body: dict[str, Any], route: str) -> None:
        content = json.dumps({**usual, **body}).encode("utf-8", "surrogatepass")
        found = http.post(f"{server.url}/v1/{route}", content=content, headers=JSON_TYPE)
        assert found.status_code in (200, 400, 404, 413), found.text

    with httpx.Client(timeout=30) as http:
        ask()


def test_a_key_of_any_letters_is_told_from_others(tiny_model: Model) -> None:
    with Server({"tiny": tiny_model}, key="s\u00e9same") as running:
        for key, status in (("s\u00e9same", 200), ("sesame", 401), ("s\u00e8same", 401)):
            headers = {"authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == status


def test_a_page_whose_name_leads_here_gets_nothing(tiny_model: Model) -> None:
    body = {"prompt": "the", "max_tokens": 1}
    with Server({"tiny": tiny_model}, only_here=True) as running:
        port = running.url.rpartition(":")[2]
        for host, status in (
            (f"127.0.0.1:{port}", 200),
            (f"localhost:{port}", 200),
            ("app.localhost", 200),
            ("LOCALHOST.", 200),
            ("[::1]:80", 200),
            ("192.168.0.7", 200),  # an address: no name that can be made to lead elsewhere
            (f"evil.example:{port}", 403),
            ("localhost.evil.example", 403),
            ("[", 403),
        ):
            given = {"headers": {"host": host}}
            assert httpx.get(f"{running.url}/v1/models", **given).status_code == status, host
            found = httpx.post(f"{running.url}/v1/completions", json=body, **given)
            assert found.status_code == status, host


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_web_page_may_send_unasked_is_refused(kind: str, server: Server) -> None:
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 1})
    found = httpx.post(
        f"{server.url}/v1/chat/completions", content=body, headers={"content-type": kind}
    )
    assert found.status_code == 415 and "application/json" in found.json()["error"]["message"]


def test_web_pages_of_other_origins_are_let_in_only_where_told(
    tiny_model: Model, server: Server
) -> None:
    with Server({"tiny": tiny_model}, origins=("https://app.example",)) as running:
        for url, origin, allowed in (
            (running.url, "https://app.example", "https://app.example"),
            (running.url, "https://else.example", None),
            (server.url, "https://app.example", None),
        ):
            headers = {"origin": origin, "access-control-request-method": "POST"}
            found = httpx.options(f"{url}/v1/chat/completions", headers=headers)
            assert found.headers.get("access-control-allow-origin") == allowed


def test_what_is_no_exception_ends_a_request_all_the_same(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a panic of a library in Rust."""

    class Panic(BaseException):
        pass

    def fail(*_: object, **__: object) -> None:
        raise Panic("out of bounds")

    monkeypatch.setattr(Model, "request", fail)
    body = {"model": "tiny", "prompt": "the keeper"}
    found = httpx.post(f"{server.url}/v1/completions", json=body, timeout=10)
    assert found.status_code == 500


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("https://App.example/", "https://app.example"), ("*", "*"), ("null", "null")],
)
def test_an_origin_is_taken_as_browsers_send_it(given: str, wanted: str) -> None:
    assert _origin(given) == wanted
    with pytest.raises(DashError, match="write it as https"):
        _origin("app.example")


def test_headers_have_a_limit(server: Server) -> None:
    try:
        found = httpx.get(f"{server.url}/health", headers={"x-long": "x" * (1 << 20)})
        assert found.status_code == 400
    except httpx.TransportError:  # the server has closed before it was all sent
        pass
    assert httpx.get(f"{server.url}/health", headers={"x-long": "x" * 4000}).status_code == 200


def test_a_wrong_method_is_told_the_right_one(server: Server) -> None:
    found = httpx.get(f"{server.url}/v1/chat/completions")
    assert found.status_code == 405 and found.headers["allow"] == "POST"
    assert found.json()["error"]["code"] == "method_not_allowed"


# Defects, and what is counted


@pytest.mark.parametrize("stream", [False, True])
def test_a_defect_is_told_and_logged_with_the_id_of_its_request(
    stream: bool, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(choice: Choice, chunk: Chunk) -> Any:
        if chunk.generated_tokens == 3:
            raise RuntimeError("a defect")
        return "x", None

    monkeypatch.setattr(Choice, "add", broken)
    before = metric(server, 'dash_requests_total{outcome="error"}')
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "stream": stream}
    caplog.set_level("INFO", "dash_onnx.serve.app")
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    name = found.headers["x-request-id"]
    last = found.text.strip().rpartition("data: ")[2]
    error = json.loads(last)["error"]
    assert found.status_code == (200 if stream else 500)
    assert error["code"] == "internal_error" and name in error["message"]

    def logged() -> list[dict[str, Any]]:
        facts = [getattr(record, "facts", {}) for record in caplog.records]
        return [one for one in facts if one.get("outcome") == "error"]

    deadline = time.monotonic() + 5  # a stream is logged once the client has it
    while not logged() and time.monotonic() < deadline:
        time.sleep(0.01)
    (told,) = logged()
    assert told["request"] == name and told["status"] == found.status_code
    (traced,) = [record for record in caplog.records if record.exc_info]
    assert name in traced.getMessage()
    assert metric(server, 'dash_requests_total{outcome="error"}') == before + 1
    assert not metric(server, "dash_running ")


def test_every_request_is_counted_once(server: Server, tiny_model: Model) -> None:
    names = ('dash_requests_total{outcome="refused"}', "dash_first_token_seconds_count ")
    names += ('dash_tokens_total{kind="prompt"}', 'dash_requests_total{outcome="done"}')
    before = [metric(server, name) for name in names]
    url = f"{server.url}/v1/chat/completions"
    for body in ({"model": "none"}, {"n": 0}, {"messages": 1}):
        httpx.post(url, json={"messages": MESSAGES, **body})
    httpx.post(url, content=b'"' + b"x" * (5 << 20) + b'"', headers=JSON_TYPE)
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "n": 3}
    assert len(httpx.post(url, json=body).json()["choices"]) == 3
    after = [metric(server, name) for name in names]
    prompt = len(tiny_model.text.encode_chat(MESSAGES))
    assert [new - old for new, old in zip(after, before, strict=True)] == [4, 1, prompt, 1]
    assert metric(server, "process_resident_memory_bytes ") > 0


def test_a_batch_that_has_died_is_no_health(tiny_model: Model) -> None:
    with Server({"tiny": tiny_model}) as running:
        (served,) = running.app.state.service.pool._served.values()
        served.batch.close()
        assert httpx.get(f"{running.url}/health").status_code == 503


def test_the_page_and_unknown_paths(server: Server) -> None:
    page = httpx.get(server.url)
    assert page.status_code == 200 and "<title>dash-onnx</title>" in page.text
    assert "http://" not in page.text and "https://" not in page.text  # nothing from elsewhere
    for path in ("/v1/none", "/../dash.json", "/v1/models/none"):
        found = httpx.get(f"{server.url}{path}")
        assert found.status_code == 404 and found.json()["error"]["code"]
    assert httpx.get(f"{server.url}/ready").json() == {"ready": True}
    assert len(httpx.get(f"{server.url}/health").headers["x-request-id"]) == 16


# The command


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("nowhere", "--port", "0"), "no bundle"),
        (("out", "--host", "0.0.0.0"), "--api-key-file"),
        (("out", "--port", "70000"), "70000 is not in 0..65535"),
        (("out", "--parallel", "300"), "--parallel 300 is not in 1..256"),
        (("out", "else/out"), "two bundles are called"),
        (("out", "--api-key-file", "none.txt"), "none.txt"),
        (("out", "--port", "0", "--sha256", "ab", "--sha256", "cd"), "a checksum for each bundle"),
    ],
)
def test_a_server_that_cannot_be_is_refused(
    arguments: tuple[str, ...], word: str, capsys: Capture
) -> None:
    assert word in TOOL.refused(capsys, *arguments)


def test_a_bundle_of_another_checksum_is_refused(tiny_bundle: Path, capsys: Capture) -> None:
    given = (str(tiny_bundle), "--port", "0", "--sha256", "0" * 64)
    assert "SHA-256" in TOOL.refused(capsys, *given)


@pytest.mark.parametrize("options", [(), ("--log-json",)], ids=["lines", "json"])
def test_the_command_serves_and_ends_with_sigterm(
    tiny_bundle: Path, options: tuple[str, ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dash_onnx", "serve", str(tiny_bundle), "--port", str(port)]
    command += options
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                assert httpx.get(f"{url}/ready").json() == {"ready": True}
                break
            except httpx.TransportError:
                time.sleep(0.1)
        else:
            raise AssertionError("did not start")
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(b"no HTTP\r\n\r\n")
            assert other.recv(100).startswith(b"HTTP/1.1 400")
        running.terminate()
        assert running.wait(30) == 0
        assert running.stderr is not None
        told = running.stderr.read()
        assert "Traceback" not in told and "interrupted" not in told
        assert "Invalid HTTP request" not in told
        if options:
            lines = [json.loads(line) for line in told.splitlines()]
            (ready,) = [line for line in lines if line.get("status") == 200]
            assert ready["path"] == "/ready" and len(ready["request"]) == 16


@pytest.mark.slow
def test_a_real_model_answers_alike_alone_and_among_others(trained_bundle: Path) -> None:
    """But where two tokens were nearly as likely: several rows run in other kernels than one."""
    # The wide form is more exact than INT4: with it the answers differ by what that loses.
    with Server(open_bundles([trained_bundle], budget="balanced", memory="low")) as running:
        client = running.client()

        def ask(number: int) -> list[Any]:
            messages: Any = [{"role": "user", "content": f"Write about {number} ships at sea."}]
            found = client.chat.completions.create(
                model="",
                messages=messages,
                max_tokens=64,
                temperature=0,
                logprobs=True,
                top_logprobs=2,
            )
            logprobs = found.choices[0].logprobs
            assert logprobs is not None
            return logprobs.content or []

        alone = [ask(number) for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            together = [*pool.map(ask, range(8))]
    gaps, moved = [], []
    for one, other in zip(alone, together, strict=True):
        for mine, its in zip(one, other, strict=False):
            first, second = mine.top_logprobs
            moved.append(abs(first.logprob - its.top_logprobs[0].logprob))
            if mine.token != its.token:  # what follows has another text before it
                gaps.append(first.logprob - second.logprob)
                break
    print(f"{len(gaps)} of 8 answers turned at a near-tie: {gaps}")
    print(f"the likeliest token's logprob moved by {np.mean(moved):.3f} on average")
    # Rows of INT8 alone move by 0.026 (gaps of 0.19), of INT4 by 0.031; a row that read another
    # one's K/V would move by nats.
    assert np.mean(moved) < 0.08 and max(gaps, default=0) < 0.5


def test_an_app_may_serve_its_model_below_a_path(tiny_model: Model) -> None:
    chat = create_app({"tiny": Source.of_model(tiny_model)})
    app = Starlette(routes=[Mount("/llm", chat)])

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            body = {"prompt": "the keeper", "max_tokens": 2}
            return await http.post("/llm/v1/completions", json=body)

    try:
        answer = asyncio.run(asked())
        assert answer.json()["usage"]["completion_tokens"] == 2
    finally:
        chat.state.service.pool.close()
    assert tiny_model.generate("the keeper", max_new_tokens=2)  # it stays loaded


def test_a_path_that_does_not_exist_says_what_to_change(server: Server) -> None:
    for path in ("/chat/completions", "/v1/embeddings"):
        found = httpx.post(f"{server.url}{path}", json={})
        assert found.status_code == 404 and "/v1" in found.json()["error"]["message"]


def test_a_begun_answer_is_continued(client: openai.OpenAI, tiny_model: Model) -> None:
    begun: Any = [*MESSAGES, {"role": "assistant", "content": "the ships"}]
    options: Any = {"max_tokens": 6, "extra_body": {"policy": "full", "speculate": False}}
    answer = client.chat.completions.create(model="tiny", messages=begun, **options)
    text = tiny_model.text.render_chat(begun)
    assert text.endswith("the ships")
    ids = tiny_model.text.encode(text, add_special_tokens=False)
    wanted = tiny_model.generate(ids, policy="full", speculate=False, max_new_tokens=6)
    assert answer.choices[0].message.content == wanted
    assert tiny_model.chat(begun, policy="full", speculate=False, max_new_tokens=6) == wanted


def test_penalties_change_an_answer_and_other_names_of_a_limit_may_stand_beside_it(
    client: openai.OpenAI,
) -> None:
    def ask(**given: Any) -> str:
        options: Any = {"model": "tiny", "prompt": "the keeper", "max_tokens": 30, **given}
        return client.completions.create(**options).choices[0].text

    usual = ask()
    assert ask(extra_body={"n_predict": 5, "num_predict": 5}) == usual
    assert ask(presence_penalty=2.0) != usual
