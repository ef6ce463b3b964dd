"""Facts of the machine and of this process."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_HUGE_PAGE = 2 << 20  # bytes, on x86 and on ARM with 4 kB pages
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_MIN_BLOCK, _FULL = 2 * _HUGE_PAGE, 0.9  # bytes, and the share of them that is in memory


_INSTRUCTIONS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "i8mm": "I8MM",
    "asimddp": "DotProd",
}
"""Flags that Linux reports, and the instructions for products of INT8; the fastest first."""


def machine_name() -> str:
    """Processor, its instructions for INT8 and architecture, as far as the system reports them."""
    name, flags = platform.processor() or "unknown processor", set[str]()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):  # on x86, on ARM
                flags = {*value.split()}
    known = next((one for flag, one in _INSTRUCTIONS.items() if flag in flags), "")
    return f"{name}{known and f' ({known})'}, {platform.machine()}"


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far; 0 if the system does not report it."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, `getrusage` starts from the parent process's peak
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):  # not in gVisor
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Memory that is still available, on the machine and in the container; None if unknown."""
    found = []
    try:
        lines = meminfo.read_text("utf-8").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        limit = (group / "memory.max").read_text("utf-8").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text("utf-8"))
            found.append(int(limit) - used)
            facts = dict(map(str.split, (group / "memory.stat").read_text("utf-8").splitlines()))
            # Files that were read or written stay in memory, and count, until it is needed.
            found[-1] += int(facts["active_file"]) + int(facts["inactive_file"])
    except (OSError, ValueError, KeyError):
        pass
    return max(min(found), 0) if found else None


def use_huge_pages() -> int:
    """Moves large blocks of this process's memory, such as weights, to huge pages; Linux only.

    A token reads all weights once: fewer, larger pages make that faster (decision 0111). Partly
    untouched blocks are left alone, as they would grow. The environment variable DASH_HUGE_PAGES=0
    turns it off.

    Returns:
        Bytes for which huge pages were requested.
    """
    if sys.platform != "linux" or os.environ.get("DASH_HUGE_PAGES") == "0":
        return 0
    found = 0
    try:
        blocks = _full_blocks(Path("/proc/self/smaps").read_text("utf-8", "replace"))
    except OSError:
        return 0
    madvise = ctypes.CDLL(None).madvise
    for start, stop in blocks:
        start, stop = -(-start // _HUGE_PAGE) * _HUGE_PAGE, stop // _HUGE_PAGE * _HUGE_PAGE
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):  # kernels before 6.1 lack the second
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)
        found += stop - start
    return found


def _full_blocks(smaps: str) -> Iterator[tuple[int, int]]:
    """Addresses of large anonymous blocks that are in memory, from /proc/PID/smaps."""
    header = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *(\[heap\])?")
    start = stop = 0
    for line in smaps.splitlines():
        if (match := header.fullmatch(line.rstrip())) is not None:
            start, stop = int(match[1], 16), int(match[2], 16)
        elif not line[0].isupper():
            start = stop = 0
        elif line.startswith("Rss:") and stop - start >= _MIN_BLOCK:
            if int(line.split()[1]) * 1024 >= _FULL * (stop - start):
                yield start, stop


def release_memory() -> None:
    """Returns unused memory to the system.

    What the C library keeps for later allocations adds up when large blocks of many sizes come and
    go, as layers do in an export.
    """
    gc.collect()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
