"""Keeps a server under mixed load and looks for leaks: memory, sequences, requests.

    python benchmarks/load.py out/ --requests 10000
    python benchmarks/load.py out/ --minutes 120 --json

Clients chat, send long prompts and some that are too long, ask for schemas and tools, disconnect
midway, read slowly, send bodies that are not JSON or request the impossible. Every well-formed
request must be answered or refused with a reason, and at the end no sequence may run and no request
may wait. Memory is that of the server process, after each tenth of the requests: in the second half
it may grow by at most 2 %. Then the server is killed while it answers, and another one must find
the prompts that it saved.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

_TEXT = "The keeper counts the ships that pass in the night, and writes their names down. "
_GROWTH = 1.02
_SCHEMA = {
    "type": "object",
    "properties": {"ships": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ships"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "count", "parameters": _SCHEMA}}
_BROKEN = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"messages": 3}',
    b'{"messages": [{"role": "king", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": "x"}], "model": "none"}',
    b'{"messages": [{"role": "user", "content": "x"}], "budget": "cheap"}',
    b'{"messages": [' + b"[" * 100_000,
)


def main() -> None:
    """Prints the outcome of the requests, and fails if something leaked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--minutes", type=float, help="in place of a number of requests")
    parser.add_argument("--clients", type=int, default=12, help="at once (default: 12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dash_onnx", "serve", str(arguments.bundle)]
        command += ["--port", str(port), "--waiting", "8", "--log-level", "warning"]
        command += ["--prefix-mb", "64", "--prefix-cache", folder]
        facts = asyncio.run(_facts(command, f"http://127.0.0.1:{port}", arguments))
    print(json.dumps(facts) if arguments.json else json.dumps(facts, indent=1))
    lost = [name for name in facts["outcomes"] if ": lost" in name or ": status 50" in name]
    if lost or facts["left_running"] or facts["left_waiting"] or facts["exit_code"]:
        raise SystemExit("something was lost or is left over, or the server did not end well")
    half, last = facts["resident_mb"][len(facts["resident_mb"]) // 2], facts["resident_mb"][-1]
    if last > _GROWTH * half:
        raise SystemExit(f"memory grew from {half} MB after half of the requests to {last}")
    if not facts["reused_after_kill"]:
        raise SystemExit("no prompt that was kept was found after a kill")


async def _facts(command: list[str], url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    limits, rng = httpx.Limits(max_connections=1000), random.Random(arguments.seed)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        with subprocess.Popen(command) as server:
            facts = await _loaded(http, rng, server.pid, arguments)
            asking = [
                asyncio.create_task(_outcome(http, _long, rng)) for _ in range(arguments.clients)
            ]
            await asyncio.sleep(1)
            server.kill()
            await asyncio.gather(*asking)
        with subprocess.Popen(command) as server:
            await _up(http)
            facts["outcomes"][f"after a kill: {await _outcome(http, _long, rng)}"] = 1
            facts["reused_after_kill"] = (await _metrics(http))["dash_prompt_tokens_reused"]
            server.terminate()
    return {**facts, "exit_code": server.returncode}


async def _up(http: httpx.AsyncClient) -> None:
    for _ in range(600):
        try:
            await http.get("/health")
            return
        except httpx.TransportError:
            await asyncio.sleep(0.1)


async def _metrics(http: httpx.AsyncClient) -> dict[str, float]:
    lines = (await http.get("/metrics")).text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}


async def _loaded(
    http: httpx.AsyncClient, rng: random.Random, pid: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    outcomes, resident = Counter[str](), list[int]()
    await _up(http)
    started, sent = time.monotonic(), 0

    def left() -> float:
        """Share of the work that remains."""
        if arguments.minutes:
            return 1 - (time.monotonic() - started) / (60 * arguments.minutes)
        return 1 - sent / arguments.requests

    async def client() -> None:
        nonlocal sent
        while left() > 0:
            sent += 1
            kind = rng.choices([*KINDS], [weight for _, weight in KINDS.values()])[0]
            outcome = await _outcome(http, KINDS[kind][0], rng)
            outcomes[f"{kind}: {outcome}"] += 1
            if left() < 0.9 - len(resident) / 10:
                resident.append(_resident(pid))

    await asyncio.gather(*(client() for _ in range(arguments.clients)))
    await asyncio.sleep(2)
    values = await _metrics(http)
    return {
        "requests": sent,
        "seconds": round(time.monotonic() - started, 1),
        "outcomes": dict(sorted(outcomes.items())),
        "left_running": values["dash_running"],
        "left_waiting": values["dash_waiting"],
        "resident_mb": [round(size / 1e6, 1) for size in resident],
    }


async def _outcome(http: httpx.AsyncClient, kind: Any, rng: random.Random) -> str:
    try:
        return str(await kind(http, rng))
    except httpx.HTTPError as error:
        return f"lost ({type(error).__name__})"


def _body(rng: random.Random, **more: Any) -> dict[str, Any]:
    text = f"{rng.choice(['Why', 'How', 'When'])} does the keeper count {rng.randrange(20)} ships?"
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": rng.choice([1, 8, 24]),
        "temperature": rng.choice([0, 1.0]),
        **more,
    }


async def _post(http: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    return await http.post("/v1/chat/completions", json=body)


async def _chat(http: httpx.AsyncClient, rng: random.Random) -> str:
    budget = rng.choice([{}, {"budget": "fast"}, {"policy": "int8"}, {"policy": "int4"}])
    response = await _post(http, _body(rng, n=rng.choice([1, 1, 2]), **budget))
    return _told(response)


async def _long(http: httpx.AsyncClient, rng: random.Random) -> str:
    text = _TEXT * rng.randrange(10, 60)
    return _told(await _post(http, _body(rng, messages=[{"role": "user", "content": text}])))


async def _too_long(http: httpx.AsyncClient, rng: random.Random) -> str:
    text = _TEXT * 3000  # some 50,000 tokens
    response = await _post(http, _body(rng, messages=[{"role": "user", "content": text}]))
    return "refused" if response.status_code == 400 and _told(response) != "lost" else "lost"


async def _schema(http: httpx.AsyncClient, rng: random.Random) -> str:
    form = {"type": "json_schema", "json_schema": {"schema": _SCHEMA}}
    response = await _post(http, _body(rng, response_format=form, max_tokens=64))
    if response.status_code == 200:
        json.loads(response.json()["choices"][0]["message"]["content"])
    return _told(response)


async def _tool(http: httpx.AsyncClient, rng: random.Random) -> str:
    choice = rng.choice(["auto", "required"])
    return _told(await _post(http, _body(rng, tools=[_TOOL], tool_choice=choice, max_tokens=64)))


async def _stream(
    http: httpx.AsyncClient, rng: random.Random, slow: bool = False, leaves: bool = False
) -> str:
    body = _body(rng, stream=True, max_tokens=32)
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return f"status {response.status_code}"
        count, last = 0, ""
        async for line in response.aiter_lines():
            count += bool(line)
            last = line or last
            if slow:
                await asyncio.sleep(0.1)
            if leaves and count > rng.randrange(1, 8):
                return "left"
    return "answered" if last == "data: [DONE]" else "lost"


async def _broken(http: httpx.AsyncClient, rng: random.Random) -> str:
    content = rng.choice(_BROKEN)
    headers = {"Content-Type": "application/json"}
    response = await http.post("/v1/chat/completions", content=content, headers=headers)
    if response.status_code not in (400, 404, 422, 429):
        return f"status {response.status_code}"
    return "refused" if response.json()["error"]["message"] else "lost"


async def _hangs_up(http: httpx.AsyncClient, rng: random.Random) -> str:
    """Closes the connection before the request is complete."""
    url = http.base_url
    _, writer = await asyncio.open_connection(url.host, url.port)
    whole = (
        b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"messages"'
    )
    writer.write(whole[: rng.randrange(1, len(whole))])
    await writer.drain()
    writer.close()
    return "left"


def _told(response: httpx.Response) -> str:
    if response.status_code == 200:
        return "answered" if response.json()["choices"] else "lost"
    return f"status {response.status_code}" if response.json()["error"]["message"] else "lost"


KINDS: dict[str, tuple[Any, float]] = {
    "chat": (_chat, 6),
    "streamed": (_stream, 6),
    "long prompt": (_long, 1),
    "too long": (_too_long, 0.2),
    "schema": (_schema, 2),
    "tool": (_tool, 1),
    "slow reader": (partial(_stream, slow=True), 0.5),
    "goes away": (partial(_stream, leaves=True), 3),
    "broken body": (_broken, 3),
    "hangs up": (_hangs_up, 1),
}


def _resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
