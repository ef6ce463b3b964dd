"""Clients of other runtimes for `dash-bench --peer KIND:PATH`, one file each.

Each is a `Contender` of `dash_onnx.bench.contenders`, created from the path and the number
of CPU threads, and otherwise runs with its own defaults. A new one is a file here, an entry point
and an extra in ../pyproject.toml. dash-bench loads it in its own process; nothing here imports
dash_onnx.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def timed(step: Callable[[], None], count: int) -> list[float]:
    """Milliseconds of each of `count` calls."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1e3)
    return times
