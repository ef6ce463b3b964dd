"""Facts of the machine and of this process."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of malloc.h


def machine_name() -> str:
    """Processor and architecture, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or "unknown processor"
    return f"{name}, {platform.machine()}"


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` starts from what the parent process had, on Linux
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Gives memory that is no longer used back to the system.

    What the C library keeps for later allocations adds up where large blocks of many sizes come
    and go, as layers do in an export.
    """
    gc.collect()
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keeps freed blocks for the next ones of their size, however large.

    The C library maps each block of over 32 MB anew, and the system clears its pages: a fifth of
    the time of passes that need the same large blocks again and again.
    """
    if not _glibc():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # told anything, glibc adapts no more: this is how far it would have come
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        release_memory()


def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
