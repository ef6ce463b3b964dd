"""Bundles: every path and checksum checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import dash_onnx
from dash_onnx.core.bundle import Bundle, file_facts, list_files
from dash_onnx.core.errors import BundleError

LAYER = "layers/01/int4.onnx"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "parent" / "bundle"))


def edit_manifest(folder: Path, files: dict[str, Any]) -> None:
    """Adds entries to the list of files; None removes one."""
    path = folder / "dash.json"
    data = json.loads(path.read_text("utf-8"))
    for name, facts in files.items():
        if facts is None:
            del data["files"][name]
        else:
            data["files"][name] = facts
    path.write_text(json.dumps(data), "utf-8")


def flip(path: Path) -> None:
    """Changes one byte in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def test_a_whole_bundle_opens_and_every_file_is_verified(tiny_bundle: Path) -> None:
    bundle = Bundle(str(tiny_bundle))
    assert LAYER in bundle.manifest.files
    for name in bundle.manifest.files:
        assert name in bundle
        assert bundle.verified(name) == tiny_bundle / name


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("missing", "there is no such folder"),
        ("empty folder", "dash.json is missing"),
        ("file", "it is a file"),
    ],
)
def test_where_no_bundle_is_the_command_that_makes_one_is_told(
    tmp_path: Path, kind: str, why: str
) -> None:
    path = tmp_path / "my $out"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("x")
    with pytest.raises(BundleError) as told:
        Bundle(path)
    assert f"no bundle at {path}: {why}" in str(told.value)
    out = "BUNDLE" if kind == "file" else f"'{path}'"  # a file is not written over
    assert f"`dash-export MODEL {out}`" in str(told.value)


@pytest.mark.parametrize("name", ["my model.gguf", "folder"])
def test_where_a_model_is_the_command_that_exports_it_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    if name == "folder":
        path = tmp_path / "my model"
        path.mkdir()
        (path / "config.json").write_text("{}")
    with pytest.raises(BundleError) as told:
        Bundle(path)
    assert f"`dash-export '{path}' 'my model-onnx'`" in str(told.value)


def test_a_gguf_file_that_is_not_there_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no such file"):
        Bundle(tmp_path / "model.gguf")


def test_no_folder_that_holds_files_is_proposed_for_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BundleError, match="`dash-export MODEL BUNDLE`"):
        Bundle(tmp_path)


