"""An untrained scorer whose decisions vary, and tables made up for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dash_onnx.core.actions import Action
from dash_onnx.core.budget import reference_ms
from dash_onnx.core.bundle import Bundle, file_facts, replace_manifest
from dash_onnx.core.facts import BudgetPoint, Costs, ScorerFacts, StaticPoint, Training
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.train.scorer import BundleScorer, Scorer, export_scorer


def with_scorer(
    folder: Path, decision_points: tuple[int, ...] = (), often: Action = "int4"
) -> Path:
    """Gives a bundle a scorer with random weights.

    It decides before each layer, or before some; one action is taken more often than others.
    """
    manifest = Bundle(folder).manifest
    extra: tuple[Action, ...] = ("full",) if "full" in manifest.actions else ()
    learned = manifest.actions[len(extra) :]
    layers, hidden = manifest.model.num_layers, manifest.model.hidden_size
    torch.manual_seed(0)
    decision_points = decision_points or tuple(range(1, layers))
    scorer = Scorer(layers, hidden, len(learned), decision_points)
    with torch.no_grad():
        bias = {1: [-2.0], 2: [-6.0, -2.0], 3: [-6.0, -3.0, -2.0]}[len(learned) - 1]
        scorer.bias.copy_(torch.tensor(bias).expand(layers, -1))
    graph = BundleScorer(scorer, learned, extra, torch.full((layers,), 1e-4))
    file = export_scorer(graph, folder, manifest.dims)
    # Not the profile of this machine: the decisions must be the same everywhere.
    all_ms: dict[Action, float] = {"full": 1.0, "int8": 0.4, "int4": 0.3, "int2": 0.2, "skip": 0.1}
    layer = {action: all_ms[action] for action in manifest.actions}
    heads = {head: 0.4 if head == "int4" else 0.5 for head in manifest.costs.heads_ms}
    manifest = replace(
        manifest,
        files={**manifest.files, file: file_facts(folder / file)},
        costs=Costs(
            "a machine", 2, 0.1, 0.05, heads, (layer,) * layers, passes=manifest.costs.passes
        ),
    )
    facts = made_up(manifest, file, decision_points, often)
    replace_manifest(folder, replace(manifest, scorer=facts))
    return folder


def made_up(
    manifest: Manifest, file: str, decision_points: tuple[int, ...] = (1,), often: Action = "int4"
) -> ScorerFacts:
    """Tables in the form that training leaves."""
    layers, full = manifest.model.num_layers, reference_ms(manifest)
    costs, actions = manifest.costs, manifest.actions
    shares = {action: 0.7 if action == often else 0.3 / (len(actions) - 1) for action in actions}
    points = tuple(
        BudgetPoint(budget, multiplier, "int8", kl, shares)
        for budget, multiplier, kl in ((0.2, 1.0, 0.9), (0.5, 0.02, 0.05), (0.99, 1e-5, 0.0))
    )
    static = []
    for action in [a for a in ("int8", "int4") if a in actions]:
        path = (action,) * layers
        for head in [a for a in ("int8", "int4") if a in actions]:
            budget = costs.token_ms(path, head) / full
            kl = {"int8": 0.004, "int4": 0.2}[action] + (0.01 if head == "int4" else 0.0)
            static.append(StaticPoint(budget, head, kl, path))
    mixed: tuple[Action, ...] = ("int8", *["skip"] * (layers - 1))
    static.append(StaticPoint(costs.token_ms(mixed, "int8") / full, "int8", 1.5, mixed))
    return ScorerFacts(
        file=file,
        actions=actions,
        decision_points=decision_points,
        points=points,
        presets={"quality": 0.7, "balanced": 0.5, "fast": 0.3},
        static=tuple(sorted(static, key=lambda point: point.budget)),
        training=Training(
            "quick", "a <b> & c", 4096, 1024, 7, 12.5, (2.0, 1.5), (0.3, 0.2), (0.4, 0.5)
        ),
    )
