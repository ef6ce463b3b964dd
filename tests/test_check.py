"""The comparison of an export with transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_tool import Capture, Tool
from families import CASES, save_random

from dash_onnx.cli.export import main
from dash_onnx.core.actions import Action
from dash_onnx.core.bundle import Bundle, file_facts
from dash_onnx.exporters import check as module
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.check import Report, check
from dash_onnx.exporters.sources import open_source

TOOL = Tool("dash-export", main)
LAYERS = 4


def checked(source: Path, bundle: Path, kind: module.Kind) -> Report:
    return check(open_source(str(source), REGISTRY), Bundle(bundle), kind)


def with_files_of(bundle: Path, tmp_path: Path, layer: int, action: Action, other: int) -> Path:
    """A copy whose layer has the graph of another layer, as its manifest wants it."""
    folder = Path(shutil.copytree(bundle, tmp_path / "changed"))
    facts = dict(Bundle(folder).manifest.files)
    for end in ("", ".data"):
        name, theirs = (f"layers/{i:02d}/{action}.onnx{end}" for i in (layer, other))
        shutil.copy(folder / theirs, folder / name)
        facts[name] = file_facts(folder / name)
    manifest = dataclasses.replace(Bundle(bundle).manifest, files=facts)
    (folder / "dash.json").write_text(manifest.to_text())
    return folder


def test_full_layers_and_the_whole_path_equal_transformers(
    tiny_folder: Path, tiny_bundle: Path
) -> None:
    report = checked(tiny_folder, tiny_bundle, "full")
    assert [row.name for row in report.rows] == ["embedding", *map(str, range(LAYERS)), "all"]
    assert report.failures == [] and report.tokens > 200
    for row in report.rows:
        assert row.errors["full"] < 1e-5, row
    for row in report.rows[1:-1]:
        assert row.errors["full"] < row.errors["int8"] < row.errors["int4"] < row.errors["skip"]
        assert set(row.limits) == {"full", "int8", "int4"}


@pytest.mark.parametrize("name", ["granite", "gemma2", "stablelm parallel"])
def test_families_whose_layers_are_folded_equal_transformers(
    name: str, tmp_path: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    source = save_random(tmp_path / "source", CASES[name])
    report = checked(source, export_tiny(source, calibration=(night,)), "quick")
    assert report.failures == []
    for row in report.rows[:-1]:
        assert row.errors["full"] < 1e-4, row


def test_the_quick_form_takes_the_other_errors_from_the_calibration(
    tiny_folder: Path, tiny_bundle: Path
) -> None:
    report = checked(tiny_folder, tiny_bundle, "quick")
    assert report.failures == []
    for row, facts in zip(report.rows[1:-1], Bundle(tiny_bundle).manifest.layers, strict=True):
        assert row.errors == {**facts.relative_error, "full": row.errors["full"]}
        assert row.errors["full"] < 1e-5


@pytest.mark.parametrize("best", ["int8", "int4"])
def test_without_full_the_highest_precision_is_compared(
    best: Action, tiny_folder: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = export_tiny(tiny_folder, calibration=(night,), variants=(best,))
    report = checked(tiny_folder, bundle, "quick")
    assert report.failures == []
    limit = module.LIMITS[best]
    for row, facts in zip(report.rows[1:-1], Bundle(bundle).manifest.layers, strict=True):
        assert row.limits == {best: limit}
        # Of another text than the calibration's.
        assert facts.relative_error[best] / 4 < row.errors[best] < limit
        assert row.errors[best] != facts.relative_error[best]


@pytest.mark.parametrize("action", ["full", "int8", "int4"])
def test_a_graph_of_another_layer_is_found(
    action: Action, tiny_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    changed = with_files_of(tiny_bundle, tmp_path, 2, action, 1)
    report = checked(tiny_folder, changed, "full")
    wrong = {(row.name, name) for row in report.rows for name in row.exceeded}
    assert wrong == ({("2", "full"), ("all", "full")} if action == "full" else {("2", action)})
    assert any(failure.startswith(f"2 {action} ") for failure in report.failures)


def test_a_bundle_for_cuda_is_compared_in_fp16(
    tiny_folder: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = export_tiny(tiny_folder, calibration=(night,), variants=("full",), device="cuda")
    report = checked(tiny_folder, bundle, "full")
    assert report.failures == []
    assert report.rows[1].limits["full"] == module.CUDA_LIMIT
    assert 1e-5 < report.rows[1].errors["full"]


def test_figures_that_are_no_numbers_exceed_every_limit() -> None:
    row = module.Row("0", {"full": float("nan")}, {"full": 1.0})
    assert row.exceeded == ["full"]


def export(tiny_folder: Path, night: Path, out: Path, *more: str) -> tuple[object, ...]:
    chosen = ("--effort", "none", "--variants", "full", "--calibration", night)
    return (tiny_folder, out, *chosen, *more)


def test_the_tool_checks_quickly_unless_told_otherwise(
    tiny_folder: Path, night: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert TOOL.run(*export(tiny_folder, night, tmp_path / "a")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "against transformers on 64 tokens: full layers differ by at most" in last
    assert TOOL.run(*export(tiny_folder, night, tmp_path / "b", "--check", "full")) == 0
    shown = capsys.readouterr().out
    table = shown[shown.index("limits exceeded") :].splitlines()
    assert [line.split()[0] for line in table[1:7]] == ["embedding", "0", "1", "2", "3", "all"]
    assert TOOL.run(*export(tiny_folder, night, tmp_path / "c", "--check", "none")) == 0
    assert "transformers" not in capsys.readouterr().out


def test_a_limit_that_is_exceeded_is_exit_code_1_and_a_line_for_each(
    tiny_folder: Path,
    night: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LIMITS", {**module.LIMITS, "full": 1e-12})
    assert TOOL.run(*export(tiny_folder, night, tmp_path / "out", "--json")) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == LAYERS
    assert lines[1].startswith("dash-export: check: layer 1 full ")
    assert lines[1].endswith(" > 1e-12 (see dash-export --help)")
    rows = json.loads(captured.out)["check"]["rows"]
    assert rows[0]["name"] == "embedding"
    assert (tmp_path / "out" / "dash.json").is_file()  # the bundle is there to be looked at


def test_a_context_too_short_for_figures_is_not_compared(
    tiny_folder: Path, night: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert TOOL.run(*export(tiny_folder, night, tmp_path / "out", "--max-length", "4")) == 0
    assert "not compared with transformers" in capsys.readouterr().out


def test_the_kl_is_that_of_the_tokens_after_the_sinks() -> None:
    import torch

    wanted = torch.tensor(np.random.default_rng(0).normal(size=(6, 5)))
    found = wanted.clone()
    found[:4] += torch.arange(5.0)  # sinks
    assert module._kl(wanted, found).tolist() == [0.0, 0.0]
    found[5] += torch.arange(5.0)
    p, q = wanted[5].softmax(0), found[5].softmax(0)
    assert float(module._kl(wanted, found)[1]) == pytest.approx(float((p * (p / q).log()).sum()))
