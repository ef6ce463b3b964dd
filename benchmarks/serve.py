"""Throughput of a server for several clients, and stalls while long prompts arrive.

    python benchmarks/serve.py out/
    python benchmarks/serve.py out/ --peer model-q4_0.gguf --clients 1,8,16 --policy int4 --json
    python benchmarks/serve.py out/ --url http://127.0.0.1:8000   # `serve run`, or another server
    python benchmarks/serve.py out/ --without-drafts --clients 1,16 --long 0
    python benchmarks/serve.py out/ --prompts spec_bench.jsonl

Each server runs in its own process, and clients stream answers from it over HTTP; servers take
turns, since the speed of a machine varies over time. Two figures are measured: how many tokens per
second all clients get together, and how long running answers stall while long prompts arrive. The
peer is llama.cpp's `llama-server`, or a server already running at `--url`. Compile llama-server for
the machine: in an unpacked llama-cpp-python, run
`cmake -B build -DGGML_NATIVE=ON -DLLAMA_BUILD_SERVER=ON` in `vendor/llama.cpp`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

import dash_onnx
from dash_onnx.bench.prompts import read_prompts
from dash_onnx.runtime.options import GenerationOptions

PROMPTS: tuple[str, ...] = (
    "Write a letter from a lighthouse keeper to the captain of a ship that passed at night.",
    "Explain to a child, at length, why the sky is blue and why sunsets are red.",
    "Tell the story of a man who planted trees for thirty years in an empty valley.",
    "Describe in detail how a bicycle is repaired after a long journey.",
)
_LONG = "The keeper counts the ships that pass in the night, and writes their names down. "
_MAX_LONG = 4
_MIN_ANSWERS = 8  # per number of clients: how well an answer can be drafted varies


@dataclass
class Answer:
    """What one client saw.

    Attributes:
        sent: time of the request, by `time.perf_counter`.
        times: arrival times of the pieces of text, by `time.perf_counter`.
        tokens: tokens of the answer, as counted by the server.
        status: HTTP status.
    """

    sent: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    status: int = 0


@dataclass
class Server:
    """A running server.

    Attributes:
        url: its address.
        extra: additional fields of every request.
    """

    url: str
    extra: dict[str, Any] = field(default_factory=dict)

    async def ask(self, prompt: str, new_tokens: int) -> Answer:
        """Streams an answer."""
        body = {
            "messages": _messages(prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        content = json.dumps(body).encode()
        where = urlsplit(self.url)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\n"
        head += "Connection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        answer, loop = Answer(time.perf_counter()), asyncio.get_running_loop()
        address = where.hostname or "", where.port or 80
        transport, reply = await loop.create_connection(_Reply, *address)
        transport.write(head.encode() + content)
        await reply.ended
        answer.status = int(reply.reads[0][1].split()[1])
        if answer.status not in (200, 429):
            told = b"".join(data for _, data in reply.reads).decode("utf-8", "replace")
            raise SystemExit(f"{self.url} answered {answer.status}: {told[:500]}")
        for at, event in reply.events():
            if event.get("usage"):
                answer.tokens = event["usage"]["completion_tokens"]
            choices = event.get("choices") or [{}]
            if choices[0].get("delta", {}).get("content") is not None:
                answer.times.append(at)
        return answer


def main() -> None:
    """Prints a table for each server, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--peer", type=Path, metavar="FILE.gguf", help="for llama-server")
    parser.add_argument(
        "--llama-server", default="llama-server", metavar="PATH", help="(default: the one on PATH)"
    )
    parser.add_argument("--batch", action="store_true", help="measures Model.batch, too")
    parser.add_argument(
        "--without-drafts", action="store_true", help="measures a server that makes none, too"
    )
    parser.add_argument("--url", help="of a server that runs already, measured too")
    parser.add_argument("--model", help="how that server calls it")
    parser.add_argument("--clients", default="1,4,8", help="(default: 1,4,8)")
    parser.add_argument("--prompts", type=Path, help="JSON lines as of speculate.py")
    parser.add_argument("--budget", help="or --policy, of all requests")
    parser.add_argument("--policy")
    parser.add_argument("--max-tokens", type=int, default=96, help="(default: 96)")
    parser.add_argument("--rounds", type=int, default=2, help="of each number of clients, at least")
    parser.add_argument("--long", type=int, default=2000, help="tokens of a long prompt; 0: none")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    clients = [int(count) for count in arguments.clients.split(",")]
    threads = str(arguments.threads)
    command = [sys.executable, "-m", "dash_onnx", "serve", str(arguments.bundle), "--threads"]
    command += [threads, "--parallel", str(max(clients)), "--port", "PORT"]
    extra = {name: getattr(arguments, name) for name in ("budget", "policy")}
    extra = {name: value for name, value in extra.items() if value}
    extras, commands = {"dash-serve": extra}, {"dash-serve": command}
    if arguments.without_drafts:
        name = "dash-serve, no drafts"
        extras[name], commands[name] = {**extra, "speculate": False}, command
    if arguments.peer:
        found_at = shutil.which(arguments.llama_server)
        if found_at is None:
            parser.error(f"no {arguments.llama_server}: give --llama-server the path of one")
        llama = [found_at, "--model", str(arguments.peer), "--port", "PORT"]
        llama += ["--parallel", str(max(clients)), "--ctx-size", str(4096 * max(clients))]
        commands["llama.cpp"] = [*llama, "--threads", threads, "--threads-batch", threads]
    found: dict[str, Any] = {}
    if arguments.batch:
        found["Model.batch"] = {"tokens_per_s": _batch_rates(clients, arguments, extra)}
    with contextlib.ExitStack() as stack:
        asked = {
            name: Server(stack.enter_context(running(command)), extras.get(name, {}))
            for name, command in commands.items()
        }
        if arguments.url:
            model = {"model": arguments.model} if arguments.model else {}
            asked[arguments.url] = Server(arguments.url, model)
        found |= asyncio.run(_measured(asked, clients, arguments))
    if arguments.json:
        print(json.dumps(found))
        return
    for name, facts in found.items():
        print(name)
        for key, value in facts.items():
            print(f"  {key:24} {json.dumps(value)}")


