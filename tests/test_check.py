"""The comparison of an export with transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tool import Capture, Tool
from conftest import save_tiny
from families import CASES, save_random
from safetensors.torch import load_file, save_file

from dash_onnx.cli.export import main
from dash_onnx.core.actions import Action
from dash_onnx.core.bundle import Bundle, file_facts
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.export.check import (
    CUDA_LIMIT,
    LIMITS,
    CheckKind,
    CheckResult,
    CheckRow,
    check,
    token_kl,
)
from dash_onnx.exporters.sources import open_source

TOOL = Tool("dash-export", main)
LAYERS = 4


def checked(source: Path, bundle: Path, kind: CheckKind) -> CheckResult:
    return check(open_source(str(source), REGISTRY), Bundle(bundle), kind)


@pytest.mark.parametrize("level", [0, 4], ids=["exact", "as shipped"])
def test_all_graphs_and_the_whole_path_equal_transformers_as_far_as_they_are_rounded(
    level: int, tiny_folder: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = export_tiny(tiny_folder, calibration=(night,), accuracy_level=level)
    result = checked(tiny_folder, bundle, "full")
    assert [row.name for row in result.rows] == ["embedding", *map(str, range(LAYERS)), "all"]
    assert result.failures == [] and result.tokens > 200
    for row in result.rows:
        assert row.errors["full"] < 1e-5, row
    for row in result.rows[1:-1]:
        assert row.errors["full"] < row.errors["int8"] < row.errors["int4"] < row.errors["skip"]
        assert set(row.limits) == {"full", "int8", "int4"}


@pytest.mark.parametrize("name", ["granite", "gemma2", "stablelm parallel"])
def test_families_whose_layers_are_folded_equal_transformers(
    name: str, tmp_path: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    source = save_random(tmp_path / "source", CASES[name])
    result = checked(source, export_tiny(source, calibration=(night,), variants=("full",)), "quick")
    assert result.failures == []
    for row in result.rows[:-1]:
        assert row.errors["full"] < 1e-4, row


@pytest.mark.parametrize("variants", [("full", "int8", "int4"), ("int8",), ("int4",)], ids="+".join)
def test_the_quick_form_runs_the_highest_precision_and_takes_the_rest_from_the_calibration(
    variants: tuple[Action, ...],
    tiny_folder: Path,
    night: Path,
    export_tiny: Callable[..., Path],
) -> None:
    bundle, best = export_tiny(tiny_folder, calibration=(night,), variants=variants), variants[0]
    result = checked(tiny_folder, bundle, "quick")
    assert result.failures == []
    for row, facts in zip(result.rows[1:-1], Bundle(bundle).manifest.layers, strict=True):
        assert row.limits == {action: LIMITS[action] for action in variants}
        assert row.errors == {**facts.relative_error, best: row.errors[best]}
        if best == "full":
            assert row.errors["full"] < 1e-5
        else:  # of another text than the calibration's
            assert facts.relative_error[best] / 4 < row.errors[best] < LIMITS[best]
            assert row.errors[best] != facts.relative_error[best]


@pytest.mark.parametrize("action", ["full", "int8", "int4"])
def test_a_graph_of_another_layer_is_found(
    action: Action, tiny_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "changed"))
    manifest = Bundle(folder).manifest
    files = dict(manifest.files)
    for end in ("", ".data"):
        changed, other = (f"layers/{layer:02d}/{action}.onnx{end}" for layer in (2, 1))
        shutil.copy(folder / other, folder / changed)
        files[changed] = file_facts(folder / changed)
    (folder / "dash.json").write_text(dataclasses.replace(manifest, files=files).to_text())
    result = checked(tiny_folder, folder, "full")
    wrong = {(row.name, name) for row in result.rows for name in row.exceeded}
    assert wrong == ({("2", "full"), ("all", "full")} if action == "full" else {("2", action)})
    assert any(failure.startswith(f"layer 2, {action}: ") for failure in result.failures)


def test_a_bundle_for_cuda_is_compared_in_fp16(
    tiny_folder: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = export_tiny(tiny_folder, calibration=(night,), variants=("full",), device="cuda")
    result = checked(tiny_folder, bundle, "full")
    assert result.failures == []
    assert result.rows[1].limits["full"] == CUDA_LIMIT
    assert 1e-5 < result.rows[1].errors["full"]


def test_figures_that_are_no_numbers_exceed_every_limit() -> None:
    assert CheckRow("0", {"full": float("nan")}, {"full": 1.0}).exceeded == ["full"]


def arguments(source: Path, night: Path, out: Path, *more: str) -> tuple[object, ...]:
    chosen = ("--effort", "none", "--variants", "full", "--calibration", night)
    return (source, out, *chosen, *more)


def test_the_tool_checks_quickly_unless_told_otherwise(
    tiny_folder: Path, night: Path, tmp_path: Path, capsys: Capture
) -> None:
    def shown(name: str, *more: str) -> str:
        assert TOOL.run(*arguments(tiny_folder, night, tmp_path / name, *more)) == 0
        return capsys.readouterr().out

    assert "\nagainst transformers on 64 tokens: full layers differ by at most" in shown("a")
    _, _, table = shown("b", "--check", "full").partition("limits exceeded\n")
    rows = [line.split()[0] for line in table.splitlines()[:6]]
    assert rows == ["embedding", "0", "1", "2", "3", "all"]
    assert "transformers" not in shown("c", "--check", "none")
    assert "not compared with transformers" in shown("d", "--max-length", "4")  # sinks alone


def test_a_limit_that_is_exceeded_is_exit_code_1_and_a_line_for_each(
    night: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Values in a layer that FP16 holds with a few bits only, and weights that make up for it."""
    source = save_tiny(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 2.0**-20
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 2.0**20
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert (
        TOOL.run(*arguments(source, night, tmp_path / "out", "--json", "--log-level", "warning"))
        == 1
    )
    captured = capsys.readouterr()
    layer, whole = captured.err.splitlines()
    assert layer.startswith("dash-export: warning: check: layer 1, full: error ")
    assert layer.endswith(" above its limit of 0.002; do not use this bundle")
    assert whole.startswith("dash-export: warning: check: all layers, full: error ")
    found = json.loads(captured.out)["check"]
    assert found["kind"] == "quick" and found["rows"][0]["name"] == "embedding"
    assert (tmp_path / "out" / "dash.json").is_file()  # the bundle is there to be looked at


def test_the_kl_is_that_of_the_tokens_after_the_sinks() -> None:
    wanted = torch.tensor(np.random.default_rng(0).normal(size=(6, 5)))
    found = wanted.clone()
    found[:4] += torch.arange(5.0)  # sinks
    assert token_kl(wanted, found).tolist() == [0.0, 0.0]
    found[5] += torch.arange(5.0)
    p, q = wanted[5].softmax(0), found[5].softmax(0)
    assert float(token_kl(wanted, found)[1]) == pytest.approx(float((p * (p / q).log()).sum()))
