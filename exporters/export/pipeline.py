"""The export pipeline: source model in, bundle out, one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dash_onnx.core.atomic import check_destination, check_room
from dash_onnx.core.bundle import Bundle, list_files
from dash_onnx.core.card import write_card
from dash_onnx.core.contract import EMBED_PATH
from dash_onnx.core.errors import DashError
from dash_onnx.core.facts import ExportFacts, ModelFacts
from dash_onnx.core.manifest import MANIFEST_NAME, Manifest
from dash_onnx.core.progress import Loop, Phase
from dash_onnx.core.version import __version__
from dash_onnx.exporters.architectures import REGISTRY, architecture_of
from dash_onnx.exporters.calibration.tokens import calibration_ids, sequences_of
from dash_onnx.exporters.export.draft import untrained_manifest, write_draft
from dash_onnx.exporters.export.graph_writer import GraphWriter
from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.export.partial import Progress, exporting, unfinished_bytes
from dash_onnx.exporters.export.sizes import sizes_of
from dash_onnx.exporters.export.suited import suited
from dash_onnx.exporters.sources import Source, open_source
from dash_onnx.runtime.machine import available_bytes, peak_rss_bytes, release_memory
from dash_onnx.runtime.ort import check_version, onnxruntime
from dash_onnx.runtime.profile import profile

_TOOLS = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers", "gguf")


def export(
    model: str,
    out: Path,
    options: ExportOptions,
    *,
    opened: Callable[[ModelFacts, ExportOptions], None] = lambda *_: None,
) -> Manifest:
    """Exports a model.

    Args:
        model: hub id, local folder or `.gguf` file.
        out: the bundle's folder; written to a temporary sibling and renamed at the end.
        options: the user's options.
        opened: called once the model is open and before any phase, with the resolved options.

    Raises:
        DashError: for anything the user can fix; `out` is then unchanged.
    """
    started = time.monotonic()
    check_version(onnxruntime().__version__, options.device)
    check_destination(out, options.overwrite)
    source = open_source(model, REGISTRY, options.requantize, options.revision)
    architecture = architecture_of(source.config)
    spec = architecture.describe(source.name, source.config, options.max_length)
    options = suited(options, source, architecture, spec)
    opened(spec.facts, options)
    _check_space(source, out, options)
    writer = GraphWriter(source, architecture, spec, options)
    key = _key(source, options)
    with exporting(out, key, overwrite=options.overwrite) as partial:

        def draft() -> Bundle:
            return write_draft(partial.draft(), source, architecture, spec, options.target)

        found = partial.calibration()
        if found is None:
            found = calibration_ids(
                source,
                options.texts,
                options.seed,
                draft,
                options.min_tokens,
                sequences_of(spec.facts, options.exact),
            )
            partial.calibrate(*found)
        ids, calibration = found
        folder, known = partial.bundle, partial.progress()
        before = known or Progress()
        layers, writer.fp32_kept = before.layers, list(before.fp32_kept)

        def so_far() -> Progress:
            seconds = round(before.seconds + time.monotonic() - started, 1)
            peak = max(before.peak_rss_bytes, peak_rss_bytes())
            return Progress(layers, tuple(writer.fp32_kept), seconds, peak)

        def finish() -> None:
            partial.finish(so_far())
            release_memory()

        if known is None:
            writer.embed(folder, ids, partial.states(0))
            finish()
        writer.runner.reads(folder / EMBED_PATH, ids)
        every = range(spec.facts.num_layers)
        left = every[len(layers) :]
        for index in Loop("layers", left, done=left.start):
            states = partial.states(index), partial.states(index + 1)
            layers = (*layers, writer.layer(folder, index, *states))
            finish()
        with Phase("LM head", total=1):
            heads = writer.heads(folder, partial.states(len(every)))
        final = partial.states(len(every))
        wide = writer.losses(ids, final).wide(folder, writer.runner) if options.wide else None
        source.save_text_files(folder)
        manifest = untrained_manifest(
            spec,
            options.target,
            variants=options.variants,
            heads=heads,
            compensation_rank=options.compensation_rank or 0,
            layers=layers,
            calibration=calibration,
            export=_facts(source, so_far()),
            files=list_files(folder),
            wide=wide,
        )
        release_memory()
        manifest = replace(manifest, costs=profile(Bundle(folder, manifest), writer.runner.device))
        static = writer.losses(ids, final).static(Bundle(folder, manifest))
        manifest = replace(manifest, static=static, export=_facts(source, so_far()))
        release_memory()
        write_card(folder, manifest)
        (folder / MANIFEST_NAME).write_text(manifest.to_text(), "utf-8")
    return manifest


def _check_space(source: Source, out: Path, options: ExportOptions) -> None:
    """Refuses an export that exceeds the disk or memory, before it takes hours.

    Raises:
        DashError: there is too little space; the message states what is needed.
    """
    sizes = sizes_of(source, options)
    disk, remedy = sizes.bundle + sizes.work, "make room, or export fewer --variants"
    check_room("the export", disk, out, remedy, unfinished_bytes(out))
    memory = available_bytes()
    if memory is not None and sizes.export > memory:
        raise DashError(
            f"the export needs about {sizes.export / 1e9:.1f} GB of memory, and "
            f"{memory / 1e9:.1f} GB are free: close other programs, or use a larger machine"
        )


def _key(source: Source, options: ExportOptions) -> dict[str, str]:
    """What the files of a bundle depend on, by name: an export resumes only if all are equal."""
    files = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in source.files}
    texts = [source.sha256() for source in options.texts]
    chosen = {
        field.name.replace("_", "-"): str(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.name not in ("calibration", "min_tokens", "overwrite")
    }
    config = json.dumps(source.config.to_dict(), sort_keys=True, default=str)
    content = json.dumps([source.kind, source.name, files, config])
    return {
        **chosen,
        "calibration": " ".join(texts),
        "model": hashlib.sha256(content.encode()).hexdigest(),
        "tools": json.dumps(_tools()),
    }


def _tools() -> dict[str, str]:
    tools = {name: importlib.metadata.version(name) for name in _TOOLS}
    return {**tools, "dash-onnx": __version__, "onnxruntime": onnxruntime().__version__}


def _facts(source: Source, progress: Progress) -> ExportFacts:
    return ExportFacts(
        source=source.origin,
        tools=_tools(),
        seconds=progress.seconds,
        peak_rss_bytes=progress.peak_rss_bytes,
        fp32_kept=progress.fp32_kept,
        license=source.license,
    )
