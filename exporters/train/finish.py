"""The last phase: completes a copy of the bundle with scorer, compensation, costs and tables."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from dash_onnx.core.actions import SKIP
from dash_onnx.core.budget import OTHER_TEXT, presets, reference_ms
from dash_onnx.core.bundle import Bundle, file_facts
from dash_onnx.core.contract import data_name, layer_path
from dash_onnx.core.facts import INT8_INPUTS, Costs, FileFacts, ScorerFacts, Training
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.statistics import kl_divergence, log_softmax
from dash_onnx.exporters.calibration.texts import names_of
from dash_onnx.exporters.graphs import replace_expand
from dash_onnx.exporters.train.scorer import BundleScorer, export_scorer
from dash_onnx.exporters.train.tables import tables
from dash_onnx.exporters.train.trainer import Trainer
from dash_onnx.exporters.train.transfer import scorer_to_start_from
from dash_onnx.runtime.devices import open_backend
from dash_onnx.runtime.machine import release_memory
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.ort import Device
from dash_onnx.runtime.profile_whole import plan_times

Profile: TypeAlias = Callable[[Bundle, Device], Costs]
"""Measures the costs of a bundle on a device."""


def finish(trainer: Trainer, folder: Path, profile: Profile) -> Manifest:
    """Completes a copy of the bundle.

    Args:
        trainer: trainer after its improvement.
        folder: folder of the copy.
        profile: measures the costs of the copy.

    Returns:
        The manifest of the copy, not yet written.
    """
    manifest, device = trainer.bundle.manifest, trainer.bundle.manifest.target.device
    scorer, rounding = exported_scorer(trainer)
    file = export_scorer(scorer, folder, manifest.dims)
    points, training = trainer.scorer.decision_points, _training(trainer, manifest)
    facts = ScorerFacts(file, scorer.actions, points, (), {}, (), training)
    if manifest.scorer is not None and manifest.scorer.file != file:
        (folder / manifest.scorer.file).unlink()
    files = {**trainer.graphs(), **_write_compensation(trainer, folder)}
    files[file] = file_facts(folder / file)
    manifest = replace(manifest, files=files, scorer=facts)
    manifest = replace(manifest, costs=profile(Bundle(folder, manifest), device))
    release_memory()
    trainer.model.rounds_inputs = manifest.target.accuracy_level == INT8_INPUTS
    with trainer.autocast():
        table, static = tables(trainer, scorer, manifest, rounding)
    names = [text.content.name for text in trainer.options.texts]
    margin = _margin(names, _fitted(trainer, training))
    facts = replace(
        facts,
        points=table,
        presets=presets(table, margin),
        static=static,
        training=_training(trainer, manifest),
        margin=margin,
    )
    manifest = replace(manifest, scorer=facts)
    return replace(manifest, costs=plan_times(Bundle(folder, manifest), device))


def _fitted(trainer: Trainer, training: Training) -> list[str]:
    """Sources of the texts that the export and the last training were fitted to.

    Of the same text, a training that draws another number of sequences holds out other tokens.
    """

    def rows(facts: Training) -> tuple[str, int, int, int]:
        return facts.source, facts.tokens, facts.held_out_tokens, facts.seed

    manifest, start = trainer.bundle.manifest, trainer.options.start
    scorers = [manifest.scorer] if manifest.scorer else []
    if start is not None:
        scorers.append(scorer_to_start_from(Bundle(start)))
    others = [f.training for f in scorers if f.margin > 1 or rows(f.training) != rows(training)]
    return [manifest.calibration.source, *(facts.source for facts in others)]


def _margin(names: Sequence[str], fitted: Sequence[str]) -> float:
    """How much more other text may lose than training text with these names.

    What is fitted to a text loses more on any other.

    Args:
        names: of the texts; empty if the model wrote them.
        fitted: see `_fitted`.
    """
    given = [source for source in fitted if source != "self-generated"]
    seen = bool(given) and "-" in names  # nobody knows what came from standard input
    for name in (*names, "-"):
        seen = seen or any(re.search(rf"(^|, ){re.escape(name)}(@|, |$)", text) for text in given)
    return OTHER_TEXT if seen or not names else 1.0


def exported_scorer(trainer: Trainer) -> tuple[BundleScorer, float]:
    """The trained scorer with the extra action, and the KL per token in nats that it saves."""
    rounding, gain = 0.0, torch.zeros(trainer.env.layers)
    if trainer.extra:
        rounding = _rounding_kl(trainer)
        errors = [layer.relative_error["int8"] ** 2 for layer in trainer.bundle.manifest.layers]
        gain = rounding * torch.tensor(errors) / sum(errors)
    return BundleScorer(trainer.scorer, trainer.actions, trainer.extra, gain), rounding


def _rounding_kl(trainer: Trainer) -> float:
    """KL(full || int8) in nats, measured in the runtime, including INT8 activations."""
    manifest, results = trainer.bundle.manifest, []
    backend = open_backend(manifest.target.device)
    model = Model(trainer.bundle, backend, policy=manifest.variants[0])
    for row in trainer.held_out[:4].numpy(force=True):
        p, q = (log_softmax(model.logits(row, policy=policy)) for policy in ("full", "int8"))
        results.append(kl_divergence(p, q)[trainer.env.prompt_tokens :].mean())
    return float(np.mean(results))


def _write_compensation(trainer: Trainer, folder: Path) -> dict[str, FileFacts]:
    """Puts the trained maps into the skip graphs; the trainer's model uses the rounded maps too."""
    block, files = trainer.bundle.manifest.target.block_size, {}
    for layer, weight in enumerate(trainer.compensation):
        with torch.no_grad():
            weight.copy_(replace_expand(folder, layer, weight.detach(), block))
        graph = layer_path(layer, SKIP)
        for name in (graph, data_name(graph)):
            if (folder / name).is_file():
                files[name] = file_facts(folder / name)
    return files


def _training(trainer: Trainer, manifest: Manifest) -> Training:
    """What the manifest records about the training; curves are averages over up to ten parts."""
    options, costs = trainer.options, manifest.costs
    full_ms = reference_ms(manifest)
    parts = [part.mean(0) for part in np.array_split(np.array(trainer.history), 10) if len(part)]
    loss, kl, cost = np.transpose(parts)
    rest = costs.embed_ms + costs.scorer_ms + costs.heads_ms[manifest.heads[SKIP]]
    return Training(
        effort=options.effort,
        source=names_of(options.texts) or "self-generated",
        tokens=trainer.ids.numel(),
        held_out_tokens=trainer.held_out[:, trainer.env.prompt_tokens :].numel(),
        seed=options.seed,
        seconds=round(time.monotonic() - trainer.checkpoint.started, 1),
        loss=_rounded(loss),
        kl=_rounded(kl),
        cost=_rounded((rest + cost * costs.unit_ms) / full_ms),
    )


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 5) for value in values)