def _batch_rates(
    clients: list[int], arguments: argparse.Namespace, extra: dict[str, Any]
) -> dict[str, float]:
    """Tokens per second for such prompts without a server, by how many run at once."""
    options = GenerationOptions(max_new_tokens=arguments.max_tokens, temperature=0, **extra)
    prompts, found = _prompts(arguments), {}
    with dash_onnx.load(arguments.bundle, threads=arguments.threads) as model:
        model.batch([_messages(PROMPTS[0])], options=options)
        for count in clients:
            tokens, started = 0, time.perf_counter()
            for _ in range(_rounds(count, arguments)):
                some = [_messages(next(prompts)) for _ in range(count)]
                done = model.batch(some, options=options, parallel=count)
                tokens += sum(one.generated_tokens for one in done)
            found[str(count)] = round(tokens / (time.perf_counter() - started), 2)
    return found


@contextlib.contextmanager
def running(argv: list[str]) -> Iterator[str]:
    """Yields a server's address once it responds."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    argv = [str(port) if part == "PORT" else part for part in argv]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(6000):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}: {argv}")
            time.sleep(0.1)
        else:
            raise SystemExit(f"the server does not answer: {argv}")
        yield url
    finally:
        process.terminate()
        process.wait(60)


async def _measured(
    servers: dict[str, Server], clients: list[int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Figures by server. Servers take turns, since the speed of a machine varies over time."""
    for server in servers.values():
        await server.ask(PROMPTS[0], arguments.max_tokens)
    prompts = _prompts(arguments)
    found: dict[str, Any] = {name: defaultdict(dict) for name in servers}
    for count in clients:
        answers: dict[str, list[Answer]] = {name: [] for name in servers}
        seconds = dict.fromkeys(servers, 0.0)
        for _ in range(_rounds(count, arguments)):
            some = [next(prompts) for _ in range(count)]
            for name, server in servers.items():
                started = time.perf_counter()
                each = (server.ask(prompt, arguments.max_tokens) for prompt in some)
                answers[name] += await asyncio.gather(*each)
                seconds[name] += time.perf_counter() - started
        for name, own in answers.items():
            rate = sum(answer.tokens for answer in own) / seconds[name]
            firsts = [1e3 * (answer.times[0] - answer.sent) for answer in own]
            found[name]["tokens_per_s"][str(count)] = round(rate, 2)
            found[name]["first_token_ms"][str(count)] = round(statistics.median(firsts), 1)
            found[name]["between_ms"][str(count)] = _quantiles(_gaps(own))
    some = [next(prompts) for _ in range(3)]
    for name, server in servers.items() if arguments.long else ():
        found[name]["while_long_prompts_arrive"] = await _stalled(server, some, arguments)
    return found


async def _stalled(
    server: Server, prompts: list[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measures stalls: answers run while long prompts arrive one after the other."""
    running = [
        asyncio.create_task(server.ask(prompt, 2 * arguments.max_tokens)) for prompt in prompts
    ]
    firsts: list[float] = []
    while not all(task.done() for task in running) and len(firsts) < _MAX_LONG:
        text = f"{time.time()} " + _LONG * (arguments.long // 18)  # no prefix that is held
        answer = await server.ask(text, 1)
        firsts.append(1e3 * (answer.times[0] - answer.sent))
    answers = await asyncio.gather(*running)
    return {
        **_quantiles(_gaps([*answers])),
        "long_first_token_ms": round(statistics.median(firsts)),
    }


class _Reply(asyncio.Protocol):
    """What a server sends, and when.

    It is parsed once everything has arrived: an httpx client takes 190 to 440 microseconds per
    token on the cores that the server runs on, this one 30 to 70.
    """

    def __init__(self) -> None:
        self.reads: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.reads.append((time.perf_counter(), data))

    def connection_lost(self, _: Exception | None) -> None:
        self.ended.set_result(None)

    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Each server-sent event, and when it was complete; each is in a single HTTP chunk."""
        held = b""
        for at, data in self.reads:
            *lines, held = (held + data).split(b"\n")
            yield from ((at, json.loads(line[6:])) for line in lines if line[:7] == b"data: {")


def _rounds(count: int, arguments: argparse.Namespace) -> int:
    return max(arguments.rounds, -(-_MIN_ANSWERS // count))


def _prompts(arguments: argparse.Namespace) -> Iterator[str]:
    """Yields prompts endlessly without repetition, since a server holds earlier ones."""
    texts = PROMPTS
    if arguments.prompts:
        texts = tuple(read_prompts(arguments.prompts))
    return (f"Letter {number}. {text}" for number, text in enumerate(itertools.cycle(texts)))


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _gaps(answers: list[Answer]) -> list[float]:
    return [1e3 * float(gap) for answer in answers for gap in np.diff(answer.times)]


def _quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 95, 99)}


if __name__ == "__main__":
    main()
