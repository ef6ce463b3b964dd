"""The manifest `dash.json`: everything the runtime must know about a bundle.

Each figure that the exporter measured and each decision it resolved is recorded here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dash_onnx.core.actions import PRECISIONS, SKIP, Action
from dash_onnx.core.block import Attention, Block
from dash_onnx.core.contract import Dims, data_name, head_path, layer_path
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
    Target,
)
from dash_onnx.core.records import RecordError, from_json, to_json
from dash_onnx.core.version import FORMAT_VERSION

MANIFEST_NAME = "dash.json"


@dataclass(frozen=True)
class Manifest:
    """The content of `dash.json`.

    Attributes:
        format_version: of this file's form.
        model: sizes of the source model.
        block: what all layers compute.
        ropes: as many as the layers have different ones, all of the same number of pairs.
        attention: of each layer.
        target: what the graphs were built for.
        variants: the precisions exported for each layer, highest first; `skip` always exists.
        heads: per kind of policy (a precision, or `skip` for mixed paths), the precision of
            the LM head it uses.
        compensation_rank: r of what a skipped layer returns for its input x,
            `scale * x + B @ A @ rms_norm(x)` with A `[r, D]`, B `[D, r]` fitted; 0: `scale * x`.
        layers: what calibration showed of each layer.
        calibration: where the calibration tokens came from.
        costs: profiled milliseconds.
        scorer: None where no policy was trained.
        export: how the export went.
        files: every file of the bundle but the manifest, by path relative to it.
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

    @property
    def dims(self) -> Dims:
        """The sizes that the graph contract depends on."""
        return Dims.of(self.model, self.ropes, self.target)

    def rope_of(self, layer: int) -> int:
        """Index of the rotary table that a layer is given; one that rotates nothing ignores it."""
        return self.attention[layer].rope or 0

    def weight_bytes(self, path: Sequence[Action], head: Action) -> int:
        """Bytes of weights that a token on a path reads."""
        graphs = [(layer_path(index, action), action) for index, action in enumerate(path)]
        return sum(self.graph_bytes(*graph) for graph in [*graphs, (head_path(head), head)])

    def graph_bytes(self, graph: str, action: Action) -> int:
        """Bytes of a graph's weights in memory: `full` is FP32 in a CPU's memory."""
        stored = self.files.get(data_name(graph), self.files[graph]).bytes
        return 2 * stored if action == "full" and self.target.device == "cpu" else stored

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
        return json.dumps(to_json(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_text(cls, text: str, name: str = MANIFEST_NAME) -> Manifest:
        """Parses and checks a manifest.

        Raises:
            BundleError: not JSON, of another format version, or not of this form.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{name} is not valid JSON ({error}); export again") from None
        if isinstance(data, dict) and data.get("format_version") == FORMAT_VERSION - 1:
            _upgrade(data)
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{name} has format version {version}; this dash-onnx reads version "
                f"{FORMAT_VERSION}: export again, or install the version that wrote it"
            )
        try:
            manifest = from_json(cls, data)
        except RecordError as error:
            raise BundleError(f"{name}: {error}; export again") from None
        ordered = tuple(a for a in PRECISIONS if a in manifest.variants)
        if not ordered or ordered != manifest.variants:
            raise BundleError(f"{name}: variants must be some of {', '.join(PRECISIONS)}, in order")
        if set(manifest.heads) != set(manifest.actions):
            raise BundleError(f"{name}: heads must name one for each of {manifest.actions}")
        if manifest.scorer is not None:
            _check_scorer(manifest, manifest.scorer, name)
        for described in (manifest.layers, manifest.attention):
            if len(described) != manifest.model.num_layers:
                raise BundleError(
                    f"{name} describes {len(described)} layers of {manifest.model.num_layers}"
                )
        used = [manifest.rope_of(layer) for layer in range(manifest.model.num_layers)]
        if len({len(rope.inv_freq) for rope in manifest.ropes}) != 1 or not all(
            0 <= index < len(manifest.ropes) for index in used
        ):
            raise BundleError(f"{name}: attention names a rope that ropes does not have")
        return manifest


def _upgrade(data: dict[str, Any]) -> None:
    """Renames the keys that format 3 calls otherwise, and drops the one that it has not."""
    data["format_version"] = FORMAT_VERSION
    data.pop("kv_of_skipped", None)
    scorer = data.get("scorer")
    points = scorer.get("points") if isinstance(scorer, dict) else None
    for old, new, records in (
        ("looks", "decision_points", [scorer]),
        ("price", "multiplier", points if isinstance(points, list) else []),
    ):
        for record in records:
            if isinstance(record, dict) and old in record:
                record[new] = record.pop(old)


def _check_scorer(manifest: Manifest, scorer: ScorerFacts, name: str) -> None:
    budgets = [point.budget for point in scorer.points]
    heads = {point.head for point in scorer.points} | {point.head for point in scorer.static}
    layers = manifest.model.num_layers
    for wrong, what in (
        (scorer.file not in manifest.files, f"scorer.file {scorer.file!r} is not in files"),
        (scorer.actions != manifest.actions, "scorer.actions must be the bundle's actions"),
        (
            not scorer.decision_points or any(a >= b for a, b in scorer.segments(layers)),
            "scorer.decision_points must be layers after the first, in order",
        ),
        (not budgets or budgets != sorted(set(budgets)), "scorer.points must ascend in budget"),
        (
            not all(any(row.shares.get(a, 0) > 0 for a in PRECISIONS) for row in scorer.points),
            "every row of scorer.points needs the share of a precision",
        ),
        ("balanced" not in scorer.presets, "scorer.presets must name balanced"),
        (not heads <= set(manifest.exported_heads), "a head of the policy table is not exported"),
        (any(len(point.path) != layers for point in scorer.static), "a static path is cut off"),
        (len(manifest.costs.layers_ms) != layers, "costs must list every layer"),
    ):
        if wrong:
            raise BundleError(f"{name}: {what}; train again with `dash-train`")
