"""`dash-profile`: another machine's costs in the same bundle."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_tool import Capture, Tool
from conftest import files_of
from scored_bundle import with_scorer

from dash_onnx.cli.profile import main
from dash_onnx.core.atomic import TRAINING, locked
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.card import card
from dash_onnx.core.contract import CARD_NAME
from dash_onnx.core.errors import BundleError
from dash_onnx.core.facts import Costs
from dash_onnx.core.plans import Plan
from dash_onnx.runtime import profile_whole
from dash_onnx.runtime.devices import open_backend
from dash_onnx.runtime.machine import machine_name
from dash_onnx.runtime.profile import Times, spread_of, taken_share
from dash_onnx.runtime.profile_whole import _compared, _Timed, whole_ratios
from dash_onnx.runtime.sequence import SequenceState

TOOL = Tool("dash-profile", main)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "my out"))


def test_the_costs_are_measured_again_and_nothing_else_changes(
    bundle: Path, capsys: Capture
) -> None:
    before, files = Bundle(bundle).manifest, files_of(bundle)
    found = TOOL.json_of(capsys, bundle, "--force")
    after = Bundle(bundle).manifest
    assert found["layers_ms"] == [dict(layer) for layer in after.costs.layers_ms]
    assert after.costs != before.costs
    assert after.files == before.files and after.layers == before.layers
    files["dash.json"] = after.to_text().encode()
    files["README.md"] = card(after).encode()
    assert files_of(bundle) == files


def test_ways_are_compared_behind_as_many_tokens(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_whole, "_TURNS", (2, 2))
    opened = Bundle(bundle)
    timed = _Timed(opened, opened.manifest.costs, open_backend("cpu"))
    plan = Plan(1.0, 0.0, "int8", 1.0, ("int8",) * 4)
    for _ in range(2):  # the reference decodes in both
        other = timed._way(plan)
        _compared(timed._reference, other)
        assert timed._reference.sequence.length == other.sequence.length > 0


def test_tokens_are_timed_as_a_whole_beside_the_sum_of_their_parts(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SequenceState.forward

    def slow(self: SequenceState, tokens: Any, decider: Any, **options: Any) -> Any:
        if set(decider.end()) == {"int4"}:  # which no part takes
            time.sleep(0.005)
        return forward(self, tokens, decider, **options)

    monkeypatch.setattr(SequenceState, "forward", slow)
    limits = {"MIN_MS": 0.0, "STEADY": math.inf, "MAX_APART": math.inf, "_TURNS": (2, 2)}
    for name, limit in limits.items():
        monkeypatch.setattr(profile_whole, name, limit)
    found = TOOL.json_of(capsys, bundle, "--force")["whole"]
    assert {*found} == {"full", "int8", "int4"} and found["int4"] > 2 * found["int8"]
    assert found["full"] == 1.0
    assert Bundle(bundle).manifest.costs.whole == found
    text = (bundle / CARD_NAME).read_text("utf-8")
    assert text == card(Bundle(bundle).manifest)  # with the new times
    (bundle / CARD_NAME).write_text("# My model")
    TOOL.json_of(capsys, bundle, "--force")
    assert (bundle / CARD_NAME).read_text() == "# My model"

    def ratios() -> dict[str, float]:
        opened = Bundle(with_scorer(bundle))
        return whole_ratios(opened, opened.manifest.costs, open_backend("cpu"))

    assert {*ratios()} == {"full", "int8", "int4", "decided"}
    for name, limit, left in (
        ("MIN_MS", math.inf, {}),
        ("STEADY", -1.0, {}),  # other work disturbed it
        ("MAX_APART", 0.1, {}),
        ("available_bytes", lambda: 0, {}),
    ):
        with monkeypatch.context() as limited:
            limited.setattr(profile_whole, name, limit)
            assert ratios() == left


def test_a_dry_run_prints_and_leaves_the_bundle(bundle: Path, capsys: Capture) -> None:
    before = (bundle / "dash.json").read_bytes()
    assert TOOL.run(bundle, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "one layer, skip" in printed and "a token, all layers full" in printed
    assert (bundle / "dash.json").read_bytes() == before


@pytest.mark.parametrize(
    ("spread", "taken", "told"),
    [
        (0.05, 0.05, ""),
        (0.3, 0.05, "30% longer"),
        (0.05, 0.5, "took 50% of the cores' time"),  # steady work makes all runs longer alike
    ],
)
def test_a_profile_that_other_work_disturbed_is_refused(
    bundle: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    spread: float,
    taken: float,
    told: str,
) -> None:
    costs = replace(Bundle(bundle).manifest.costs, embed_ms=7.0, spread=spread)
    monkeypatch.setattr("dash_onnx.runtime.profile.measure", lambda *_: costs)
    monkeypatch.setattr("dash_onnx.runtime.profile.taken_share", lambda *_: taken)
    monkeypatch.setattr("dash_onnx.runtime.profile.BUSY", 0.1)
    monkeypatch.setattr("dash_onnx.runtime.profile.TAKEN", 0.2)
    if told:
        assert told in TOOL.refused(capsys, bundle)
    else:
        assert TOOL.run(bundle) == 0
    assert (Bundle(bundle).manifest.costs == costs) == (not told)
    for option in ("--dry-run", "--force"):
        assert TOOL.run(bundle, option) == 0
        err = capsys.readouterr().err
        assert ("warning: other work disturbed the profile" in err) == bool(told)


def test_a_bundle_in_training_is_not_profiled_but_for_a_dry_run(
    bundle: Path, capsys: Capture
) -> None:
    before = (bundle / "dash.json").read_bytes()
    with locked(bundle, TRAINING):
        assert f"another process is training {bundle}" in TOOL.refused(capsys, bundle, "--force")
        assert TOOL.run(bundle, "--dry-run") == 0
    assert (bundle / "dash.json").read_bytes() == before


def test_a_bundle_that_is_replaced_meanwhile_stays_as_it_is(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = Bundle(bundle).manifest.costs

    def measure(*_: object) -> Costs:
        with_scorer(bundle)
        with pytest.raises(BundleError, match="profiling it"), locked(bundle, TRAINING):
            pass
        return costs

    monkeypatch.setattr("dash_onnx.runtime.profile.measure", measure)
    assert "was replaced meanwhile" in TOOL.refused(capsys, bundle, "--force")
    assert Bundle(bundle).manifest.scorer is not None
    with locked(bundle, TRAINING):  # left by no one
        pass


def test_steady_work_on_every_core_is_noticed() -> None:
    cores = os.cpu_count() or 1
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * cores)]
    try:
        assert taken_share(cores, seconds=1.0) > 0.4
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_the_spread_tells_how_steady_the_times_are() -> None:
    steady, shaken = ([1.0] * 20, [1.0] * 8 + [1.4] * 12)

    def spread(ms: list[float]) -> float:
        return spread_of(Times([{"int8": ms}, {"int8": ms}], {"int8": ms}))

    assert spread(steady) == 0 and spread(shaken) == pytest.approx(0.4)


def test_a_fused_folder_is_said_to_keep_its_costs(bundle: Path, capsys: Capture) -> None:
    (bundle / "fused").mkdir()
    assert TOOL.run(bundle, "--dry-run") == 0
    assert "dash-fuse" not in capsys.readouterr().err
    assert TOOL.run(bundle, "--force") == 0
    assert f"dash-fuse '{bundle}' --overwrite" in capsys.readouterr().err


def test_what_is_no_bundle_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert "no bundle" in TOOL.refused(capsys, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model name\t: A\nflags\t\t: avx avx2", "A (AVX2)"),
        ("model name\t: A\nflags\t\t: avx2 avx512f avx512_vnni", "A (AVX-512 VNNI)"),
        ("model name\t: A\nflags\t\t: amx_int8 avx512_vnni avx2", "A (AMX)"),
        ("model name\t: A\nflags\t\t: sse2", "A"),
        ("model name\t: A\nFeatures\t: asimd asimddp", "A (DotProd)"),
    ],
)
def test_a_machine_is_named_with_its_instructions(
    text: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: text)
    assert machine_name() == f"{told}, {platform.machine()}"
