"""What the process keeps of the memory that it frees."""

from __future__ import annotations

import platform
import resource

import numpy as np
import pytest

from dash_onnx.runtime.machine import kept_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is tuned")


def faults_of_large_blocks() -> int:
    """Page faults of four blocks of 64 MB, each freed before the next; the first does not count."""
    counts = []
    for _ in range(5):
        np.ones(64 << 20, np.uint8)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[-1] - counts[0]


def test_a_freed_block_is_kept_for_the_next_one_only_while_asked() -> None:
    before = faults_of_large_blocks()
    with kept_memory():
        kept = faults_of_large_blocks()
    after = faults_of_large_blocks()
    assert 4 * kept < min(before, after)


def test_memory_is_given_back_after_an_error() -> None:
    with pytest.raises(KeyError), kept_memory():
        raise KeyError
    with kept_memory():
        kept = faults_of_large_blocks()
    assert 4 * kept < faults_of_large_blocks()
