"""Facts of the machine and of this process."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from pathlib import Path


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
    """Highest resident memory of this process so far; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` starts from what the parent process had, on Linux
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Memory that could still be taken: of the machine, and of the container; None: not known."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text("utf-8").strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text("utf-8")))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def release_memory() -> None:
    """Gives memory that is no longer used back to the system.

    What the C library keeps for later allocations adds up where large blocks of many sizes come
    and go, as layers do in an export.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
