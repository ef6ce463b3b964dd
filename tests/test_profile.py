"""`dash-profile`: another machine's costs in the same bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_tool import Capture, Tool

from dash_onnx.cli.profile import main
from dash_onnx.core.bundle import Bundle

TOOL = Tool("dash-profile", main)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "out"))


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_costs_are_measured_again_and_nothing_else_changes(
    bundle: Path, capsys: Capture
) -> None:
    before, files = Bundle(bundle).manifest, files_of(bundle)
    found = TOOL.json_of(capsys, bundle)
    after = Bundle(bundle).manifest
    assert found["layers_ms"] == [dict(layer) for layer in after.costs.layers_ms]
    assert after.costs != before.costs
    assert after.files == before.files and after.layers == before.layers
    files["dash.json"] = after.to_text().encode()
    assert files_of(bundle) == files


def test_a_dry_run_prints_and_leaves_the_bundle(bundle: Path, capsys: Capture) -> None:
    before = (bundle / "dash.json").read_bytes()
    assert TOOL.run(bundle, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "one layer, skip" in printed and "a token, all layers full" in printed
    assert (bundle / "dash.json").read_bytes() == before


def test_a_fused_folder_is_said_to_keep_its_costs(bundle: Path, capsys: Capture) -> None:
    (bundle / "fused").mkdir()
    assert TOOL.run(bundle, "--dry-run") == 0
    assert capsys.readouterr().err == ""
    assert TOOL.run(bundle) == 0
    assert f"dash-fuse {bundle} --overwrite" in capsys.readouterr().err


def test_what_is_no_bundle_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert "no bundle" in TOOL.refused(capsys, tmp_path)
