"""What a server takes on, and how it says that this is too much."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from dash_onnx.core.errors import DashError


class BusyError(DashError):
    """So much is going on that another request is refused for now."""


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_trusted(name: str) -> bool:
    """Whether a server was called by an address, or by a name that cannot be made to lead to it."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return f".{name.rstrip('.')}".endswith(".localhost")


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        parallel: generations at once, which share their passes.
        waiting: further requests that wait for one of them to end.
        most_tokens: of an answer.
        most_prompt_tokens: of a prompt; None: as many as the context holds.
        seconds: of a request, from when it runs until its answer is sent.
        body_bytes: of a request.
        prefix_bytes: of K/V in memory that lost its place to another text.
        prefix_folder: keeps it for the next process.
        memory_bytes: of weights that may be loaded at once, where bundles load on demand.
    """

    parallel: int = 8
    waiting: int = 32
    most_tokens: int = 4096
    most_prompt_tokens: int | None = None
    seconds: float = 600.0
    body_bytes: int = 4 << 20
    prefix_bytes: int = 256 << 20
    prefix_folder: Path | None = None
    memory_bytes: int | None = None
