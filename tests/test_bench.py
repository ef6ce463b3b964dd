"""`dash-bench`: contenders in their own processes, in turns, with the quality of each."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_tool import Capture, Tool
from conftest import needed, save_tiny

from dash_onnx.bench.contenders import drafts, policy_of
from dash_onnx.bench.measure import (
    AtContext,
    Reference,
    Result,
    divergence,
    dominated,
    measure,
    ratio,
)
from dash_onnx.bench.memory import read_gigabytes_per_s
from dash_onnx.bench.prompts import context, read_prompts
from dash_onnx.bench.worker import Worker
from dash_onnx.cli.bench import _table, main
from dash_onnx.core.block import Experts
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.core.errors import DashError, SourceError
from dash_onnx.core.text import read_text
from dash_onnx.runtime.model import Model

TOOL = Tool("dash-bench", main)
IDS = list(range(10, 26))


def result(name: str, *decode_ms: float) -> Result:
    return Result(name, decode_ms, (10.0,) * len(decode_ms), 1.0, 1000, 5e6)


def test_ratios_are_taken_within_a_round() -> None:
    middle, low, high = ratio(result("a", 1.0, 2.0, 4.0), result("b", 2.0, 6.0, 4.0))
    assert (middle, low, high) == (2.0, 1.0, 3.0)


def test_a_preset_is_dominated_by_what_is_faster_and_loses_less() -> None:
    def measured(name: str, ms: float, kl: float | None) -> Result:
        return dataclasses.replace(result(name, ms, ms), kl=kl, kl_stderr=0.01)

    fast, policy = measured("dash @fast", 5.0, 0.1), measured("dash int4", 5.0, 0.1)
    near, worse = measured("peer a", 4.9, 0.05), measured("peer b", 4.0, 0.095)
    better, best = measured("peer c", 4.5, 0.08), measured("peer d", 4.0, 0.08)
    assert dominated([fast, policy, near, worse, measured("peer e", 4.0, None)]) == []
    assert dominated([fast, policy, better, best]) == [(fast, best)]


def test_a_run_tells_which_preset_is_dominated(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    measured = [
        replace(result(name, ms, ms), kl=kl, kl_stderr=0.01)
        for name, ms, kl in (("dash @fast", 5.0, 0.1), ("dash int4", 4.0, 0.05))
    ]
    monkeypatch.setattr("dash_onnx.bench.measure.measure", lambda *_, **__: [*measured])
    words = ("--policy", "@fast", "--policy", "int4", "--skip", "quality", "--skip", "contexts")
    found = TOOL.json_of(capsys, tiny_bundle, *words)
    assert found["dominated"] == [{"preset": "dash @fast", "by": "dash int4"}]
    assert TOOL.run(tiny_bundle, *words) == 0
    assert "dash @fast is dominated: dash int4 is faster" in capsys.readouterr().out
    measured[1] = replace(measured[1], kl=0.095)
    assert TOOL.json_of(capsys, tiny_bundle, *words)["dominated"] == []


def test_speed_and_bandwidth_follow_from_the_median() -> None:
    found = result("a", 4.0, 5.0, 20.0)
    assert found.tokens_per_s == pytest.approx(200)
    assert found.gigabytes_per_s == pytest.approx(1.0)


def test_the_name_of_a_path_file_may_hold_a_plus(tiny_model: Model, tmp_path: Path) -> None:
    file = tmp_path / "c++ @0.5.txt"
    file.write_text("int8*4")
    for variant, drafting in ((f"static:@{file}", False), (f"static:@{file}+drafts", True)):
        assert policy_of(tiny_model, variant).uniform == ("int8",) * 4
        assert drafts(variant) == drafting


class Fake(Worker):
    """A worker that notes its turns; that called short holds no more than five tokens."""

    load_s = 0.5

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def decode(self, ids: list[int], new: int) -> list[float]:
        self.log.append(f"{self.name}{len(ids)}")
        if self.name == "short" and len(ids) > 5:
            return []
        return [100.0, *[float(len(ids))] * (new - 1)]

    def peak_rss_bytes(self) -> int:
        return 7

    def close(self) -> None:
        self.log.append(f"{self.name} closed")

    def logits(self, ids: list[int], prompt_tokens: int) -> np.ndarray | None:
        if self.name == "mute":
            return None
        rows = np.zeros((len(ids) - prompt_tokens, 3), np.float32)
        rows[:, 0] = 1.0
        return rows


def test_contenders_take_turns_over_all_prompts_after_a_warm_up_in_each_process() -> None:
    log: list[str] = []
    starts = [lambda name=name: Fake(name, log) for name in "ab"]
    prompts = [[1], [1, 2], [1, 2, 3]]
    found = measure(starts, prompts, new_tokens=4, rounds=2, processes=3)
    turns = ["a1", "a2", "a3", "b1", "b2", "b3"] * 2
    assert log == ["a1", "b1", *turns, "b closed", "a closed"] * 3
    assert [r.name for r in found] == ["a", "b"]
    assert [r.decode_ms for r in found] == [(2.0,) * 6] * 2
    assert [r.ttft_ms for r in found] == [(100.0,) * 6] * 2


def test_all_take_turns_on_each_context_after_the_rounds_of_each_process() -> None:
    log: list[str] = []
    starts = [lambda name=name: Fake(name, log) for name in ("a", "short")]
    contexts = [[1] * length for length in (4, 4, 8)]
    a, short = measure(starts, [[1]], new_tokens=4, rounds=1, processes=2, contexts=contexts)
    turns = ["a4", "short4", "a4", "short4", "a8", "short8"]
    closed, rounds = ["short closed", "a closed"], ["a1", "short1"] * 2
    assert log == [*rounds, *turns, *closed] * 2
    assert a.decode_ms == (1.0,) * 2
    seen = {
        4: AtContext(4, (100.0,) * 4, (4.0,) * 4, 7),
        8: AtContext(8, (100.0,) * 2, (8.0,) * 2, 7),
    }
    assert a.contexts == seen
    assert [*short.contexts] == [4]
    assert a.contexts[8].prefill_tokens_per_s == pytest.approx(80)
    assert a.contexts[8].tokens_per_s == pytest.approx(125)


@pytest.mark.parametrize("prompts", [[[1] * 8], [[1], [1] * 8]])
def test_a_prompt_that_a_contender_has_no_room_for_is_told_with_both(
    prompts: list[list[int]],
) -> None:
    log: list[str] = []
    starts = [lambda name=name: Fake(name, log) for name in ("a", "short")]
    with pytest.raises(DashError, match="short: a prompt of 8 tokens and an answer of 4 exceed"):
        measure(starts, prompts, new_tokens=4, rounds=2, processes=1)
    assert log[-2:] == ["short closed", "a closed"]


def test_a_context_has_its_length_and_ends_with_a_prompt() -> None:
    assert context([[1, 2], [3], [4, 5]], 9) == [1, 2, 3, 1, 2, 3, 1, 4, 5]
    assert context([[1, 2]], 5) == [1, 2, 1, 1, 2]
    assert context([[9], [1, 2, 3]], 2) == [2, 3]


def test_the_divergence_is_the_kl_to_the_reference() -> None:
    def texts(row: list[float]) -> list[Reference]:
        ids = [1, 2, 3, 4]
        return [Reference(ids[:n], 1, np.tile(np.float32(row), (n - 1, 1))) for n in (3, 4)]

    fake = Fake("a", [])
    assert divergence(fake, texts([1, 0, 0])) == pytest.approx((0, 0))
    q = np.exp([1.0, 0, 0]) / np.exp([1.0, 0, 0]).sum()
    wanted = float((np.log(1 / 3) - np.log(q)).mean())
    assert divergence(fake, texts([0, 0, 0])) == pytest.approx((wanted, 0), abs=1e-6)
    assert divergence(Fake("mute", []), texts([0, 0, 0])) is None


def test_a_worker_answers_from_its_own_process(tiny_bundle: Path) -> None:
    worker = Worker("dash int8", "dash", str(tiny_bundle), 1, "int8")
    try:
        assert len(worker.decode(IDS, 5)) == 5
        assert worker.decode([5] * 250, 10) == []  # the context holds 256
        logits = worker.logits(IDS, 4)
        assert logits is not None and len(logits) == 12
        # Its own: this process, which has loaded torch, is several times as large.
        assert 1e7 < worker.peak_rss_bytes() < 2.5e8 and worker.load_s > 0
    finally:
        worker.close()


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(DashError, match="no bundle at"):
        Worker("dash int8", "dash", str(tmp_path), 1, "int8")


def test_memory_reads_at_a_plausible_speed() -> None:
    block, started = np.ones(1 << 25), time.perf_counter()
    for _ in range(4):
        block.sum()
    usual = 4 * block.nbytes / 1e9 / (time.perf_counter() - started)
    assert usual / 5 < read_gigabytes_per_s(1) < usual * 5


# The command


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a peer that works, one that dies and one that lacks a package."""
    source = (
        "import numpy\n"
        "class Flat:\n"
        "    def __init__(self, path, threads): print('loading', path)\n"
        "    def decode(self, ids, new): return [2.0] * new\n"
        "    def logits(self, ids, prompt_tokens):\n"
        "        return numpy.zeros((len(ids) - prompt_tokens, 400), 'f4')\n"
        "class Dying(Flat):\n"
        "    def decode(self, ids, new): raise RuntimeError('out of luck')\n"
    )
    points = "flat = flat_peer:Flat\ndying = flat_peer:Dying\nlacking = no_such_package:Peer\n"
    (tmp_path / "flat_peer.py").write_text(source)
    info = tmp_path / "flat_peer-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: flat-peer\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[dash_onnx.peers]\n{points}")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


