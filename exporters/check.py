"""Compares a bundle with the model it came from, layer by layer, as transformers runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from dash_onnx.core.actions import PRECISIONS, SKIP, Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import EMBED_PATH, head_path, layer_path
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.architectures import architecture_of
from dash_onnx.exporters.calibrate import SINK_TOKENS
from dash_onnx.exporters.measure import Runner, relative_errors
from dash_onnx.exporters.reference import streamed_model
from dash_onnx.exporters.sources import Source
from dash_onnx.exporters.states import Hidden
from dash_onnx.runtime.machine import release_memory
from dash_onnx.runtime.ort import create_session, has_device

Kind = Literal["quick", "full", "none"]

_LENGTHS: dict[Kind, int] = {"quick": 64, "full": 256}
_TEXT = """The lighthouse keeper counted the ships that passed in the night: 42 of them, and none \
slowed down. "Who writes to a lighthouse?" he asked his sister, who had come over the ice on \
foot. She laughed, shook the snow from her coat and put three letters on the table. The first was \
a bill from 1987; the second, from Lisbon, began with "Cher ami"; the third had no sender.
def distance(speed, hours):
    return speed * hours  # miles
"""

LIMITS: Mapping[Action, float] = {"full": 2e-3, "int8": 0.1, "int4": 0.5}
"""Relative error of a layer's output: FP16's rounding of weights is 5e-4 of each, and of a residual
stream that a layer adds little to a fraction of that; INT8 rounds weights and inputs to 1 part in
250 of the largest of a block, INT4 to 1 in 15. Random weights, the worst case, come within 60 % of
these limits; a graph with a wrong or a missing part exceeds them."""

CUDA_LIMIT = 1e-2
"""Likewise of `full` for CUDA, which also computes in FP16."""

KL_LIMITS: Mapping[Action, float] = {"full": 1e-3, "int8": 0.25, "int4": 2.5}
"""Nats between the next-token distributions of transformers and of all layers and the head at one
precision: ten times what the demo model has (INT8 0.02, INT4 0.2 on single sentences)."""


@dataclass(frozen=True)
class Row:
    """One layer, or the whole path.

    Attributes:
        name: of the layer.
        errors: by action, the relative error of its output; of the whole path the KL in nats.
        limits: by action, what it may be at most.
    """

    name: str
    errors: dict[Action, float]
    limits: dict[Action, float]

    @property
    def exceeded(self) -> list[Action]:
        """Actions beyond their limit, or not a number."""
        return [a for a, limit in self.limits.items() if not self.errors[a] <= limit]


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        kind: what was checked.
        tokens: of the text.
        rows: one for each layer, the embedding before them, the whole path after them.
    """

    kind: Kind
    tokens: int
    rows: tuple[Row, ...]

    @property
    def failures(self) -> list[str]:
        """One phrase for each limit that is exceeded."""
        return [
            f"{row.name} {action} {row.errors[action]:.2g} > {row.limits[action]:.2g}"
            for row in self.rows
            for action in row.exceeded
        ]


def check(source: Source, bundle: Bundle, kind: Kind) -> Report:
    """Runs one text through transformers and through the graphs, one layer in memory at a time.

    Each graph gets transformers' own input of its layer, and a second time what the graphs
    before it gave: the whole path, at the highest exported precision. `quick` runs that precision
    and takes the other figures from the calibration; `full` runs every graph.

    Args:
        source: the model.
        bundle: its export.
        kind: `quick` or `full`.

    Returns:
        A report without rows where the two cannot be compared on a short text: a bundle for
        contexts beyond what the model was first trained on may rotate all tokens otherwise.
    """
    config, length = source.config, bundle.manifest.model.max_length
    if (
        length <= SINK_TOKENS
        or architecture_of(config).describe(source.name, config, length).ropes
        != architecture_of(config).describe(source.name, config, SINK_TOKENS).ropes
    ):
        return Report(kind, 0, ())
    return _Check(source, bundle, kind).run()


class _Check:
    def __init__(self, source: Source, bundle: Bundle, kind: Kind):
        self.bundle, self.kind = bundle, kind
        self.manifest: Manifest = bundle.manifest
        length, device = self.manifest.model.max_length, self.manifest.target.device
        spec = architecture_of(source.config).describe(source.name, source.config, length)
        self.runner = Runner(spec, device if has_device(device) else "cpu")
        self.best = self.manifest.variants[0]
        self.model: Any = streamed_model(source)
        length = min(_LENGTHS[kind], length)
        ids = source.tokenizer(_TEXT * 8, add_special_tokens=False)["input_ids"][:length]
        self.ids = np.asarray(ids, np.int64)[None]
        self.rows: list[Row] = []
        self.path: Hidden = np.zeros(0)  # what the graphs gave so far, [1, length, D]

    def run(self) -> Report:
        """See `check`."""
        self.path = self.runner.embed(self.bundle.verified(EMBED_PATH), self.ids)
        hooks = [
            layer.register_forward_hook(self._hook(index), with_kwargs=True)
            for index, layer in enumerate(self.model.get_decoder().layers)
        ]
        try:
            with torch.inference_mode():
                wanted = self.model(torch.from_numpy(self.ids), use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        session = create_session(self.bundle.verified(head_path(self.best)), self.runner.device)
        logits = session.run(["logits"], {"hidden": self.path})[0][0]
        kl = float(_kl(wanted, torch.from_numpy(logits).float()).mean())
        limits = {self.best: KL_LIMITS[self.best]}
        self.rows.append(Row("all", {self.best: kl}, limits))
        return Report(self.kind, self.ids.size, tuple(self.rows))

    def _hook(self, index: int) -> Any:
        def compare(_: Any, arguments: Any, named: Any, output: Any) -> None:
            x = arguments[0] if arguments else named["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            scale = np.float32(self.runner.spec.stream_scale)
            self._compare(index, x.numpy() / scale, y.numpy() / scale)

        return compare

    def _compare(self, index: int, x: Hidden, y: Hidden) -> None:
        manifest, dtype = self.manifest, self.path.dtype
        if index == 0:
            self._add("embedding", relative_errors(x, {self.best: self.path}), {self.best})
        errors = dict(manifest.layers[index].relative_error)
        for action in manifest.actions if self.kind == "full" else (self.best,):
            path = self.bundle.verified(layer_path(index, action))
            inputs = [x.astype(dtype), self.path] if action == self.best else [x.astype(dtype)]
            output = self.runner.layer(index, path, np.concatenate(inputs))
            errors |= relative_errors(y, {action: output[:1]})
            if action == self.best:
                self.path = output[1:]
        self._add(str(index), errors, set(errors) - {SKIP})  # a skip is meant to differ
        release_memory()

    def _add(self, name: str, errors: dict[Action, float], limited: set[Action]) -> None:
        limits = dict(LIMITS)
        if self.manifest.target.device == "cuda":
            limits["full"] = CUDA_LIMIT
        chosen = {a: limits[a] for a in PRECISIONS if a in limited}
        self.rows.append(Row(name, errors, chosen))


def _kl(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(wanted || found) of the tokens after the sinks, `[tokens]` nats."""
    p, q = (logits[SINK_TOKENS:].double().log_softmax(-1) for logits in (wanted, found))
    return (p.exp() * (p - q)).sum(-1)
