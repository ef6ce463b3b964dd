"""Huge pages: which blocks of memory are moved to them, and when."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import dash_onnx
from dash_onnx.runtime import machine, sessions


def test_huge_pages_are_asked_for_large_blocks_that_are_in_memory() -> None:
    def block(start: int, mb: int, resident: float, rest: str = "rw-p 00000000 00:00 0") -> str:
        size = mb << 10
        head = f"{start:x}-{start + (mb << 20):x} {rest}"
        return f"{head} \nSize: {size} kB\nRss: {int(size * resident)} kB\nVmFlags: rd wr\n"

    large = 1 << 40
    smaps = (
        block(large, 64, 1.0)
        + block(2 * large, 64, 0.5)  # would grow
        + block(3 * large, 2, 1.0)  # small
        + block(4 * large, 64, 1.0, "r--p 00000000 08:01 77 /weights.data")
        + block(5 * large, 64, 1.0, "rw-p 00000000 08:01 77 /weights.data")
        + block(6 * large, 8, 0.95, "rw-p 00000000 00:00 0 [heap]")
    )
    found = list(machine._full_blocks(smaps))
    assert found == [(large, large + (64 << 20)), (6 * large, 6 * large + (8 << 20))]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has them")
def test_weights_move_to_huge_pages_once_and_not_where_it_is_turned_off(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    moved: list[int] = []
    monkeypatch.setattr(sessions, "use_huge_pages", lambda: moved.append(1))
    monkeypatch.setattr(sessions, "_MANY_BYTES", 1)
    with dash_onnx.load(tiny_bundle, policy="int4") as model:
        for policy, times in (("int4", 1), ("int4", 1), ("int8", 2), ("int8", 2)):
            model.generate("the ships", policy=policy, max_new_tokens=2)
            for thread in threading.enumerate():
                if thread.name == "huge pages":
                    thread.join()
            assert len(moved) == times
    monkeypatch.setenv("DASH_HUGE_PAGES", "0")
    assert machine.use_huge_pages() == 0
    monkeypatch.delenv("DASH_HUGE_PAGES")
    block = np.ones(16 << 20, np.uint8)
    assert machine.use_huge_pages() >= 12 << 20
    assert block.all()


def test_files_that_the_system_keeps_in_memory_are_available(tmp_path: Path) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert machine.available_bytes(meminfo, group) == 5000 << 10
    group.mkdir()
    facts = {"memory.max": 4000 << 10, "memory.current": 3000 << 10}
    for name, value in facts.items():
        (group / name).write_text(f"{value}\n")
    (group / "memory.stat").write_text(
        f"anon 1\nfile 9\nactive_file {700 << 10}\ninactive_file {500 << 10}\n"
    )
    assert machine.available_bytes(meminfo, group) == (4000 - 3000 + 700 + 500) << 10
    (group / "memory.max").write_text("max\n")
    assert machine.available_bytes(meminfo, group) == 5000 << 10
