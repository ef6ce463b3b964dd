"""dash-serve: bundles behind OpenAI's API, and a chat page."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from dash_onnx.cli.cached import bundle_of, model_name
from dash_onnx.cli.common import (
    Parser,
    add_log_options,
    add_max_tokens_option,
    add_memory_option,
    add_parallel_option,
    add_threads_option,
    count,
    folder,
    log_level,
    positive,
    run,
)
from dash_onnx.cli.log import JsonLine
from dash_onnx.core.errors import DashError
from dash_onnx.core.text import read_text

_LOG = logging.getLogger(__name__)
# Errors of an address that this machine lacks, as that of localhost in IPv6 may be.
_UNUSABLE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_EXAMPLES = """\
  dash-serve out/
  dash-serve out/ other/ --port 9000 --budget fast
  dash-serve small/ large/ code/ --max-weights-mb 2000
  dash-serve out/ --host 0.0.0.0 --api-key-file key.txt
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello!"}], "budget": "fast"}'"""


def _parser() -> Parser:
    parser = Parser(
        "dash-serve",
        "Serve bundles through OpenAI's API (chat and text completions, streamed or complete), "
        "with the additional fields `budget`, `policy` and `speculate`, and a chat page at "
        "/. Needs the extra [serve].",
        _EXAMPLES,
    )
    parser.add_argument(
        "bundles",
        metavar="BUNDLE",
        nargs="+",
        type=folder,
        help="bundles, named after their folders; models are exported first, once, into a cache",
    )
    parser.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--policy",
        default="",
        help="policy of requests that name none (default: by --budget)",
    )
    parser.add_argument("--budget", help="budget of requests that name none (default: balanced)")
    answers = parser.add_argument_group("answers")
    add_parallel_option(answers, "slots: answers that run at once, as one batch")
    answers.add_argument(
        "--waiting",
        type=positive,
        default=32,
        metavar="N",
        help="queued requests; further ones are refused with status 429 (default: 32)",
    )
    add_max_tokens_option(answers, 4096, "maximum tokens of an answer")
    answers.add_argument(
        "--timeout",
        type=positive,
        default=600,
        metavar="S",
        help="maximum seconds of a request (default: 600)",
    )
    memory = parser.add_argument_group("memory and cores")
    add_memory_option(memory)
    memory.add_argument(
        "--prefix-cache",
        type=Path,
        metavar="DIR",
        help="keep the KV cache of prompts and conversations in DIR for the next start (needs the "
        "package safetensors)",
    )
    memory.add_argument(
        "--prefix-mb",
        type=count,
        default=256,
        metavar="N",
        help="KV cache kept for evicted conversations, in MB (default: %(default)s; 0: none)",
    )
    memory.add_argument(
        "--max-weights-mb",
        type=positive,
        metavar="N",
        help="load bundles when a request names them, with at most N MB of weights in total; the "
        "least recently used bundle is unloaded (default: load all at the start)",
    )
    add_threads_option(memory)
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with the key that clients must send; required if other machines can connect",
    )
    access.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web origin that may call the server; can be repeated",
    )
    access.add_argument(
        "--sha256",
        action="append",
        metavar="HEX",
        help="refuse a BUNDLE whose dash.json has a different SHA-256; once per BUNDLE, in order",
    )
    logs = parser.add_argument_group("logs")
    add_log_options(logs)
    logs.add_argument("--log-json", action="store_true", help="log one JSON object per line")
    return parser


def _origin(text: str) -> str:
    """An origin as browsers send it."""
    origin = text.rstrip("/").lower()
    if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/]+", origin):
        raise DashError(f"--cors {text} is not an origin: write it as https://app.example")
    return origin


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    nothing = "keeps nothing with --prefix-mb 0: leave one of them out"
    parser.refuse(arguments, (not arguments.prefix_mb, "--prefix-cache", nothing))
    formatter = JsonLine() if arguments.log_json else None
    return run("dash-serve", lambda: _serve(arguments), log_level(arguments), formatter)


