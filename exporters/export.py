"""The export pipeline: source model in, bundle out, one layer in memory at a time."""

from __future__ import annotations

import importlib.metadata
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from dash_onnx.actions import PRECISIONS, SKIP, Action
from dash_onnx.bundle import Bundle, check_destination, list_files, writing
from dash_onnx.contract import EMBED_PATH, data_name, head_path, layer_path
from dash_onnx.errors import UnsupportedError
from dash_onnx.exporters.architectures import REGISTRY, Architecture, architecture_of
from dash_onnx.exporters.architectures.base import ModelSpec
from dash_onnx.exporters.calibrate import Ids, calibration_ids
from dash_onnx.exporters.graphs import build_embed, build_head, build_layer, build_skip, taps_of
from dash_onnx.exporters.measure import (
    Hidden,
    Runner,
    compensation,
    normed,
    relative_errors,
    scale_and_cosine,
)
from dash_onnx.exporters.sources import Source, open_source
from dash_onnx.manifest import (
    MANIFEST_NAME,
    Costs,
    ExportFacts,
    LayerFacts,
    Manifest,
    Target,
)
from dash_onnx.runtime.machine import peak_rss_bytes, release_memory
from dash_onnx.runtime.ort import Device, has_device, onnxruntime
from dash_onnx.runtime.profile import profile
from dash_onnx.runtime.sessions import Sessions
from dash_onnx.version import FORMAT_VERSION, __version__

_FIGURE_SEQUENCES = 16  # enough for the figures of a layer; GPTQ and the compensation see all
_UNMEASURED = Costs("", 0, 0.0, 0.0, {}, ())
_RANK = 64  # see docs/design.md
_TOOLS = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers", "gguf")


@dataclass(frozen=True)
class ExportOptions:
    """What the user chose.

    Attributes:
        variants: precisions of each layer, highest first.
        device: decides the dtype of activations and the operators.
        max_length: context in tokens; None takes the model's own.
        block_size: weights that share one quantization scale.
        calibration: text files; none lets the model write the text itself.
        least_tokens: that calibration files must hold, for what comes after the export.
        compensation_rank: of what a skipped layer returns; see `Manifest`. None takes the
            first multiple of the block size from 64 on.
        accuracy_level: of MatMulNBits; None takes the fast one of the device.
        requantize: round weights that the source has as integers anew.
        overwrite: replace an existing bundle.
    """

    variants: tuple[Action, ...] = PRECISIONS
    device: Device = "cpu"
    max_length: int | None = None
    block_size: int = 32
    calibration: tuple[Path, ...] = ()
    least_tokens: int = 0
    accuracy_level: int | None = None
    compensation_rank: int | None = None
    requantize: bool = False
    overwrite: bool = False
    seed: int = 0

    @property
    def target(self) -> Target:
        """The resolved build target."""
        cpu = self.device == "cpu"
        level = self.accuracy_level
        return Target(
            device=self.device,
            dtype="float32" if cpu else "float16",
            block_size=self.block_size,
            # INT8 activations: 50 times faster than level 0 for INT8 weights on x86.
            accuracy_level=level if level is not None else (4 if cpu else 0),
        )


def export(model: str, out: Path, options: ExportOptions) -> Manifest:
    """Exports a model.

    Args:
        model: hub id, local folder or `.gguf` file.
        out: the bundle's folder; written to a temporary sibling and renamed at the end.

    Raises:
        DashError: anything the user can mend; `out` is then as it was before.
    """
    started = time.monotonic()
    onnxruntime()
    check_destination(out, options.overwrite)
    source = open_source(model, REGISTRY, options.requantize)
    run = _Run(source, architecture_of(source.config), options)
    ids, calibration = calibration_ids(
        source, options.calibration, options.seed, options.least_tokens
    )
    with writing(out, overwrite=options.overwrite) as folder:
        hidden = run.embed(folder, ids)
        layers = []
        for index in tqdm(range(run.spec.facts.num_layers), desc="layers", disable=None):
            hidden, facts = run.layer(folder, index, hidden)
            layers.append(facts)
            release_memory()
        heads = run.heads(folder, hidden)
        del hidden
        _write_text_files(folder, source)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            model=run.spec.facts,
            block=run.spec.block,
            ropes=run.spec.ropes,
            attention=run.spec.attention,
            target=options.target,
            variants=options.variants,
            heads=heads,
            kv_of_skipped="project",
            compensation_rank=run.rank,
            layers=tuple(layers),
            calibration=calibration,
            costs=_UNMEASURED,
            scorer=None,
            export=run.facts(time.monotonic() - started),
            files=list_files(folder),
        )
        (folder / MANIFEST_NAME).write_text(manifest.to_text(), "utf-8")
        release_memory()
        manifest = replace(manifest, costs=profile(Sessions(Bundle(folder), run.runner.device)))
        (folder / MANIFEST_NAME).write_text(manifest.to_text(), "utf-8")
    return manifest


