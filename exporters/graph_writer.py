"""Writes the graphs of a model, one layer in memory at a time, and measures each on the way."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.core.contract import EMBED_PATH, data_name, head_path, layer_path
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.facts import LayerFacts
from dash_onnx.exporters.architectures import Architecture
from dash_onnx.exporters.architectures.base import ModelSpec
from dash_onnx.exporters.calibrate import Ids
from dash_onnx.exporters.graphs import build_embed, build_head, build_layer, build_skip, taps_of
from dash_onnx.exporters.measure import (
    Runner,
    compensation,
    gram_of,
    relative_errors,
    scale_and_cosine,
)
from dash_onnx.exporters.options import ExportOptions
from dash_onnx.exporters.sources import Source
from dash_onnx.exporters.states import States
from dash_onnx.runtime.machine import release_memory
from dash_onnx.runtime.ort import has_device

_FIGURE_SEQUENCES = 16  # enough for the figures of a layer; GPTQ and the compensation see all
_RANK = 64  # see docs/decisions/0002
_BLOCK, _KEPT_BLOCK = 64, 32  # the second is that of GGUF's types

_SINK_WEIGHT = 0.003
"""Of a sequence's first tokens in what GPTQ sees. Their inputs are up to 1,000 times as large: with
all their weight they decide how every other token is rounded, and where prompts run at a higher
precision, they never are (docs/decisions/0043)."""


@dataclass
class GraphWriter:
    """Writes a model's graphs.

    Attributes:
        source: the model.
        architecture: its family.
        options: what the user chose, the block size resolved.
        fp32_kept: names of weights stored as FP32, of the graphs written so far.
        spec: the model as the graphs need it.
        rank: of the compensation.
    """

    source: Source
    architecture: Architecture
    options: ExportOptions
    fp32_kept: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spec: ModelSpec = self.architecture.describe(
            self.source.name, self.source.config, self.options.max_length
        )
        facts = self.spec.facts
        sizes = {
            "hidden size": facts.hidden_size,
            "intermediate size": facts.intermediate_size,
            "attention width": facts.num_heads * facts.head_dim,
        }
        if self.options.block_size is None:
            kept = self.source.kind == "gguf" and not self.options.requantize
            small = kept or any(size % _BLOCK for size in sizes.values())
            block_size = _KEPT_BLOCK if small else _BLOCK
            self.options = replace(self.options, block_size=block_size)
        self.target = self.options.target
        # Without a GPU the CPU runs graphs built for CUDA, slowly: enough to calibrate.
        self.runner = Runner(
            self.spec, self.options.device if has_device(self.options.device) else "cpu"
        )
        block = self.target.block_size
        for name, size in sizes.items():
            if size % block:
                raise UnsupportedError(f"--block-size {block} does not divide the {name} {size}")
        rank = self.options.compensation_rank
        self.rank = block * -(-_RANK // block) if rank is None else rank
        self.rank = min(self.rank, facts.hidden_size)
        if self.rank % block or self.rank < 0:
            raise UnsupportedError(
                f"--compensation-rank {rank} must be 0 or a multiple of --block-size {block}"
            )

    def embed(self, folder: Path, ids: Ids, out: States) -> None:
        """Writes the token embedding, and the calibration tokens' hidden states after it."""
        table = self.architecture.embedding(self.source.weights, self.spec)
        self.fp32_kept += build_embed(folder, table, self.spec, self.target)
        out.write(self.runner.embed(folder / EMBED_PATH, ids))

    def layer(self, folder: Path, index: int, hidden: States, out: States) -> LayerFacts:
        """Writes every variant of a layer, and its full output; returns the layer's figures."""
        spec, target, variants = self.spec, self.target, self.options.variants
        shutil.rmtree((folder / layer_path(index, SKIP)).parent, ignore_errors=True)
        layer = self.architecture.layer(self.source.weights, index, spec)
        few, errors = hidden[:_FIGURE_SEQUENCES], {}
        hessians: dict[str, torch.Tensor] = {}

        def measure(action: Action) -> None:
            output = self.runner.layer(index, folder / layer_path(index, action), few)
            errors.update(relative_errors(full, {action: output}))

        # `full` is the reference of the figures even where it is not kept.
        kept = build_layer(folder, index, layer, spec, target, "full", hessians)
        taps = taps_of(layer, spec, target.block_size) if "int4" in variants else {}
        path = folder / layer_path(index, "full")
        weight = 1.0 if variants == ("int4",) else _SINK_WEIGHT
        hessians = self.runner.layer_with_hessians(index, path, hidden, out, taps, weight)
        full = out[:_FIGURE_SEQUENCES]
        if "full" in variants:
            self.fp32_kept += kept
        else:
            _remove_graph(folder, layer_path(index, "full"))
        scale, cosine = scale_and_cosine(few, full)
        correction = None
        if rank := self.rank:
            correction = compensation(hidden, out, layer.input_norm, spec.block, scale, rank)
        for precision in variants:
            if precision != "full":
                kept = build_layer(folder, index, layer, spec, target, precision, hessians)
                self.fp32_kept += kept
                measure(precision)
        build_skip(folder, index, layer, spec, target, scale, correction, hessians)
        measure(SKIP)
        return LayerFacts(
            scale=scale,
            cosine=cosine,
            relative_error=errors,
            bytes={
                action: _graph_bytes(folder, layer_path(index, action))
                for action in (*variants, SKIP)
            },
        )

    def heads(self, folder: Path, hidden: States) -> dict[Action, Action]:
        """Writes the LM heads; returns which one each kind of policy uses."""
        variants = self.options.variants
        chosen: dict[Action, Action] = {precision: precision for precision in variants}
        # Mixed paths take INT8: nearly lossless, half the bytes of FP16. So does `int4`: the head
        # loses more per millisecond than any layer does. Small budgets may still use the INT4 one.
        chosen[SKIP] = "int8" if "int8" in variants else variants[0]
        if "int4" in variants and "int8" in variants:
            chosen["int4"] = "int8"
        head = self.architecture.head(self.source.weights, self.spec, self.source.config)
        gram = gram_of(hidden, head.norm, self.spec.block)
        hessians = {head.linear.name: gram}
        for precision in variants:
            self.fp32_kept += build_head(folder, head, self.spec, self.target, precision, hessians)
        del head, gram, hessians  # a large vocabulary's, before the graphs hold its weights again
        release_memory()
        for precision in variants:
            self.runner.head(folder / head_path(precision), hidden)
        return chosen


def _graph_bytes(folder: Path, path: str) -> int:
    parts = (folder / path, folder / data_name(path))
    return sum(part.stat().st_size for part in parts if part.exists())


def _remove_graph(folder: Path, path: str) -> None:
    for part in (folder / path, folder / data_name(path)):
        part.unlink(missing_ok=True)