def _serve(arguments: argparse.Namespace) -> None:
    from dash_onnx.runtime.scheduler import MAX_SLOTS
    from dash_onnx.serve.limits import Limits, is_local

    key = None
    if arguments.api_key_file is not None:
        key = read_text(arguments.api_key_file).strip()
    elif not is_local(arguments.host):
        raise DashError(f"--host {arguments.host} is open to other machines: pass --api-key-file")
    if not 0 <= arguments.port < 1 << 16:
        raise DashError(f"--port {arguments.port} is not in 0..65535")
    origins = tuple(map(_origin, arguments.cors))
    if arguments.parallel > MAX_SLOTS:
        raise DashError(f"--parallel {arguments.parallel} is not in 1..{MAX_SLOTS}")
    try:
        from dash_onnx.serve.app import create_app
        from dash_onnx.serve.pool import check_names, open_bundles
        from dash_onnx.serve.server import Server
    except ImportError as error:
        remedy = "in a clone of dash-onnx, `pip install '.[serve]'`"
        raise DashError(f"the server's packages are missing ({error}): {remedy}") from None
    names = [model_name(bundle) for bundle in arguments.bundles]
    check_names(names)
    with contextlib.ExitStack() as opened:
        with _listening(arguments):  # before a model is exported
            sockets = _bound(arguments.host, arguments.port, opened)
        bundles = open_bundles(
            [bundle_of(bundle) for bundle in arguments.bundles],
            names=names,
            threads=arguments.threads,
            policy=arguments.policy,
            budget=arguments.budget,
            memory=arguments.memory,
            sha256=arguments.sha256,
        )
        most = arguments.max_weights_mb
        limits = Limits(
            parallel=arguments.parallel,
            waiting=arguments.waiting,
            max_tokens=arguments.max_tokens,
            seconds=arguments.timeout,
            prefix_bytes=arguments.prefix_mb * 10**6,
            prefix_folder=arguments.prefix_cache,
            memory_bytes=None if most is None else most * 10**6,
        )
        app = create_app(bundles, limits, key=key, origins=origins, only_here=key is None)
        server = Server(app)
        with _listening(arguments):  # only now: until then clients are refused, and do not wait
            for sock in sockets:
                sock.listen()
        for sock in sockets:
            _LOG.info("%s", _url(sock))
        server.run(sockets)
    if server.force_exit:
        raise KeyboardInterrupt


def _bound(host: str, port: int, opened: contextlib.ExitStack) -> list[socket.socket]:
    """Sockets bound to the addresses of a host; they do not listen yet.

    Args:
        host: name or address; empty for all addresses of this machine.
        port: 0 for any free port.
        opened: closes the sockets.

    Raises:
        OSError: there is no such host, or an address is in use or not one of this machine.
    """
    sockets: list[socket.socket] = []
    kind, passive = socket.SOCK_STREAM, socket.AI_PASSIVE
    refusal: OSError | None = None
    for found in dict.fromkeys(socket.getaddrinfo(host or None, port, type=kind, flags=passive)):
        family, _, protocol, _, (address, _, *scope) = found
        try:
            sock = opened.enter_context(socket.socket(family, kind, protocol))
            if os.name == "posix":  # elsewhere it would share the port with another server
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # IPv4 has a socket of its own
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port, *scope))
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise
            refusal = error
        else:
            sockets.append(sock)
            port = sock.getsockname()[1]
    if refusal is not None and not sockets:
        raise refusal
    return sockets


@contextlib.contextmanager
def _listening(arguments: argparse.Namespace) -> Iterator[None]:
    """Says which options to change if the server cannot listen."""
    try:
        yield
    except (OSError, UnicodeError) as error:  # no host has such a name
        raise DashError(
            f"cannot listen on port {arguments.port} of {arguments.host}: "
            f"{getattr(error, 'strerror', None) or error}; pass another --port or --host"
        ) from None


def _url(sock: socket.socket) -> str:
    address, port, *_ = sock.getsockname()
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
