"""What the wide form of all layers loses, on some of the calibration text."""

from __future__ import annotations

from pathlib import Path

import torch

from dash_onnx.core.actions import WIDE
from dash_onnx.core.contract import EMBED_PATH, layer_path
from dash_onnx.core.facts import WideFacts
from dash_onnx.core.progress import Loop
from dash_onnx.exporters.architectures.base import Head, ModelSpec
from dash_onnx.exporters.calibration.hidden_states import HiddenStateFile
from dash_onnx.exporters.calibration.runner import Runner
from dash_onnx.exporters.calibration.tokens import Ids

WIDE_SEQUENCES = 4
"""Of the calibration text that run in the wide form."""

_ROWS = 256  # of the logits of a large vocabulary at a time


def wide_facts(
    folder: Path, runner: Runner, spec: ModelSpec, head: Head, ids: Ids, full: HiddenStateFile
) -> WideFacts:
    """Runs some sequences through the wide graphs, and compares what they predict.

    Args:
        folder: of the graphs.
        runner: that runs them.
        spec: of the model.
        head: its LM head, which both sides have in full precision.
        ids: the calibration tokens `[sequences, length]`.
        full: their hidden states after the last layer in full precision.
    """
    few = ids[:WIDE_SEQUENCES]
    states = runner.embed(folder / EMBED_PATH, few)
    for index in Loop("wide form", range(spec.facts.num_layers)):
        states = runner.layer(index, folder / layer_path(index, WIDE), states)
    weight = head.linear.weight.float()

    def log_probabilities(hidden: torch.Tensor) -> torch.Tensor:
        logits = head.norm(hidden, spec.block) @ weight.T
        if head.linear.bias is not None:
            logits += head.linear.bias.float()
        if (cap := spec.block.logit_softcap) is not None:  # the norm has divided by it
            logits = logits.tanh() * cap
        return logits.log_softmax(-1)

    total, wide = 0.0, torch.from_numpy(states).flatten(0, 1)
    wanted = torch.from_numpy(full[:WIDE_SEQUENCES]).flatten(0, 1)
    for ours, theirs in zip(wide.split(_ROWS), wanted.split(_ROWS), strict=True):
        reference = log_probabilities(theirs)
        divergence = reference.exp() * (reference - log_probabilities(ours))
        total += float(divergence.sum())
    return WideFacts(round(total / few.size, 5), few.size)
