"""The limits of a server, and the error when it is overloaded."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from dash_onnx.core.errors import DashError


class BusyError(DashError):
    """The server is too busy to accept another request for now."""


def is_local(host: str) -> bool:
    """Whether a server that listens on this host is reachable only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_trusted(name: str) -> bool:
    """Whether a server was called by address, or by a name that DNS cannot redirect to it."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return f".{name.rstrip('.')}".endswith(".localhost")


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
        parallel: generations that run at once and share their passes.
        waiting: requests that may wait for one of them to end.
        max_tokens: most tokens of an answer.
        seconds: time limit of a request, from when it starts to run until its answer is sent.
        body_bytes: most bytes of a request body.
        prefix_bytes: memory for K/V evicted from its slot by another text.
        prefix_folder: folder that keeps this K/V for the next process.
        memory_bytes: most bytes of weights loaded at once, if bundles load on demand.
    """

    parallel: int = 8
    waiting: int = 32
    max_tokens: int = 4096
    seconds: float = 600.0
    body_bytes: int = 4 << 20
    prefix_bytes: int = 256 * 10**6
    prefix_folder: Path | None = None
    memory_bytes: int | None = None