def test_a_manifest_that_is_not_text_is_refused(bundle: Path) -> None:
    (bundle / "dash.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="is not UTF-8 text"):
        Bundle(bundle)


@pytest.mark.parametrize("name", [LAYER, LAYER + ".data", "embed.onnx", "tokenizer.json"])
def test_a_missing_file_is_named_at_opening(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{bundle / name} is missing from the bundle"):
        Bundle(bundle)


def test_a_folder_in_place_of_a_file_is_refused(bundle: Path) -> None:
    (bundle / LAYER).unlink()
    (bundle / LAYER).mkdir()
    with pytest.raises(BundleError, match="is missing from the bundle"):
        Bundle(bundle)


@pytest.mark.parametrize("size", [0, -1])
def test_a_truncated_file_is_named_at_opening(bundle: Path, size: int) -> None:
    path = bundle / (LAYER + ".data")
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(BundleError, match=f"{path} has .* bytes, .* says {len(content)}: trunc"):
        Bundle(bundle)


@pytest.mark.parametrize("name", [LAYER, LAYER + ".data"])
def test_an_edit_of_equal_size_is_found_when_the_graph_is_used(bundle: Path, name: str) -> None:
    flip(bundle / name)
    opened = Bundle(bundle)
    assert opened.verified("layers/01/full.onnx") == bundle / "layers/01/full.onnx"
    for _ in range(2):  # a failed check is not taken for a passed one
        with pytest.raises(BundleError, match=f"{bundle / name} does not match its SHA-256"):
            opened.verified(LAYER)


def test_edited_weights_are_refused_by_the_run_that_needs_them(bundle: Path) -> None:
    flip(bundle / (LAYER + ".data"))
    model = dash_onnx.load(bundle)
    assert model.logits([5, 6, 7], policy="full").shape[0] == 3
    for _ in range(2):
        with pytest.raises(BundleError, match=r"int4\.onnx\.data does not match its SHA-256"):
            model.logits([5, 6, 7], policy="int4")
    assert model.logits([5, 6, 7], policy="int8").shape[0] == 3


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
def test_edited_text_files_are_refused_at_load(bundle: Path, name: str) -> None:
    flip(bundle / name)
    with pytest.raises(BundleError, match=f"{name} does not match its SHA-256"):
        dash_onnx.load(bundle)


def test_weights_that_the_manifest_does_not_list_are_not_used(bundle: Path) -> None:
    edit_manifest(bundle, {LAYER + ".data": None})
    flip(bundle / (LAYER + ".data"))
    with pytest.raises(BundleError, match=r"int4\.onnx\.data"):
        Bundle(bundle).verified(LAYER)


def test_a_file_that_vanishes_after_opening_is_a_bundle_error(bundle: Path) -> None:
    opened = Bundle(bundle)
    (bundle / LAYER).unlink()
    with pytest.raises(BundleError, match=LAYER):
        opened.verified(LAYER)


def test_a_file_that_is_not_part_of_the_bundle_is_refused(bundle: Path) -> None:
    (bundle / "extra.onnx").write_bytes(b"x")
    opened = Bundle(bundle)
    assert "extra.onnx" not in opened
    with pytest.raises(BundleError, match=r"has no extra\.onnx"):
        opened.verified("extra.onnx")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "layers/../../x",
        "layers/../embed.onnx",
        "..",
        "/etc/passwd",
        "..\\x",
        "layers\\x",
        "C:x",
        "a\0b",
    ],
)
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, name: str) -> None:
    (bundle.parent / "x").write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    edit_manifest(bundle, {name: {"bytes": 6, "sha256": digest}})
    with pytest.raises(BundleError, match="which is outside the bundle; refused") as caught:
        Bundle(bundle)
    assert repr(name) in str(caught.value)


def test_an_absolute_path_is_refused_even_if_it_leads_into_the_bundle(bundle: Path) -> None:
    facts = {"bytes": 1, "sha256": ""}
    edit_manifest(bundle, {str(bundle / "embed.onnx"): facts})
    with pytest.raises(BundleError, match="which is outside the bundle; refused"):
        Bundle(bundle)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_out_of_the_bundle_is_refused(bundle: Path, kind: str) -> None:
    place = bundle / (LAYER if kind == "file" else "layers")
    place.rename(bundle.parent / "moved")
    place.symlink_to(bundle.parent / "moved")
    with pytest.raises(BundleError, match="which is outside the bundle; refused"):
        Bundle(bundle)


def test_a_link_to_the_bundle_opens(bundle: Path) -> None:
    link = bundle.parent / "link"
    link.symlink_to(bundle)
    assert Bundle(link).verified(LAYER) == link / LAYER


def test_facts_are_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    facts = file_facts(tmp_path / "x")
    assert facts.bytes == 3
    assert facts.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_files_are_listed_by_posix_path_without_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/b/c.onnx", "d.json", "dash.json"):
        (tmp_path / name).write_text(name)
    assert sorted(list_files(tmp_path)) == ["a/b/c.onnx", "d.json"]


def test_the_card_is_not_listed_but_a_document_of_its_name_is(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("README.md", "source/README.md"):
        (tmp_path / name).write_text(name)
    assert [*list_files(tmp_path)] == ["source/README.md"]


def test_a_pinned_bundle_opens_and_no_other(tiny_bundle: Path) -> None:
    digest = file_facts(tiny_bundle / "dash.json").sha256
    assert Bundle(tiny_bundle, sha256=digest.upper()).manifest
    with pytest.raises(BundleError, match="not the pinned one: its SHA-256 differs"):
        Bundle(tiny_bundle, sha256="0" * 64)
