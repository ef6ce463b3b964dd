"""KL loss of the wide form and of each precision, in all layers, on some calibration text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dash_onnx.core.actions import WIDE
from dash_onnx.core.budget import reference_ms
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import EMBED_PATH, layer_path
from dash_onnx.core.facts import StaticPoint, WideFacts
from dash_onnx.core.plans import holds_out
from dash_onnx.core.policy import Policy, StaticPolicy
from dash_onnx.core.progress import Loop
from dash_onnx.exporters.architectures.base import Head, ModelSpec
from dash_onnx.exporters.calibration.hidden_states import HiddenStateFile
from dash_onnx.exporters.calibration.runner import Runner
from dash_onnx.exporters.calibration.tokens import Ids
from dash_onnx.runtime.devices import open_backend
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.ort import has_device

F = torch.nn.functional

SEQUENCES = 4
"""Number of leading calibration sequences that are run."""


def held_out(sequences: int) -> int:
    """Number of leading sequences of a calibration text that are hidden from GPTQ.

    Losses are measured on them, since GPTQ fits weights to its text, an INT2 head most of all.
    """
    return SEQUENCES if holds_out(sequences) else 0


class Losses:
    """Compares predictions with those in full precision."""

    def __init__(self, spec: ModelSpec, head: Head, ids: Ids, full: HiddenStateFile):
        """Takes the full-precision states as the reference.

        Args:
            spec: description of the model.
            head: its LM head in full precision.
            ids: the calibration tokens `[sequences, length]`.
            full: their hidden states after the last layer in full precision.
        """
        self._spec, self._head = spec, head
        self._weight = head.linear.weight.float()
        most = spec.facts.max_length
        self._ids, self._full = ids[:SEQUENCES, :most], full[:SEQUENCES][:, :most]

    def wide(self, folder: Path, runner: Runner) -> WideFacts:
        """Measures the wide graphs of a folder; the LM head is in full precision on both sides."""
        states = runner.embed(folder / EMBED_PATH, self._ids)
        for index in Loop("wide form", range(self._spec.facts.num_layers)):
            states = runner.layer(index, folder / layer_path(index, WIDE), states)
        (kl,) = self._kl(lambda n: self._log_probabilities(states[n]))
        return WideFacts(round(kl, 5), self._ids.size)

    def static(self, bundle: Bundle) -> tuple[StaticPoint, ...]:
        """Measures each precision in the runtime, with its own LM head and the next lower one.

        Empty if its device is not available.
        """
        manifest, found = bundle.manifest, []
        device, heads = manifest.target.device, manifest.exported_heads
        if not has_device(device):
            return ()
        for precision in Loop("losses", manifest.variants):
            path = (precision,) * manifest.model.num_layers
            first = heads.index(manifest.heads[precision])
            own = heads[first : first + 2]  # an INT2 head loses too much with INT8 layers
            model = Model(bundle, open_backend(device), policy=precision)
            policies = (StaticPolicy(path, manifest, head=head) for head in own)
            losses = self._kl(*(partial(self._run, model, policy) for policy in policies))
            for head, kl in zip(own, losses, strict=True):
                budget = manifest.costs.token_ms(path, head) / reference_ms(manifest)
                found.append(StaticPoint(round(budget, 5), head, round(max(kl, 0.0), 6), path))
            model.close()
        return tuple(sorted(found, key=lambda point: point.budget))

    def _run(self, model: Model, policy: Policy, sequence: int) -> torch.Tensor:
        """Log probabilities `[length, V]` for a sequence."""
        logits = model.logits(self._ids[sequence], policy=policy)
        return torch.from_numpy(logits).log_softmax(-1)

    def _kl(self, *ours: Callable[[int], torch.Tensor]) -> list[float]:
        """Mean KL(full || ours) in nats; each of `ours` maps a sequence to log probabilities."""
        totals = [0.0] * len(ours)
        for sequence, states in enumerate(self._full):
            reference = self._log_probabilities(states)
            for at, own in enumerate(ours):  # the reference is computed only once
                kl = F.kl_div(own(sequence), reference, reduction="sum", log_target=True)
                totals[at] += float(kl)
        return [total / self._ids.size for total in totals]

    def _log_probabilities(self, states: np.ndarray) -> torch.Tensor:
        """`[length, V]` from hidden states `[length, D]`, by the full-precision head."""
        hidden = torch.from_numpy(states)
        logits = self._head.norm(hidden, self._spec.block) @ self._weight.T
        if self._head.linear.bias is not None:
            logits += self._head.linear.bias.float()
        if (cap := self._spec.block.logit_softcap) is not None:  # the norm has divided by it
            logits = logits.tanh() * cap
        return logits.log_softmax(-1)
