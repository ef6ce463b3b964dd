"""The manifest `dash.json`: written once, read strictly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scored_bundle import made_up

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import BundleError
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.version import FORMAT_VERSION


@pytest.fixture(scope="module")
def text(tiny_bundle: Path) -> str:
    """What the exporter wrote."""
    return (tiny_bundle / "dash.json").read_text("utf-8")


def edited(text: str, edit: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(text)
    edit(data)
    return json.dumps(data)


def test_a_manifest_is_written_as_it_was_read(tiny_bundle: Path, text: str) -> None:
    written = Manifest.from_text(text).to_text()
    assert written.encode() == (tiny_bundle / "dash.json").read_bytes()
    assert Manifest.from_text(written) == Manifest.from_text(text)


def test_keys_are_sorted_and_the_text_ends_with_one_newline(text: str) -> None:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        assert keys == sorted(keys)
        return dict(pairs)

    json.loads(text, object_pairs_hook=check)
    assert text.endswith("}\n")
    assert not text.endswith("\n\n")


def test_text_outside_ascii_is_written_as_it_is(text: str) -> None:
    manifest = Manifest.from_text(edited(text, lambda data: data["model"].update(name="小模型")))
    assert '"name": "小模型"' in manifest.to_text()


@pytest.mark.parametrize(
    "version", [0, FORMAT_VERSION - 2, FORMAT_VERSION + 1, str(FORMAT_VERSION), None]
)
def test_another_format_version_is_refused_and_both_are_named(text: str, version: object) -> None:
    changed = edited(text, lambda data: data.update(format_version=version))
    with pytest.raises(BundleError) as caught:
        Manifest.from_text(changed, "here/dash.json")
    assert str(caught.value).startswith(f"here/dash.json has format version {version};")
    assert f"and {FORMAT_VERSION}:" in str(caught.value)


def test_a_document_without_version_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="has format version None"):
        Manifest.from_text(edited(text, lambda data: data.pop("format_version")))


def test_another_version_is_told_before_any_key_it_may_have_changed(text: str) -> None:
    with pytest.raises(BundleError, match="has format version 99"):
        Manifest.from_text('{"format_version": 99, "shards": []}')


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(colour="red"), "unknown key 'colour'"),
        (lambda data: data["target"].update(colour=1), "unknown key 'target.colour'"),
        (lambda data: data["layers"][2].update(colour=1), r"unknown key 'layers\[2\].colour'"),
        (lambda data: data["files"]["embed.onnx"].update(x=1), "unknown key 'files.embed.onnx.x'"),
        (lambda data: data.pop("heads"), "missing key 'heads'"),
        (lambda data: data["model"].pop("head_dim"), "missing key 'model.head_dim'"),
        (lambda data: data["target"].update(device="tpu"), "'target.device' must be one of"),
        (lambda data: data.update(kv_of_skipped="project"), "unknown key 'kv_of_skipped'"),
        (lambda data: data["heads"].update(int8="int3"), "'heads.int8' must be one of"),
        (lambda data: data["model"].update(num_layers="4"), "'model.num_layers' must be int"),
    ],
)
def test_a_manifest_of_another_form_is_refused_by_the_key(
    text: str, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(BundleError, match=rf"^b/dash\.json: {message}.*; export again$"):
        Manifest.from_text(edited(text, edit), "b/dash.json")


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data["layers"].pop(),
        lambda data: data["layers"].append(data["layers"][0]),
        lambda data: data["model"].update(num_layers=5),
    ],
)
def test_a_wrong_number_of_layers_is_refused(
    text: str, edit: Callable[[dict[str, Any]], object]
) -> None:
    with pytest.raises(BundleError, match=r"^b: (layers|attention) describes \d layers of \d"):
        Manifest.from_text(edited(text, edit), "b")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["model"].update(head_dim=2**31 - 1), "too small for the sizes"),
        (lambda data: data.update(ropes=data["ropes"] * 1000), "ropes lists more than files"),
        (lambda data: data.update(layers=data["layers"] * 1000), "layers lists more than files"),
        (lambda data: data["model"].update(name="x" * 16_000_000), "longer than that of any"),
        (lambda data: data["costs"]["layers_ms"][0].update(int4=1e18), "costs must lie"),
        (lambda data: data["costs"]["layers_ms"][0].update(int4=1e-300), "costs must lie"),
        (lambda data: data["costs"].update(embed_ms=1e18), "costs must be"),
        (lambda data: data["costs"]["whole"].update(int4=0.0), "costs.whole must lie"),
        *(
            (lambda data, key=key: data["costs"]["whole"].update({key: 1.0}), "costs.whole names")
            for key in ("skip", "844 int4", "8442 skip", "decided int4 int8", "")
        ),
        (lambda data: data["ropes"][0].update(inv_freq=[-1e18]), "ropes has a number"),
        (lambda data: data.update(ropes=data["ropes"] * 7), "more than the layers can use"),
    ],
)
def test_what_no_bundle_can_claim_is_refused_at_once(
    text: str, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    changed, started = edited(text, edit), time.monotonic()
    with pytest.raises(BundleError, match=message):
        Manifest.from_text(changed)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("file", ["embed.onnx", "layers/01/skip.onnx", "tokenizer.json"])
def test_a_scorer_that_is_another_file_of_the_bundle_is_refused(
    tiny_bundle: Path, file: str
) -> None:
    """`dash-train` removes the file of an earlier scorer."""
    manifest = Bundle(tiny_bundle).manifest
    scored = replace(manifest, scorer=made_up(manifest, file))
    with pytest.raises(BundleError, match="not the name of a scorer; train again"):
        Manifest.from_text(scored.to_text())


@pytest.mark.parametrize("cut", [0, 1, 1000, -3])
def test_a_truncated_text_is_not_json(text: str, cut: int) -> None:
    with pytest.raises(BundleError, match=r"^b is not valid JSON .*; export again$"):
        Manifest.from_text(text[:cut], "b")


@pytest.mark.parametrize("content", ["[]", "null", "1", '"dash"'])
def test_json_that_is_no_object_is_refused(content: str) -> None:
    with pytest.raises(BundleError, match=r"^b has format version None"):
        Manifest.from_text(content, "b")


def test_json_nested_beyond_the_parser_is_refused() -> None:
    with pytest.raises(BundleError):
        Manifest.from_text("[" * 200_000, "b")


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda data: data["heads"].pop("skip"), "heads"),
        (lambda data: data["heads"].pop("int4"), "heads"),
        (lambda data: data.update(variants=[]), "variants"),
        (lambda data: data["variants"].append("skip"), "variants"),
    ],
)
def test_variants_and_heads_that_the_runtime_cannot_run_are_refused(
    text: str, edit: Callable[[dict[str, Any]], object], key: str
) -> None:
    with pytest.raises(BundleError, match=key):
        Manifest.from_text(edited(text, edit))


def test_actions_are_the_variants_and_skip(text: str) -> None:
    only = edited(
        text,
        lambda data: data.update(
            variants=["int8"], heads={"int8": "int8", "skip": "int8"}, static=[]
        ),
    )
    assert Manifest.from_text(text).actions == ("full", "int8", "int4", "skip")
    assert Manifest.from_text(only).actions == ("int8", "skip")


def test_dims_follow_from_model_rope_and_target(text: str) -> None:
    manifest = Manifest.from_text(text)
    dims = manifest.dims
    assert (dims.hidden_size, dims.num_kv_heads, dims.head_dim) == (64, 2, 16)
    assert dims.rotary_dim == 2 * len(manifest.ropes[0].inv_freq) == 16
    assert dims.dtype == manifest.target.dtype == "float32"


def test_a_manifest_of_the_format_before_is_read(text: str) -> None:
    """Format 3 had no wide form, one attention, and timed no passes of several rows."""
    manifest = Manifest.from_text(text)
    now = replace(manifest, wide=None, costs=replace(manifest.costs, passes=None, whole={}))

    def age(data: dict[str, Any]) -> None:
        data["format_version"] = 3
        del data["wide"], data["costs"]["passes"], data["target"]["attention"]
        del data["costs"]["whole"]

    assert Manifest.from_text(edited(now.to_text(), age)) == now
