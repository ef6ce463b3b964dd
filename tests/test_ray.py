"""The server on Ray: replicas that die or are replaced lose no answer; a dataset goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import needed

from dash_onnx.runtime.model import Model

EXAMPLE = Path(__file__).parent.parent / "examples/ray_batch.py"
MESSAGES: Any = [{"role": "user", "content": "the keeper counts the ships"}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    module = needed("ray")
    module.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield module
    module.shutdown()


@pytest.fixture
def client(
    ray: Any, tiny_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[openai.OpenAI]:
    """Two replicas, as `serve run` deploys them, with the arguments of `request`."""
    from ray import serve

    arguments = getattr(request, "param", {})
    deploy(Path(shutil.copytree(tiny_bundle, tmp_path / "one" / "out")), **arguments)
    yield openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=3)
    serve.shutdown()


def deploy(bundle: Path, **arguments: Any) -> None:
    from ray import serve

    from dash_onnx.serve.ray import Arguments, app

    given = Arguments(bundles=str(bundle), replicas=2, threads=1, **arguments)
    serve.run(app(given), name="dash", route_prefix="/")


def replicas() -> list[int]:
    """Their process ids."""
    found = subprocess.run(["pgrep", "-f", "ServeReplica:dash"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_a_replica_whose_batch_has_died_is_unhealthy(tiny_bundle: Path) -> None:
    needed("ray")
    from dash_onnx.serve.ray import Arguments, _checked, replica

    class Ingress:
        app = replica(Arguments(bundles=str(tiny_bundle), threads=1))

    checked, pool = _checked(Ingress)(), Ingress.app.state.service.pool
    checked.check_health()
    next(iter(pool._served.values())).batch.close()
    with pytest.raises(RuntimeError, match="has died"):
        checked.check_health()
    pool.close()


def test_what_the_command_line_tells_are_texts(tiny_bundle: Path) -> None:
    needed("ray")
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from dash_onnx.serve.ray import app

    told = {"bundles": str(tiny_bundle), "replicas": "2", "threads": "1", "sessions": "true"}
    call_user_app_builder_with_args_if_necessary(app, told)  # as `serve run` calls it
    with pytest.raises(ValueError, match="replica"):
        call_user_app_builder_with_args_if_necessary(app, {**told, "replica": "2"})


class Asking:
    """Two clients that ask again and again, in threads."""

    def __init__(self, client: openai.OpenAI):
        self.client, self.texts, self.errors = client, [], []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                pieces = self.client.chat.completions.create(
                    model="out", messages=MESSAGES, max_tokens=12, stream=True
                )
                self.texts.append("".join(p.choices[0].delta.content or "" for p in pieces))
            except openai.OpenAIError as error:
                self.errors.append(error)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_killed_replica_and_a_new_bundle_lose_no_answer(
    client: openai.OpenAI, tiny_bundle: Path, tiny_model: Model, tmp_path: Path
) -> None:
    wanted = tiny_model.chat(MESSAGES, max_new_tokens=12)
    answer = client.chat.completions.create(model="out", messages=MESSAGES, max_tokens=12)
    assert answer.choices[0].message.content == wanted
    asking = Asking(client)
    time.sleep(2)
    before = replicas()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(set(replicas()) - {before[0]}) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    deploy(Path(shutil.copytree(tiny_bundle, tmp_path / "two" / "out")), budget=None)
    time.sleep(2)
    asking.stop()
    # Only an answer that had begun to stream when its replica died may be cut.
    assert len(asking.errors) <= 2
    assert len(asking.texts) > 20
    assert sum(text == wanted for text in asking.texts) >= len(asking.texts) - 2
    assert not set(replicas()) & set(before)


@pytest.mark.parametrize("client", [{"sessions": True}], indirect=True, ids=["sessions"])
def test_a_conversation_stays_with_its_replica(client: openai.OpenAI) -> None:
    answered: set[float] = set()
    for session in range(24):
        headers = {"x-session-id": f"conversation {session}"}
        before = answers_of(headers)
        for _ in range(2):
            client.chat.completions.create(
                model="out", messages=MESSAGES, max_tokens=2, extra_headers=headers
            )
        assert answers_of(headers) == before + 2
        answered.add(before + 2)
    assert max(answered) < 48  # both have answered some


def answers_of(headers: dict[str, str]) -> float:
    """How many the replica of a conversation has given."""
    text = httpx.get("http://127.0.0.1:8000/metrics", headers=headers).text
    found = re.search(r'^dash_requests_total\{outcome="done"\} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_dataset_goes_on_where_it_was_stopped(
    tiny_bundle: Path, tiny_model: Model, tmp_path: Path
) -> None:
    needed("ray")
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers"
    asked = {str(n): f"the keeper counts {n} ships" for n in range(320)}
    asked["160"] *= 100
    prompts.write_text("".join(f"{json.dumps({'id': i, 'prompt': p})}\n" for i, p in asked.items()))
    command = [sys.executable, str(EXAMPLE), str(tiny_bundle), str(prompts), str(answers)]
    command += ["--max-tokens", "8", "--threads", "1", "--processes", "2"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len([*answers.glob("*.jsonl")]) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    started.send_signal(signal.SIGKILL)
    started.wait()
    time.sleep(3)  # its workers end by themselves
    before = len([*answers.glob("*.jsonl")])
    assert before >= 5
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line for part in answers.glob("*.jsonl") for line in part.read_text().splitlines()]
    found = {line.pop("id"): line for line in map(json.loads, lines)}
    assert found.keys() == asked.keys()
    assert len(lines) == len(asked)  # none twice
    for name in ("0", "161", "319"):  # the second beside a prompt that is too long
        assert found[name] == {"text": tiny_model.chat(asked[name], max_new_tokens=8)}
    assert "context" in found["160"]["error"]