FEW = ("--max-tokens", 4, "--rounds", 1, "--limit", 1)


def test_json_compares_policies_and_a_peer(
    tiny_bundle: Path, clients: Path, tmp_path: Path, capsys: Capture
) -> None:
    needed("matplotlib")
    picture, drawing = tmp_path / "speed.png", tmp_path / "speed.svg"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the keeper\nthe ships\n")
    found = TOOL.json_of(
        capsys, tiny_bundle, "--policy", "full", "--policy", "int4", "--peer", f"flat:{clients}",
        "--prompts", prompts, "--max-tokens", 6, "--rounds", 2, "--picture", picture,
        "--picture", drawing,
    )  # fmt: skip
    full, int4, peer = found["contenders"]
    assert [full["name"], int4["name"]] == ["dash full", "dash int4"]
    assert full["kl"] < 1e-6 < int4["kl"] < peer["kl"]
    assert peer["decode_ms"] == [2.0, 2.0] and peer["tokens_per_s"] == 500
    assert full["weight_bytes"] > int4["weight_bytes"] > 0 and peer["weight_bytes"] is None
    assert all(len(row["decode_ms"]) == 2 for row in (full, int4))
    assert found["read_gb_per_s"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert xml.etree.ElementTree.parse(drawing).getroot().tag.endswith("svg")


@pytest.mark.parametrize("skip", [(), ("--skip", "quality")])
def test_an_answer_beyond_the_context_is_refused(
    skip: tuple[str, ...], tiny_bundle: Path, capsys: Capture
) -> None:
    given = ("--policy", "int8", "--limit", 1, "--max-tokens", 250, *skip)
    assert "context of this bundle, 256: lower --max-tokens" in TOOL.refused(
        capsys, tiny_bundle, *given
    )


def test_a_run_may_draft(tiny_bundle: Path, capsys: Capture) -> None:
    amount = ("--limit", 1, "--max-tokens", 8, "--rounds", 1, "--threads", 1, "--skip", "quality")
    assert TOOL.run(tiny_bundle, "--policy", "int8", "--policy", "int8+drafts", *amount) == 0
    out = capsys.readouterr().out
    assert "dash int8+drafts" in out and "with drafts: mean" in out
    for wrong, told in (("int8+magic", "int8+magic"), ("random+drafts", "one path")):
        assert told in TOOL.refused(capsys, tiny_bundle, "--policy", wrong)


@pytest.mark.parametrize("experts", [None, Experts(count=4, per_token=1, width=8)])
def test_bandwidth_is_told_where_every_token_reads_all_weights(
    experts: Experts | None,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "out"))
    manifest = Bundle(folder).manifest
    replace_manifest(folder, replace(manifest, block=replace(manifest.block, experts=experts)))
    variants = ("int8", "int8+drafts", "random")
    measured = [Result(f"dash {variant}", (1.0,), (1.0,), 1.0, 1) for variant in variants]
    monkeypatch.setattr("dash_onnx.bench.measure.measure", lambda *_, **__: [*measured])
    words = [word for variant in variants for word in ("--policy", variant)]
    found = TOOL.json_of(capsys, folder, *words, "--skip", "quality", "--skip", "contexts")
    told = [row["gb_per_s"] is not None for row in found["contenders"]]
    assert told == [experts is None, False, False]


