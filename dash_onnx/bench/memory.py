"""How fast this machine reads memory: the ceiling of decoding, which reads every weight."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 512 << 20  # far larger than any cache
_REPEATS = 5


def read_gigabytes_per_s(threads: int) -> float:
    """Best of a few sums over a large array, which NumPy computes without the GIL."""
    parts = np.array_split(np.ones(_BYTES // 8, np.int64), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, _BYTES / (time.perf_counter() - started) / 1e9)
    return best
