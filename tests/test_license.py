"""License, model card and revision of a model come along into its bundle and are named there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli_tool import Capture, Tool
from gguf_files import write_model
from gguf_models import tiny_model
from huggingface_hub import metadata_load
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.cli.info import main
from dash_onnx.cli.plans import plans_table
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.card import card
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.export.losses import SEQUENCES, held_out
from dash_onnx.exporters.fused import FuseOptions, fuse
from dash_onnx.exporters.sources import open_source

INFO = Tool("dash-info", main)
CARD = "---\nlicense: apache-2.0\ntags: [a, b]\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def licensed(
    tiny_folder: Path,
    night: Path,
    export_tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle of a model with documents."""
    folder = tmp_path_factory.mktemp("licensed") / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "Notice").write_text("thanks")
    (folder / "COPYING").write_bytes(b"x" * (2 << 20))  # too large to be a license
    (folder / "notes.md").write_text("other")
    return export_tiny(folder, calibration=(night,), variants=("int8",))


def test_the_documents_are_part_of_the_bundle(licensed: Path) -> None:
    files = Bundle(licensed).manifest.files
    found = [name for name in files if name.startswith("source/")]
    assert sorted(found) == ["source/LICENSE.txt", "source/Notice", "source/README.md"]
    assert (licensed / "source/README.md").read_text() == CARD


def test_the_license_is_named(licensed: Path, tiny_bundle: Path, capsys: Capture) -> None:
    assert INFO.json_of(capsys, licensed)["export"]["license"] == "apache-2.0"
    assert INFO.run(licensed) == 0
    assert "license apache-2.0, see source/" in capsys.readouterr().out
    assert INFO.run(tiny_bundle) == 0
    assert "license not stated by the source" in capsys.readouterr().out


def test_a_fused_folder_has_the_documents(licensed: Path, tmp_path: Path) -> None:
    fuse(Bundle(licensed), tmp_path / "fused", FuseOptions(), overwrite=False)
    assert (tmp_path / "fused/source/LICENSE.txt").read_text() == "terms"


@pytest.mark.parametrize(
    ("front", "license"),
    [
        ("license: mit", "mit"),
        ("license: other\nlicense_name: my-terms", "my-terms"),
        ("license: other", "other"),
        ("license: [mit, bsd]", None),
        ("tags: [a]", None),
        ("license: [", None),
        ('license: "two\\nlines"', "two lines"),
    ],
)
def test_a_card_names_the_license_or_is_ignored(
    front: str, license: str | None, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Tiny\n")
    assert open_source(str(folder), REGISTRY).license == license


def test_the_metadata_of_a_gguf_file_name_the_license(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    (tmp_path / "LICENSE").write_text("of something else in this folder")
    write_model(file, tiny_model("llama"), lambda writer: writer.add_license("apache-2.0"))
    source = open_source(str(file), REGISTRY)
    assert source.license == "apache-2.0" and source.documents == ()


def test_the_model_card_has_what_a_hub_reads_and_the_figures(
    licensed: Path, tmp_path: Path
) -> None:
    text = (licensed / "README.md").read_text("utf-8")
    manifest = Bundle(licensed).manifest
    assert text == card(manifest)
    front = metadata_load(licensed / "README.md")
    assert front is not None
    assert front["license"] == "apache-2.0" and front["pipeline_tag"] == "text-generation"
    assert "[source/LICENSE.txt](source/LICENSE.txt)" in text
    assert "| `balanced` |" in text and manifest.costs.machine in text
    assert manifest.scorer is None and "KL: against full precision, on" in text
    assert "pip install '.[cpu]'    # in a clone" in text  # the package is not on PyPI


@pytest.mark.parametrize(("sequences", "text"), [(31, "calibration"), (32, "held-out")])
def test_the_text_that_losses_were_measured_on_is_named(
    sequences: int, text: str, licensed: Path
) -> None:
    manifest = Bundle(licensed).manifest
    calibration = replace(manifest.calibration, sequences=sequences)
    assert held_out(sequences) == (SEQUENCES if text == "held-out" else 0)
    manifest = replace(manifest, calibration=calibration)
    assert f"KL: against full precision, on {text} text." in card(manifest)
    assert f"in nats on {text} text" in "\n".join(plans_table(manifest))


def test_a_training_holds_text_out_whatever_the_export_did(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path / "out")))
    manifest = Bundle(folder).manifest
    manifest = replace(manifest, calibration=replace(manifest.calibration, sequences=2))
    assert ", on held-out text." in card(manifest)


def test_the_model_card_names_the_model_on_the_hub(licensed: Path) -> None:
    data = json.loads(Bundle(licensed).manifest.to_text())
    for source, base in [
        ("hub:org/name@c0ffee", 'base_model: "org/name"'),
        ("gguf:org/name/file-Q4_0@c0ffee", 'base_model: "org/name"'),
        ("gguf:file", ""),
    ]:
        data["export"]["source"] = source
        text = card(Manifest.from_text(json.dumps(data)))
        assert (base in text) if base else ("base_model" not in text)


def test_a_bundle_without_documents_and_license_loads(licensed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(licensed, tmp_path / "out")
    shutil.rmtree(folder / "source")
    data = json.loads((folder / "dash.json").read_text("utf-8"))
    data["files"] = {name: f for name, f in data["files"].items() if "source/" not in name}
    del data["export"]["license"]
    (folder / "dash.json").write_text(json.dumps(data))
    with dash_onnx.load(folder) as model:
        assert model.manifest.export.license is None
        assert len(list(model.generate_step([5, 6], max_new_tokens=2, ignore_eos=True))) == 2