def test_the_table_has_a_row_for_every_contender(tiny_bundle: Path, capsys: Capture) -> None:
    assert TOOL.run(tiny_bundle, *FEW, "--processes", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["dash full", "dash int8", "dash int4"]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("dying", "stopped: RuntimeError: out of luck"),
        ("lacking", "No module named 'no_such_package'"),
        ("vllm", "no client for vllm is installed (installed: "),
    ],
)
def test_a_peer_that_cannot_run_is_one_line(
    kind: str, why: str, tiny_bundle: Path, clients: Path, capsys: Capture
) -> None:
    assert why in TOOL.refused(capsys, tiny_bundle, *FEW, "--peer", f"{kind}:{clients}")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--peer", "genai"), "expected KIND:PATH"),
        (("--peer", "flat:/nowhere"), "/nowhere does not exist"),
        (("--policy", "int3"), "unknown policy"),
        (("--policy", "static:@/nowhere"), "/nowhere"),
        (("--picture", "x.gif"), ".png or .svg"),
        (("--picture", "/nowhere/x.png"), "no folder"),
        (("--max-tokens", 1), "at least 2"),
        (("--prompts", "/nowhere"), "/nowhere"),
        (("--picture", "x.png", "--skip", "quality"), "leave --skip quality out"),
    ],
)
def test_misuse_is_one_line(
    tiny_bundle: Path, clients: Path, arguments: tuple[object, ...], why: str, capsys: Capture
) -> None:
    assert why in TOOL.refused(capsys, tiny_bundle, *arguments)


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_a_picture_replaces_only_a_regular_file(
    kind: str, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    needed("matplotlib")
    target = tmp_path / "x.png"
    os.mkfifo(target) if kind == "fifo" else target.symlink_to("nothing")
    told = TOOL.refused(capsys, tiny_bundle, "--picture", target)
    assert "exists and is not a regular file" in told


def test_the_table_shows_what_follows_a_context_and_a_dash_without_it() -> None:
    row = Result("dash full", (1.0,), (1.0,), 1.0, 1)
    head, bare = _table([row]).splitlines()
    assert all(name in head for name in ("pp512", "after 1,000", "after 3,500", "with 3,500"))
    contexts = {n: AtContext(n, (2.0 * n,), (n / 100,), n * 10**6) for n in (512, 1000)}
    full = _table([replace(row, contexts=contexts)]).splitlines()[1]
    assert bare.split("ms")[1].split()[:3] == ["-", "-", "-"]
    assert full.split("ms")[1].split()[:3] == ["500", "100.0", "-"]
    assert full.split()[-4:] == ["1000", "MB", "-", "-"]


def test_the_prefill_is_measured_where_the_context_holds_it(
    export_tiny: Callable[..., Path],
    clients: Path,
    night: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    folder = save_tiny(tmp_path / "longer", max_position_embeddings=600)
    bundle = export_tiny(folder, calibration=(night,))
    capsys.readouterr()  # what the export prints
    words = (bundle, "--policy", "int4", "--peer", f"flat:{clients}", *FEW)
    for row in TOOL.json_of(capsys, *words)["contenders"]:
        assert [*row["contexts"]] == ["512"]
        prefill = row["contexts"]["512"]
        assert len(prefill["prefill_ms"]) == 2 and prefill["prefill_tokens_per_s"] > 0
    found = TOOL.json_of(capsys, *words, "--skip", "contexts")
    assert [row["contexts"] for row in found["contenders"]] == [{}, {}]


def test_the_mark_of_utf_8_is_no_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\n')
    assert read_prompts(path) == ["a"]
    assert read_text(path) == '{"prompt": "a"}\n'


def test_no_error_is_told_where_there_is_none() -> None:
    row = Result("dash full", (1.0,), (1.0,), 1.0, 1, kl=0.0, kl_stderr=0.0)
    assert "0.0000" in _table([row]) and "+-" not in _table([row])
    assert "0.0000 +- 0.0100" in _table([replace(row, kl_stderr=0.01)])


def test_a_picture_without_matplotlib_is_refused_before_the_rounds(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("dash_onnx.bench.measure.measure", None)
    arguments = ("--picture", tmp_path / "x.png")
    assert "needs matplotlib" in TOOL.refused(capsys, tiny_bundle, *arguments)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"prompt": "a"}\n\n{"turns": ["b", "c"]}\n', ["a", "b"]),
        ('{"turns": []}\n', None),
        ("[1]\n", None),
        ("{\n", None),
        ("", None),
    ],
)
def test_prompts_come_from_json_lines(text: str, wanted: list[str] | None, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    if wanted is None:
        with pytest.raises(SourceError):
            read_prompts(path)
    else:
        assert read_prompts(path) == wanted
