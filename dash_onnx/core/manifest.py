"""The manifest `dash.json`: everything the runtime must know about a bundle.

Each figure that the exporter measured and each decision it resolved is recorded here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dash_onnx.core.actions import PRECISIONS, SKIP, Action, Form
from dash_onnx.core.block import Attention, Block, Mixer, Recurrence
from dash_onnx.core.consistency import first_problem
from dash_onnx.core.contract import (
    Dims,
    Ports,
    data_name,
    head_path,
    joined_names,
    joined_ports,
    layer_path,
    layer_ports,
)
from dash_onnx.core.errors import BundleError
from dash_onnx.core.facts import (
    Calibration,
    Costs,
    ExportFacts,
    FileFacts,
    LayerFacts,
    ModelFacts,
    Rope,
    ScorerFacts,
    StaticPoint,
    Target,
    WideFacts,
)
from dash_onnx.core.records import RecordError, from_json
from dash_onnx.core.version import FORMAT_VERSION

MANIFEST_NAME = "dash.json"

_MAX_CHARACTERS = 16_000_000  # 60,000 describe 30 layers


@dataclass(frozen=True)
class Manifest:
    """The content of `dash.json`.

    Attributes:
        format_version: version of this format.
        model: sizes of the source model.
        block: the computation that all layers have in common.
        ropes: the distinct rotary embeddings of the layers.
        attention: the attention of each layer.
        target: what the graphs were built for.
        variants: the precisions exported for each layer, highest first; `skip` always exists.
        heads: per kind of path (a precision, or `skip` for mixed paths), the precision of its LM
            head.
        compensation_rank: r of what a skipped layer returns for its input x,
            `scale * x + B @ A @ norm(x)` with A `[r, D]`, B `[D, r]` fitted; 0: `scale * x`. The
            norm is the one before the layer's attention, if it has one.
        layers: statistics of each layer on the calibration text.
        calibration: where the calibration tokens came from.
        costs: profiled milliseconds.
        scorer: None if no policy was trained.
        export: facts about the export.
        files: every file of the bundle except the manifest, by relative path.
        wide: the loss of the wide form; None if the bundle has no wide form.
        static: the loss of each precision alone, with its own LM head and the next lower one,
            by ascending budget, measured by the export; a trained scorer has a table of its own.
        mixers: the mixer of each layer; empty if all of them attend. What `attention` says about a
            layer that does not is meaningless.
        recurrence: sizes of the layers that do not attend; None if there are none.
    """

    format_version: int
    model: ModelFacts
    block: Block
    ropes: tuple[Rope, ...]
    attention: tuple[Attention, ...]
    target: Target
    variants: tuple[Action, ...]
    heads: dict[Action, Action]
    compensation_rank: int
    layers: tuple[LayerFacts, ...]
    calibration: Calibration
    costs: Costs
    scorer: ScorerFacts | None
    export: ExportFacts
    files: dict[str, FileFacts]
    wide: WideFacts | None = None
    static: tuple[StaticPoint, ...] = ()
    mixers: tuple[Mixer, ...] = ()
    recurrence: Recurrence | None = None

    @property
    def dims(self) -> Dims:
        """The sizes that the graph contract depends on."""
        return self.dims_of(None)

    def dims_of(self, layer: int | None) -> Dims:
        """The same for a layer, whose heads may differ from those of most."""
        attention = None if layer is None else self.attention[layer]
        width = self.block.per_layer_width
        return Dims.of(self.model, self.ropes, self.target, self.recurrence, width, attention)

    def layer_ports(self, layer: int) -> Ports:
        """The ports of a layer's graphs."""
        return layer_ports(self.dims_of(layer), self.mixer_of(layer))

    def mixer_of(self, layer: int) -> Mixer:
        """How a layer mixes tokens."""
        return self.mixers[layer] if self.mixers else "attention"

    @property
    def attending(self) -> tuple[int, ...]:
        """The layers that have K/V of their own."""
        layers = range(self.model.num_layers)
        return tuple(layer for layer in layers if self.mixer_of(layer) == "attention")

    def rope_of(self, layer: int) -> int:
        """Index of the rotary table that a layer is given; one that rotates nothing ignores it."""
        return self.attention[layer].rope or 0

    def names_joined(self, layers: range) -> list[dict[str, str]]:
        """Names of the ports of each layer in a graph of several, see `contract.joined_names`."""
        return [joined_names(layer, self.attention[layer], layers) for layer in layers]

    def ports_joined(self, layers: range) -> Ports:
        """The ports of a graph of several layers."""
        return joined_ports([*map(self.layer_ports, layers)], self.names_joined(layers))

    def weight_bytes(self, path: Sequence[Action], head: Action) -> int:
        """Bytes of weights that a token on a path reads."""
        graphs = [(layer_path(index, action), action) for index, action in enumerate(path)]
        return sum(self.graph_bytes(*graph) for graph in [*graphs, (head_path(head), head)])

    def layer_bytes(self, forms: Iterable[Form]) -> int:
        """Bytes of the weights of all layers, each in all of some forms."""
        layers = range(self.model.num_layers)
        return sum(self.graph_bytes(layer_path(n, form), form) for form in forms for n in layers)

    def graph_bytes(self, graph: str, form: Form) -> int:
        """Bytes of a graph's weights in memory: `full` is FP32 in a CPU's memory."""
        stored = self.files.get(data_name(graph), self.files[graph]).bytes
        return 2 * stored if form == "full" and self.target.device == "cpu" else stored

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache per token, for all layers."""
        shapes = [self.dims_of(layer).cache_shape(1, 1) for layer in self.attending]
        numbers = sum(math.prod(map(int, shape)) for shape in shapes)
        return 2 * numbers * np.dtype(self.dims.cache_dtype).itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of the fixed-size states of a sequence, for all layers."""
        size = np.dtype(self.dims.dtype).itemsize
        return size * sum(math.prod(shape) for shape in self.state_shapes.values())

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a sequence's states, by name and layer."""
        return {
            f"{name}.{layer}": shape
            for layer, mixer in enumerate(self.mixers)
            for name, shape in self.dims.state_shapes(mixer).items()
        }

    @property
    def exported_heads(self) -> tuple[Action, ...]:
        """Precisions of the LM heads in the bundle, highest first."""
        return tuple(a for a in PRECISIONS if head_path(a) in self.files)

    @property
    def actions(self) -> tuple[Action, ...]:
        """Every action the bundle has, highest precision first."""
        return (*self.variants, SKIP)

    def to_text(self) -> str:
        """Returns the file's text: sorted keys, newline at the end."""
        facts = dataclasses.asdict(self)
        return json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_text(cls, text: str, name: str = MANIFEST_NAME) -> Manifest:
        """Parses and checks a manifest.

        Raises:
            BundleError: not JSON, of another format version, not of this form, or contradictory.
        """
        if len(text) > _MAX_CHARACTERS:
            raise BundleError(f"{name} is longer than that of any bundle; export again")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{name} is not valid JSON ({error}); export again") from None
        if isinstance(data, dict) and data.get("format_version") == FORMAT_VERSION - 1:
            data["format_version"] = FORMAT_VERSION  # format 3 has no wide form, and no passes
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{name} has format version {version}; this dash-onnx reads versions "
                f"{FORMAT_VERSION - 1} and {FORMAT_VERSION}: export again, or install the version "
                "that wrote it"
            )
        files = data.get("files")
        for key in ("layers", "attention", "ropes"):  # each layer has files of its own
            if isinstance(data.get(key), list) and isinstance(files, dict):
                if len(data[key]) > len(files):
                    raise BundleError(f"{name}: {key} lists more than files has; export again")
        try:
            manifest = from_json(cls, data)
        except RecordError as error:
            raise BundleError(f"{name}: {error}; export again") from None
        if problem := first_problem(manifest):
            raise BundleError(f"{name}: {problem}")
        return manifest
