"""Writes the graphs of a model, one layer in memory at a time, and measures each as it goes."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from dash_onnx.core.actions import ACTIONS, SKIP, WIDE, Action, Form
from dash_onnx.core.contract import EMBED_PATH, data_name, head_path, layer_path
from dash_onnx.core.facts import LayerFacts
from dash_onnx.exporters.architectures.base import Layer, ModelSpec
from dash_onnx.exporters.architectures.decoder import Decoder
from dash_onnx.exporters.calibration.hidden_states import HiddenStateFile
from dash_onnx.exporters.calibration.runner import Runner
from dash_onnx.exporters.calibration.statistics import (
    compensation,
    gram_of,
    relative_error,
    scale_and_cosine,
)
from dash_onnx.exporters.calibration.tokens import Ids
from dash_onnx.exporters.device import torch_device
from dash_onnx.exporters.export.losses import Losses, held_out
from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.graphs import (
    build_embed,
    build_head,
    build_layer,
    build_skip,
    captured_inputs,
    rescores,
)
from dash_onnx.exporters.sources import Source
from dash_onnx.runtime.machine import release_memory

_LOG = logging.getLogger(__name__)
_FIGURE_SEQUENCES = 8  # enough for the figures of a layer; GPTQ and the compensation see all

_SINKS_READ = 30.0
"""Weight of a sequence's first tokens in GPTQ's Hessians of Q, K and V: half of all attention goes
to them (docs/decisions/0087)."""

_SINKS_WRITTEN = 0.003
"""Their weight where no norm bounds them. There they are up to 1,000 times as large as others; at
full weight they would determine the rounding for all tokens."""


@dataclass
class GraphWriter:
    """Writes a model's graphs.

    Attributes:
        options: resolved options.
        fp32_kept: names of weights stored as FP32, of the graphs written so far.
    """

    source: Source
    architecture: Decoder
    spec: ModelSpec
    options: ExportOptions
    fp32_kept: list[str] = field(default_factory=list)
    _told: bool = False

    def __post_init__(self) -> None:
        self.target = self.options.target
        self.runner = Runner.on(self.options.device, self.spec)
        self.torch_device = torch_device(self.options.train_device)

    def embed(self, folder: Path, ids: Ids, out: HiddenStateFile) -> None:
        """Writes the token embedding, and the calibration tokens' hidden states after it."""
        table = self.architecture.embedding(self.source.weights, self.spec)
        per_layer = self.architecture.per_layer(self.source.weights, self.spec)
        rounded = "full" not in self.options.variants
        self.fp32_kept += build_embed(folder, table, self.spec, self.target, per_layer, rounded)
        out.write(len(ids), [self.runner.embed(folder / EMBED_PATH, ids)])

    def _tell_unread(self, index: int) -> None:
        """Warns, once, of weights that the family does not have: another model may need them."""
        if self._told or self.spec.attention[index].source is not None:  # stored, but not needed
            return
        unread = self.source.weights.unread(f"{self.architecture.names.layers}.{index}.")
        if unread:
            self._told = True
            _LOG.warning(
                "%s is not used%s: the family %s has no such weight, so a model that needs it "
                "answers differently",
                unread[0],
                f", nor are {len(unread) - 1} others of this layer" if unread[1:] else "",
                self.spec.facts.architecture,
            )

    def layer(
        self, folder: Path, index: int, hidden: HiddenStateFile, out: HiddenStateFile
    ) -> LayerFacts:
        """Writes every variant of a layer, and its full output; returns the layer's figures."""
        spec, target, variants = self.spec, self.target, self.options.variants
        paths: dict[Form, str] = {form: layer_path(index, form) for form in (*ACTIONS, WIDE)}
        shutil.rmtree((folder / paths[SKIP]).parent, ignore_errors=True)
        layer = self.architecture.layer(self.source.weights, index, spec)
        self._tell_unread(index)

        # `full` is the reference for the figures even if it is not kept.
        exact = replace(target, kv_cache="float")
        kept = build_layer(folder, index, layer, spec, exact, "full", {})
        inputs: dict[str, str] = {}
        if self.options.calibrates:
            inputs = captured_inputs(layer, spec, target.block_size, self.options.forms)
        sinks = _sink_weights(layer)
        with self.torch_device:
            hessians = self.runner.layer_with_hessians(
                index, folder / paths["full"], hidden, out, inputs, sinks, held_out(len(hidden))
            )
        kv, first = None, held_out(len(hidden))
        if target != exact and spec.mixer_of(index) == "attention":
            kv = self.runner.kv_quantization(
                index,
                folder / paths["full"],
                hidden[first : first + _FIGURE_SEQUENCES],
                8 if target.kv_cache == "int8" else 4,
                offset=layer.sinks is None and spec.block.attention_softcap is None,
                first=first,
            )
        if "full" in variants and target == exact:
            self.fp32_kept += kept
        else:
            for part in _files_of(folder, paths["full"]):
                part.unlink()
        few, full = hidden[:_FIGURE_SEQUENCES], out[:_FIGURE_SEQUENCES]
        scale, cosine = scale_and_cosine(few, full)
        correction = None
        if rank := self.options.compensation_rank:
            with self.torch_device:
                correction = compensation(hidden, out, layer.input_norm, spec.block, scale, rank)
        errors: dict[Form, float] = {}
        forms: tuple[Form, ...] = (*self.options.forms, SKIP)
        for form in forms:
            common = folder, index, layer, spec, target
            if form == SKIP:
                build_skip(*common, scale, correction, hessians, kv)
            elif form != "full" or target != exact:
                self.fp32_kept += build_layer(*common, form, hessians, kv)
            if form == "full":
                continue
            output = self.runner.layer(index, folder / paths[form], few, keep=False)
            errors[form] = relative_error(output, full)
        sizes = {
            form: sum(part.stat().st_size for part in _files_of(folder, paths[form]))
            for form in forms
        }
        return LayerFacts(scale, cosine, errors, sizes)

    def heads(self, folder: Path, hidden: HiddenStateFile) -> dict[Action, Action]:
        """Writes the LM heads; returns which one each kind of policy uses."""
        head = self.architecture.head(self.source.weights, self.spec)
        precisions = self.options.head_precisions(self.spec.facts, head.linear.bias is not None)
        wide: tuple[Form, ...] = (WIDE,) if self.options.wide else ()
        with self.torch_device:
            gram = gram_of(hidden, head.norm, self.spec.block, held_out(len(hidden)))
        hessians = {head.linear.name: gram}
        for form in (*precisions, *wide):
            self.fp32_kept += build_head(folder, head, self.spec, self.target, form, hessians)
        del head, gram, hessians  # large: free them before the graphs load the weights
        release_memory()
        for form in (*precisions, *wide):
            self.runner.head(folder / head_path(form), hidden)
        # An INT4 head that rescores top tokens in INT8 loses almost nothing; any other INT4 head
        # loses more per millisecond saved than any layer does.
        mixed = "int8" if "int8" in precisions else precisions[0]
        if "int4" in precisions and rescores(folder / head_path("int4")):
            mixed = "int4"
        exact: set[Action] = {"full", "int8"}
        own = [a for a in precisions if a in exact and a in self.options.variants]
        chosen: dict[Action, Action] = dict.fromkeys((*self.options.variants, SKIP), mixed)
        return chosen | dict(zip(own, own, strict=True))

    def losses(self, ids: Ids, full: HiddenStateFile) -> Losses:
        """Makes the measurement of losses, on tokens whose full-precision states are given."""
        head = self.architecture.head(self.source.weights, self.spec)
        return Losses(self.spec, head, ids, full)


def _sink_weights(layer: Layer) -> dict[str, float]:
    """Weights of the first tokens in the Hessians, by linear layer."""
    weights = dict.fromkeys((linear.name for linear in layer.linears), _SINKS_WRITTEN)
    if layer.input_norm is not None:
        weights[layer.qkv.name] = _SINKS_READ
    if layer.post_norm is not None:
        experts = None if layer.mixture is None else layer.mixture.up
        weights |= {one.name: 1.0 for one in (layer.gate_up, experts) if one is not None}
    for linear, norm in ((layer.output, layer.output_sub_norm), (layer.down, layer.down_sub_norm)):
        if linear is not None and norm is not None:
            weights[linear.name] = 1.0
    return weights


def _files_of(folder: Path, graph: str) -> list[Path]:
    """The files of a graph and its weights, which may be stored inside it."""
    return [part for part in (folder / graph, folder / data_name(graph)) if part.exists()]