@dataclass
class _Run:
    """One export in progress."""

    source: Source
    architecture: Architecture
    options: ExportOptions
    fp32_kept: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spec: ModelSpec = self.architecture.describe(
            self.source.name, self.source.config, self.options.max_length
        )
        self.target = self.options.target
        # Without a GPU the CPU runs graphs built for CUDA, slowly: enough to calibrate.
        self.runner = Runner(
            self.spec, self.options.device if has_device(self.options.device) else "cpu"
        )
        facts, block = self.spec.facts, self.target.block_size
        for name, size in (
            ("hidden size", facts.hidden_size),
            ("intermediate size", facts.intermediate_size),
            ("attention width", facts.num_heads * facts.head_dim),
        ):
            if size % block:
                raise UnsupportedError(f"--block-size {block} does not divide the {name} {size}")
        rank = self.options.compensation_rank
        self.rank = block * -(-_RANK // block) if rank is None else rank
        self.rank = min(self.rank, facts.hidden_size)
        if self.rank % block or self.rank < 0:
            raise UnsupportedError(
                f"--compensation-rank {rank} must be 0 or a multiple of --block-size {block}"
            )

    def embed(self, folder: Path, ids: Ids) -> Hidden:
        table = self.architecture.embedding(self.source.weights, self.spec)
        self.fp32_kept += build_embed(folder, table, self.spec, self.target)
        return self.runner.embed(folder / EMBED_PATH, ids)

    def layer(self, folder: Path, index: int, hidden: Hidden) -> tuple[Hidden, LayerFacts]:
        """Writes every variant of a layer; returns the full output and the layer's figures."""
        spec, target = self.spec, self.target
        layer = self.architecture.layer(self.source.weights, index, spec)
        outputs: dict[Action, Hidden] = {}
        few = hidden[:_FIGURE_SEQUENCES]
        hessians: dict[str, torch.Tensor] = {}
        # `full` is the reference of the figures even where it is not kept.
        for precision in dict.fromkeys(("full", *self.options.variants)):
            path = folder / layer_path(index, precision)
            kept = build_layer(folder, index, layer, spec, target, precision, hessians)
            if precision in self.options.variants:
                self.fp32_kept += kept
            if precision == "full" and "int4" in self.options.variants:
                outputs["full"], hessians = self.runner.layer_with_hessians(
                    index, path, hidden, taps_of(layer, spec, target.block_size)
                )
            else:
                seen = hidden if precision == "full" else few
                outputs[precision] = self.runner.layer(index, path, seen)
        full = outputs.pop("full")
        if "full" not in self.options.variants:
            _remove_graph(folder, layer_path(index, "full"))
        scale, cosine = scale_and_cosine(few, full[: len(few)])
        correction = None
        if rank := self.rank:
            norm = layer.input_norm
            correction = compensation(hidden, full, norm, spec.block, scale, rank)
        build_skip(folder, index, layer, spec, target, scale, correction, hessians)
        path = folder / layer_path(index, SKIP)
        outputs[SKIP] = self.runner.layer(index, path, few)
        return full, LayerFacts(
            scale=scale,
            cosine=cosine,
            relative_error=relative_errors(full[: len(few)], outputs),
            bytes={
                action: _graph_bytes(folder, layer_path(index, action))
                for action in (*self.options.variants, SKIP)
            },
        )

    def heads(self, folder: Path, hidden: Hidden) -> dict[Action, Action]:
        """Writes the LM heads; returns which one each kind of policy uses."""
        variants = self.options.variants
        chosen: dict[Action, Action] = {precision: precision for precision in variants}
        # Mixed paths take INT8: nearly lossless, half the bytes of FP16. So does `int4`: the head
        # loses more per millisecond than any layer does. Small budgets may still use the INT4 one.
        chosen[SKIP] = "int8" if "int8" in variants else variants[0]
        if "int4" in variants and "int8" in variants:
            chosen["int4"] = "int8"
        head = self.architecture.head(self.source.weights, self.spec, self.source.config)
        inputs = normed(hidden, head.norm, self.spec.block)
        hessians = {head.linear.name: inputs.T @ inputs}
        for precision in variants:
            self.fp32_kept += build_head(folder, head, self.spec, self.target, precision, hessians)
            self.runner.head(folder / head_path(precision), hidden)
        return chosen

    def facts(self, seconds: float) -> ExportFacts:
        tools = {name: importlib.metadata.version(name) for name in _TOOLS}
        tools |= {"dash-onnx": __version__, "onnxruntime": onnxruntime().__version__}
        return ExportFacts(
            source=f"{self.source.kind}:{self.source.name}",
            tools=tools,
            seconds=round(seconds, 1),
            peak_rss_bytes=peak_rss_bytes(),
            fp32_kept=tuple(self.fp32_kept),
        )


def _graph_bytes(folder: Path, path: str) -> int:
    parts = (folder / path, folder / data_name(path))
    return sum(part.stat().st_size for part in parts if part.exists())


def _remove_graph(folder: Path, path: str) -> None:
    for part in (folder / path, folder / data_name(path)):
        part.unlink(missing_ok=True)


def _write_text_files(folder: Path, source: Source) -> None:
    """Tokenizer, chat template, and both configurations, as transformers writes them."""
    source.tokenizer.save_pretrained(folder)
    source.generation_config.save_pretrained(folder)
    source.config.to_json_file(folder / "config.json")
