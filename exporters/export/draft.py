"""A draft bundle: INT8 alone, which needs no calibration, to write the text for the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dash_onnx.core.actions import SKIP
from dash_onnx.core.bundle import Bundle, list_files
from dash_onnx.core.facts import (
    INT8_INPUTS,
    Calibration,
    Costs,
    ExportFacts,
    LayerFacts,
    Target,
)
from dash_onnx.core.manifest import MANIFEST_NAME, Manifest
from dash_onnx.core.progress import Loop
from dash_onnx.core.version import FORMAT_VERSION
from dash_onnx.exporters.architectures.base import ModelSpec
from dash_onnx.exporters.architectures.decoder import Decoder
from dash_onnx.exporters.graphs import build_embed, build_head, build_layer
from dash_onnx.exporters.sources import Source
from dash_onnx.runtime.machine import release_memory
from dash_onnx.runtime.ort import has_device


def untrained_manifest(spec: ModelSpec, target: Target, **facts: Any) -> Manifest:
    """The manifest of a bundle before its costs are profiled and a policy is trained.

    Args:
        spec: description of the model.
        target: what it is built for.
        facts: the other fields of `Manifest`.
    """
    return Manifest(
        format_version=FORMAT_VERSION,
        model=spec.facts,
        block=spec.block,
        ropes=spec.ropes,
        attention=spec.attention,
        mixers=spec.mixers,
        recurrence=spec.recurrence,
        target=target,
        costs=Costs("", 0, 0.0, 0.0, {}, ()),
        scorer=None,
        **facts,
    )


def write_draft(
    folder: Path, source: Source, architecture: Decoder, spec: ModelSpec, target: Target
) -> Bundle:
    """Writes a bundle of INT8 layers, for the CPU if its own device is not available.

    Args:
        folder: an empty one.
        source: source of the weights.
        architecture: family of the model.
        spec: description of the model.
        target: target of the bundle to be exported.
    """
    target = replace(target, kv_cache="float", attention="grouped")  # no scales, no costs yet
    if not has_device(target.device) or target.device == "cpu":
        target = Target("cpu", "float32", target.block_size, INT8_INPUTS)  # the fastest
    table = architecture.embedding(source.weights, spec)
    build_embed(folder, table, spec, target, architecture.per_layer(source.weights, spec), True)
    count = spec.facts.num_layers
    for index in Loop("INT8 draft", range(count)):
        layer = architecture.layer(source.weights, index, spec)
        build_layer(folder, index, layer, spec, target, "int8", {})
    build_head(folder, architecture.head(source.weights, spec), spec, target, "int8", {})
    release_memory()
    manifest = untrained_manifest(
        spec,
        target,
        variants=("int8",),
        heads={"int8": "int8", SKIP: "int8"},
        compensation_rank=0,
        layers=(LayerFacts(1.0, 1.0, {}, {}),) * count,
        calibration=Calibration("", 0, 0, 0, 0, ""),
        export=ExportFacts("", {}, 0.0, 0, ()),
        files=list_files(folder),
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_text(), "utf-8")
    return Bundle(folder, manifest)
