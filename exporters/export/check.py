"""Compares a bundle with its source model in transformers, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from dash_onnx.core.actions import WIDE, WIDENED, Action, Form
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import EMBED_PATH, head_path, layer_path
from dash_onnx.exporters.architectures import architecture_of
from dash_onnx.exporters.calibration.hidden_states import HiddenStates
from dash_onnx.exporters.calibration.reference import streamed_model
from dash_onnx.exporters.calibration.runner import Runner
from dash_onnx.exporters.calibration.statistics import relative_error
from dash_onnx.exporters.calibration.tokens import SINK_TOKENS
from dash_onnx.exporters.sources import Source
from dash_onnx.runtime.machine import release_memory
from dash_onnx.runtime.ort import create_session

CheckKind = Literal["quick", "full", "none"]

_LENGTHS: dict[CheckKind, int] = {"quick": 64, "full": 256}
_TEXT = """The lighthouse keeper counted the ships that passed in the night: 42 of them, and none \
slowed down. "Who writes to a lighthouse?" he asked his sister, who had come over the ice on \
foot. She laughed, shook the snow from her coat and put three letters on the table. The first was \
a bill from 1987; the second, from Lisbon, began with "Cher ami"; the third had no sender.
def distance(speed, hours):
    return speed * hours  # miles
"""

LIMITS: Mapping[Form, float] = {"full": 2e-3, "int8": 0.1, "int4": 0.5, "int2": 1.5, WIDE: 0.25}
"""Limits on the relative error of a layer's output. FP16 rounds each weight by up to 5e-4, of
which a fraction remains in a residual stream that a layer adds little to; INT8 rounds weights and
inputs to 1/250 of the largest in a block, INT4 to 1/15. Random weights, the worst case, reach 60 %
of these limits; a graph with a wrong or missing part exceeds them."""

CUDA_LIMIT = 1e-2
"""The limit for `full` on CUDA, which also computes in FP16."""

KL_LIMITS: Mapping[Form, float] = {"full": 1e-3, "int8": 0.25, "int4": 2.5, "int2": 12.0}
"""Limits on the KL in nats between the next-token distributions of transformers and of the graphs,
all layers and the head at one precision: ten times the demo model's values (INT8 0.02, INT4 0.2
on single sentences)."""


@dataclass(frozen=True)
class CheckRow:
    """One layer, the embedding, or the whole path.

    Attributes:
        name: name of the layer.
        errors: by action, the relative error of its output; for the whole path, the KL in nats.
        limits: by action, the largest error allowed.
    """

    name: str
    errors: dict[Form, float]
    limits: dict[Form, float]

    @property
    def exceeded(self) -> list[Form]:
        """Actions whose error exceeds its limit or is NaN."""
        return [a for a, limit in self.limits.items() if not self.errors[a] <= limit]


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        kind: what was checked.
        tokens: number of tokens in the text.
        rows: one for each layer, the embedding before them, the whole path after them.
    """

    kind: CheckKind
    tokens: int
    rows: tuple[CheckRow, ...]

    @property
    def failures(self) -> list[str]:
        """One phrase for each limit that is exceeded."""
        where = {"embedding": "the embedding", "all": "all layers"}
        return [
            f"{where.get(row.name, f'layer {row.name}')}, {action}: error {row.errors[action]:.2g} "
            f"above its limit of {row.limits[action]:.2g}"
            for row in self.rows
            for action in row.exceeded
        ]


def check(source: Source, bundle: Bundle, kind: CheckKind) -> CheckResult:
    """Runs one text through transformers and through the graphs, one layer in memory at a time.

    Each graph runs on transformers' own input of its layer. The graphs of the highest exported
    precision also run on the output of the graphs before them: the whole path. `quick` runs only
    that precision and takes the other figures from the calibration; `full` runs every graph.

    Returns:
        A result without rows if the two cannot be compared on a short text: a bundle for contexts
        beyond the model's original training length may rotate all tokens differently.
    """
    manifest, architecture = bundle.manifest, architecture_of(source.config)
    length, device, best = manifest.model.max_length, manifest.target.device, manifest.variants[0]
    spec = architecture.describe(source.name, source.config, length)
    if (
        length <= SINK_TOKENS
        or spec.ropes != architecture.describe(source.name, source.config, SINK_TOKENS).ropes
    ):
        return CheckResult(kind, 0, ())
    tokens = source.tokenizer(_TEXT * 8)["input_ids"]
    ids = np.asarray(tokens[: min(_LENGTHS[kind], length)], np.int64)[None]
    wanted, layers = _reference(source, ids, spec.scales.stream)
    limits = {**LIMITS, "full": CUDA_LIMIT} if device == "cuda" else LIMITS
    loses: Action = best
    if manifest.target.ternary and best in WIDENED:  # exact weights: at most INT8's error
        loses, limits = "int8", {**limits, best: limits["int8"]}
    rows: list[CheckRow] = []

    def add(name: str, errors: dict[Form, float]) -> None:
        """Adds a row; a skip has no limit, as it is meant to differ."""
        rows.append(
            CheckRow(name, errors, {form: limits[form] for form in limits if form in errors})
        )

    runner = Runner.on(device, spec)
    path = runner.embed(bundle.verified(EMBED_PATH), ids)  # output of the graphs so far, [1, S, D]
    add("embedding", {best: relative_error(path, layers[0][0])})
    for index, (x, y) in enumerate(layers):
        errors = dict(manifest.layers[index].relative_error)
        for form in manifest.layers[index].bytes if kind == "full" else (best,):
            graph = bundle.verified(layer_path(index, form))
            inputs = [x.astype(path.dtype), *([path] if form == best else [])]
            output = runner.layer(index, graph, np.concatenate(inputs), keep=form == best)
            errors[form] = relative_error(output[:1], y)
            if form == best:
                path = output[1:]
        add(str(index), errors)
        release_memory()
    head = create_session(bundle.verified(head_path(manifest.heads[best])), runner.device)
    found = torch.from_numpy(head.run(["logits"], {"hidden": path})[0][0]).float()
    kl = float(token_kl(wanted, found).mean())
    rows.append(CheckRow("all", {best: kl}, {best: KL_LIMITS[loses]}))
    return CheckResult(kind, ids.size, tuple(rows))


def _reference(
    source: Source, ids: np.ndarray, scale: float
) -> tuple[torch.Tensor, list[tuple[HiddenStates, HiddenStates]]]:
    """Logits `[S, V]` of transformers, and input and output of each layer, `[1, S, D]`."""
    model: Any = streamed_model(source)
    layers: list[tuple[HiddenStates, HiddenStates]] = []

    def note(_: Any, arguments: Any, named: Any, output: Any) -> None:
        x = arguments[0] if arguments else named["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        layers.append((x.numpy() / np.float32(scale), y.numpy() / np.float32(scale)))

    for layer in model.get_decoder().layers:
        layer.register_forward_hook(note, with_kwargs=True)
    with torch.inference_mode():
        return model(torch.from_numpy(ids), use_cache=False).logits[0], layers


def token_kl(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(wanted || found) of the tokens after the sinks, `[tokens]` nats."""
    p, q = (logits[SINK_TOKENS:].double().log_softmax(-1) for logits in (wanted, found))
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
