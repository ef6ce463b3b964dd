"""`dash-bench`: contenders in their own processes, in turns, with the quality of each."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from cli_tool import Capture, Tool

from dash_onnx.bench.contenders import Dash, Transformers
from dash_onnx.bench.measure import Result, divergence, ratio, restarted, rounds
from dash_onnx.bench.memory import read_gigabytes_per_s
from dash_onnx.bench.prompts import read_prompts
from dash_onnx.bench.worker import Worker
from dash_onnx.cli.bench import main
from dash_onnx.core.errors import DashError, SourceError

TOOL = Tool("dash-bench", main)
IDS = list(range(10, 26))


def result(name: str, *decode_ms: float) -> Result:
    return Result(name, decode_ms, (10.0,) * len(decode_ms), 1.0, 1000, 5e6)


def test_ratios_are_taken_within_a_round() -> None:
    middle, low, high = ratio(result("a", 1.0, 2.0, 4.0), result("b", 2.0, 6.0, 4.0))
    assert (middle, low, high) == (2.0, 1.0, 3.0)


def test_speed_and_bandwidth_follow_from_the_median() -> None:
    found = result("a", 4.0, 5.0, 20.0)
    assert found.tokens_per_s == pytest.approx(200)
    assert found.gigabytes_per_s == pytest.approx(1.0)


class Fake:
    """A worker that notes its turns."""

    load_s = 0.5

    def __init__(self, name: str, log: list[str]):
        self.name, self._log = name, log

    def decode(self, ids: list[int], new: int) -> list[float]:
        self._log.append(f"{self.name}{len(ids)}")
        return [100.0, *[float(len(ids))] * (new - 1)]

    def peak_rss_bytes(self) -> int:
        return 7

    def close(self) -> None:
        self._log.append(f"{self.name} closed")

    def logits(self, ids: list[int], prompt_tokens: int) -> np.ndarray | None:
        if self.name == "mute":
            return None
        rows = np.zeros((len(ids) - prompt_tokens, 3), np.float32)
        rows[:, 0] = 1.0
        return rows


def test_contenders_take_turns_over_all_prompts_after_a_warm_up() -> None:
    log: list[str] = []
    workers = [Fake("a", log), Fake("b", log)]
    found = rounds(workers, [[1], [1, 2], [1, 2, 3]], 2, 4)  # type: ignore[arg-type]
    assert log == ["a1", "b1"] + ["a1", "a2", "a3", "b1", "b2", "b3"] * 2
    assert [r.decode_ms for r in found] == [(2.0, 2.0)] * 2
    assert [r.ttft_ms for r in found] == [(100.0, 100.0)] * 2


def test_processes_that_start_anew_add_their_rounds() -> None:
    log: list[str] = []
    starts = [lambda name=name: Fake(name, log) for name in "ab"]
    found = restarted(
        starts,  # type: ignore[arg-type]
        3,
        lambda workers: rounds(workers, [[1]], 2, 4),
    )
    assert [r.name for r in found] == ["a", "b"]
    assert [r.decode_ms for r in found] == [(1.0,) * 6] * 2
    assert log == ["a1", "b1", *["a1", "b1"] * 2, "b closed", "a closed"] * 3


def test_the_divergence_is_the_kl_to_the_reference() -> None:
    texts = [([1, 2, 3], 1), ([1, 2, 3, 4], 1)]
    same = [np.tile(np.float32([1, 0, 0]), (len(ids) - 1, 1)) for ids, _ in texts]
    fake = Fake("a", [])
    assert divergence(fake, same, texts) == pytest.approx((0, 0))  # type: ignore[arg-type]
    flat = [np.zeros_like(rows) for rows in same]
    q = np.exp([1.0, 0, 0]) / np.exp([1.0, 0, 0]).sum()
    wanted = float((np.log(1 / 3) - np.log(q)).mean())
    found = divergence(fake, flat, texts)  # type: ignore[arg-type]
    assert found == pytest.approx((wanted, 0), abs=1e-6)
    assert divergence(Fake("mute", []), same, texts) is None  # type: ignore[arg-type]


def test_two_runtimes_agree_on_the_same_weights(tiny_folder: Path, tiny_bundle: Path) -> None:
    ours = Dash(str(tiny_bundle), "full", 2).logits(IDS, 5)
    theirs = Transformers(str(tiny_folder), "", 2).logits(IDS, 5)
    assert ours.shape == theirs.shape == (11, ours.shape[1])
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_a_worker_answers_from_its_own_process(tiny_bundle: Path) -> None:
    worker = Worker("dash int8", "dash", str(tiny_bundle), "int8", 1)
    try:
        assert len(worker.decode(IDS, 5)) == 5
        logits = worker.logits(IDS, 4)
        assert logits is not None and len(logits) == 12
        # Its own: this process, which has loaded torch, is several times as large.
        assert 1e7 < worker.peak_rss_bytes() < 2.5e8 and worker.load_s > 0
    finally:
        worker.close()


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(DashError, match="no bundle at"):
        Worker("dash int8", "dash", str(tmp_path), "int8", 1)


def test_memory_reads_at_a_plausible_speed() -> None:
    assert 0.5 < read_gigabytes_per_s(1) < 5000


# The command


def test_json_compares_policies_and_a_peer(
    tiny_bundle: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib")
    picture, drawing = tmp_path / "speed.png", tmp_path / "speed.svg"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the keeper\nthe ships\n")
    found = TOOL.json_of(
        capsys, tiny_bundle, "--run", "full", "--run", "int4", "--peer",
        f"transformers:{tiny_folder}", "--prompts", prompts, "--new-tokens", 6, "--rounds", 2,
        "--picture", picture, "--picture", drawing,
    )  # fmt: skip
    full, int4, peer = found["contenders"]
    assert [full["name"], int4["name"]] == ["dash full", "dash int4"]
    assert full["kl"] < 1e-6 < int4["kl"]
    assert peer["kl"] < 1e-3
    assert full["weight_bytes"] > int4["weight_bytes"] > 0 and peer["weight_bytes"] is None
    assert all(len(row["decode_ms"]) == 2 for row in (full, int4, peer))
    assert found["read_gb_per_s"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert xml.etree.ElementTree.parse(drawing).getroot().tag.endswith("svg")


def test_the_table_has_a_row_for_every_contender(tiny_bundle: Path, capsys: Capture) -> None:
    few = ("--new-tokens", 4, "--rounds", 1, "--processes", 2, "--max-prompts", 1)
    assert TOOL.run(tiny_bundle, *few) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["dash full", "dash int8", "dash int4"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--peer", "genai"), "expected KIND:PATH"),
        (("--peer", "vllm:x"), "expected KIND:PATH"),
        (("--peer", "genai:/nowhere"), "there is no /nowhere"),
        (("--run", "int3"), "unknown policy"),
        (("--run", "static:@/nowhere"), "/nowhere"),
        (("--picture", "x.gif"), ".png or .svg"),
        (("--picture", "/nowhere/x.png"), "no folder"),
        (("--new-tokens", 1), "at least 2"),
        (("--prompts", "/nowhere"), "/nowhere"),
        (("--picture", "x.png", "--no-quality"), "leave --no-quality out"),
    ],
)
def test_misuse_is_one_line(
    tiny_bundle: Path, arguments: tuple[object, ...], why: str, capsys: Capture
) -> None:
    assert why in TOOL.refused(capsys, tiny_bundle, *arguments)


def test_a_picture_without_matplotlib_is_refused_before_the_rounds(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("dash_onnx.bench.measure.restarted", None)
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
        assert json.loads(text.splitlines()[0])
