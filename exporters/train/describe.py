"""The last phase of a training: what completes a copy of the bundle, and its manifest."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dash_onnx.core.actions import SKIP
from dash_onnx.core.budget import presets, reference_ms
from dash_onnx.core.bundle import Bundle, file_facts
from dash_onnx.core.contract import data_name, layer_path
from dash_onnx.core.facts import FileFacts, ScorerFacts, StaticPoint, Training
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.graphs import replace_expand
from dash_onnx.exporters.train import static, table
from dash_onnx.exporters.train.frozen import Tensor
from dash_onnx.exporters.train.learning import BATCH, Learning
from dash_onnx.exporters.train.scorer import BundleScorer, export_scorer
from dash_onnx.exporters.train.values import sampled_values
from dash_onnx.runtime.backend import open_backend
from dash_onnx.runtime.engine import Model
from dash_onnx.runtime.machine import kept_memory
from dash_onnx.runtime.profile import profile

_TABLE = 12  # rows of the policy table where multipliers decide between the cheaper actions


def describe(run: Learning, folder: Path, started: float) -> Manifest:
    """Completes a copy of the bundle: scorer, compensation, costs, tables.

    Args:
        run: after its improvement.
        folder: the copy.
        started: when the training did, of `time.monotonic`.

    Returns:
        Its manifest, which is not written.
    """
    manifest = run.bundle.manifest
    device = manifest.target.device
    rounding, gain = 0.0, torch.zeros(run.env.layers)
    if run.extra:
        best = manifest.variants[0]
        rounding = _rounding_kl(run, Model(run.bundle, open_backend(device), policy=best))
        errors = [layer.relative_error["int8"] ** 2 for layer in manifest.layers]
        gain = rounding * torch.tensor(errors) / sum(errors)
    scorer = BundleScorer(run.scorer, run.actions, run.extra, gain)
    file = export_scorer(scorer, folder, manifest.dims)
    decision_points, training = run.scorer.decision_points, _training(run, manifest, started)
    facts = ScorerFacts(file, scorer.actions, decision_points, (), {}, (), training)
    if manifest.scorer is not None and manifest.scorer.file != file:
        (folder / manifest.scorer.file).unlink()
    files = {**run.graphs(), **_write_compensation(run, folder)}
    files[file] = file_facts(folder / file)
    manifest = replace(manifest, files=files, scorer=facts)
    costs = profile(Bundle(folder, manifest), device)
    manifest = replace(manifest, costs=costs)
    with run.autocast(), kept_memory():
        wanted = run.env.reference(run.held_out, run.actions[0])
        points = table.measure(
            run.env, scorer, manifest, run.held_out, wanted, _table_multipliers(run), rounding
        )
        assignments = _static(run, manifest, wanted, rounding)
    facts = replace(
        facts,
        points=points,
        presets=presets(points),
        static=assignments,
        training=_training(run, manifest, started),
    )
    return replace(manifest, scorer=facts)


def _rounding_kl(run: Learning, model: Model) -> float:
    """KL(full || int8) through the runtime, INT8 activations included."""
    results = []
    for row in run.held_out[:4].numpy():
        p, q = (
            torch.from_numpy(model.logits(row, policy=policy)).double().log_softmax(-1)
            for policy in ("full", "int8")
        )
        results.append(float((p.exp() * (p - q)).sum(-1)[run.env.prompt_tokens :].mean()))
    return float(np.mean(results))


def _write_compensation(run: Learning, folder: Path) -> dict[str, FileFacts]:
    """Puts the trained maps into the skip graphs; the process uses them as rounded there."""
    block, files = run.bundle.manifest.target.block_size, {}
    for layer, weight in enumerate(run.frozen.compensation()):
        with torch.no_grad():
            weight.copy_(replace_expand(folder, layer, weight.detach(), block))
        graph = layer_path(layer, SKIP)
        for name in (graph, data_name(graph)):
            if (folder / name).is_file():
                files[name] = file_facts(folder / name)
    return files


def _table_multipliers(run: Learning) -> list[float]:
    low, high = run.log_multiplier_range  # that training draws from; the table goes beyond
    logs = np.linspace(low - 1.7, high + 1.2, _TABLE).tolist()
    if run.extra:  # still lower, INT8 is left for `full`, layer by layer
        logs = [low - 7.0, low - 4.35, *logs]
    return [math.exp(log) for log in logs]


def _static(
    run: Learning, manifest: Manifest, wanted: Tensor, rounding: float
) -> tuple[StaticPoint, ...]:
    """Best static assignments, searched on training text, measured on held-out text."""
    full_ms, skip = reference_ms(manifest), run.actions.index(SKIP)
    without = [move for move in run.moves if skip not in move.path]
    # Each skip is a large step; those between precisions are small and many.
    every = max(1, run.env.layers // 6)
    moves = [*without[::every], *_skipping(run, without)]
    points: list[StaticPoint] = []
    heads = list(run.frozen.heads)
    for move in tqdm(moves, desc="static table", disable=None):
        named = tuple(run.actions[action] for action in move.path)
        measured = static.path_kl(run.env, run.held_out, wanted, move.path, heads)
        for head, loss in zip(heads, measured, strict=True):
            share = round(manifest.costs.token_ms(named, head) / full_ms, 5)
            points.append(StaticPoint(share, head, round(loss + rounding, 6), named))
    return tuple(sorted(points, key=lambda point: point.budget))


def _skipping(run: Learning, without: Sequence[static.Move]) -> list[static.Move]:
    """The descent from the last move before the first skip, with the compensation as trained."""
    ids = run.ids[: BATCH * run.effort.tried]
    parts = [sampled_values(run.env, part, run.generator) for part in ids.split(BATCH)]
    reference = torch.cat([final for *_, final in parts]).float()
    values = torch.cat([sampled[:, run.env.prompt_tokens :] for _, sampled, _ in parts])
    moves = static.search(
        run.env,
        ids,
        reference,
        run.costs,
        values.mean((0, 1)),
        run.effort.tried,
        without[-1].path if without else None,
    )
    return list(tqdm(moves, desc="static", disable=None))


def _training(run: Learning, manifest: Manifest, started: float) -> Training:
    rows = np.array(run.history)
    tenths = [part.mean(0) for part in np.array_split(rows, 10) if len(part)]
    loss, kl, cost = (tuple(round(float(v), 5) for v in column) for column in np.transpose(tenths))
    costs, full, unit_ms = manifest.costs, reference_ms(manifest), manifest.costs.unit_ms
    rest = costs.embed_ms + costs.scorer_ms + costs.heads_ms[manifest.heads[SKIP]]
    files = ", ".join(path.name for path in run.options.calibration)
    return Training(
        effort=run.options.effort,
        source=files or "self-generated",
        tokens=run.ids.numel(),
        held_out_tokens=run.held_out.numel(),
        seed=run.options.seed,
        seconds=round(time.monotonic() - started, 1),
        loss=loss,
        kl=kl,
        cost=tuple(round((rest + value * unit_ms) / full, 5) for value in cost),
    )
