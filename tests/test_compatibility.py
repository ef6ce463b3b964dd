"""A bundle of each format that is read: it loads, and says what it said when it was stored.

Where a change of the code breaks this test, users' bundles break. A new format version keeps the
stored bundle of the one before, written by the code of that format, and stores one of its own:

    python tests/test_compatibility.py tests/bundles/format-4.zip
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from cli_tool import Tool
from conftest import save_tiny
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.cli.run import main
from dash_onnx.core.card import card
from dash_onnx.core.contract import CARD_NAME
from dash_onnx.core.manifest import MANIFEST_NAME
from dash_onnx.core.version import FORMAT_VERSION
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.runtime.model import Model

RUN = Tool("dash-run", main)
STORED = sorted((Path(__file__).parent / "bundles").glob("format-*.zip"))
PROMPT = [52, 199, 250, 123, 80]  # no near-tie follows: any machine says the same
EXPECTED = "tokens.json"
POLICIES = ("int8", "int4", "dash")


def tokens_of(model: Model) -> dict[str, list[int]]:
    """Greedy tokens by policy."""
    return {
        policy: [
            step.token
            for step in model.generate_step(
                PROMPT, policy=policy, max_new_tokens=8, ignore_eos=True, speculate=False
            )
        ]
        for policy in POLICIES
    }


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_a_stored_bundle_says_what_it_said(stored: Path, tmp_path: Path) -> None:
    assert stored.stat().st_size < 200_000
    with zipfile.ZipFile(stored) as archive:
        archive.extractall(tmp_path)
    with dash_onnx.load(tmp_path) as model:
        assert tokens_of(model) == json.loads((tmp_path / EXPECTED).read_text("utf-8"))
        assert card(model.manifest)


def test_each_format_that_is_read_is_stored() -> None:
    read = (FORMAT_VERSION - 1, FORMAT_VERSION)
    assert [path.stem for path in STORED] == [f"format-{version}" for version in read]
    for path, version in zip(STORED, read, strict=True):
        with zipfile.ZipFile(path) as archive:
            assert json.loads(archive.read(MANIFEST_NAME))["format_version"] == version


@pytest.mark.parametrize("version", [FORMAT_VERSION - 2, FORMAT_VERSION + 1])
def test_any_other_format_is_refused_in_one_line(
    version: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(STORED[0]) as archive:
        archive.extractall(tmp_path)
    manifest = tmp_path / MANIFEST_NAME
    data = json.loads(manifest.read_text("utf-8"))
    manifest.write_text(json.dumps({**data, "format_version": version}), "utf-8")
    message = RUN.refused(capsys, tmp_path, "the keeper")
    versions = f"versions {FORMAT_VERSION - 1} and {FORMAT_VERSION}"
    assert f"has format version {version}; this dash-onnx reads {versions}" in message
    assert "export again" in message


def store(target: Path) -> None:
    """Stores a tiny bundle of two layers and the tokens that it says."""
    with tempfile.TemporaryDirectory() as name:
        model, out = Path(name) / "model", Path(name) / "out"
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        save_tiny(model, num_hidden_layers=2, intermediate_size=64, **sizes)
        text = Path(name) / "text.txt"
        text.write_text("the keeper counts the ships that pass in the night\n" * 200)
        export(str(model), out, ExportOptions(calibration=(text,)))
        with_scorer(out)
        (out / CARD_NAME).unlink()
        with dash_onnx.load(out) as loaded:
            (out / EXPECTED).write_text(json.dumps(tokens_of(loaded)) + "\n", "utf-8")
        target.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(path for path in out.rglob("*") if path.is_file()):
                archive.write(path, path.relative_to(out))


if __name__ == "__main__":
    store(Path(sys.argv[1]))
