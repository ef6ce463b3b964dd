"""What a process keeps of the memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is tuned")

# Page faults of four blocks of 64 MB, each freed before the next: before, meanwhile, afterwards.
COUNT = """
import contextlib, resource
import numpy as np
from dash_onnx.runtime.machine import kept_memory

def faults():
    counts = []
    for _ in range(5):
        np.ones(64 << 20, np.uint8)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[-1] - counts[0]

before = faults()
with contextlib.suppress(KeyError), kept_memory():
    kept = faults()
    raise KeyError
print(before, kept, faults())
"""


def test_a_freed_block_is_kept_for_the_next_one_only_while_asked() -> None:
    run = subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, text=True)
    before, kept, after = map(int, run.stdout.split())
    assert 4 * kept < min(before, after)
