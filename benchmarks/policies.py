"""Quality of the trained policy and of its baselines on a text, at the same profiled cost.

    python benchmarks/policies.py out/ --text book.txt
    python benchmarks/policies.py out/ --text book.txt --skips 2 4 6 8
    python benchmarks/policies.py out/ --text book.txt --losses 0.05 0.1 0.2 0.4

Measures the precisions, and for each budget `dash` and the best static assignment within it; where
layers must be skipped also `even`, `cosine` and `random`: one precision, with skipped layers that
are evenly spaced, that change their input least (ShortGPT), or that are drawn for each token.
Budgets are the presets, or the costs of the best static assignments with given numbers of skipped
layers. With `--losses` they are the costs of static assignments that lose at most that much on the
text of the tables, and `dash` is compared only with those.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import dash_onnx
from dash_onnx.cli.common import add_reference_option, load_reference
from dash_onnx.core.actions import SKIP
from dash_onnx.core.budget import reference_ms
from dash_onnx.core.documents import read_document
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import StaticPolicy, base_precision, below_every_skip
from dash_onnx.eval.text import evaluate_policies

SKIPPING = ("even", "cosine")


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="or .jsonl")
    add_reference_option(parser)
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument("--skips", type=int, nargs="+", metavar="N", help="layers per token")
    budgets.add_argument("--losses", type=float, nargs="+", metavar="KL", help="nats per token")
    parser.add_argument("--limit", type=int, default=8, help="(default: 8)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = dash_onnx.load(arguments.bundle)
    text = read_document(arguments.text, model.text)
    reference = load_reference(arguments.reference, model, None)
    full_ms = reference_ms(model.manifest)
    names, policies = [], []
    for name, policy, budget in runs(model.manifest, arguments):
        try:
            made = skipping(model.manifest, policy, budget or 1) if policy in SKIPPING else policy
            policies.append(model.policy(made, budget if made is policy else None))
            names.append((name, policy))
        except PolicyError as error:  # such as a budget too low for a baseline
            print(f"{name}, {policy}: {error}", file=sys.stderr)
    evaluations = evaluate_policies(
        model, text, policies, max_windows=arguments.limit, reference=reference, timed=False
    )
    rows = []
    for (name, policy), found in zip(names, evaluations, strict=True):
        row = {"name": name, "policy": policy, "cost": found.cost_ms / full_ms}
        rows.append({**row, **dataclasses.asdict(found)})
        if not arguments.json:
            print(
                f"{name:9} {policy:7} cost {found.cost_ms / full_ms:.3f}  KL {found.kl:.4f} "
                f"({found.kl_stderr or 0:.4f})  top-1 {found.top1:.1%}  "
                f"skipped {found.actions.get(SKIP, 0):.1%}"
            )
    if arguments.json:
        print(json.dumps({"text": arguments.text.name, "rows": rows}))


def runs(
    manifest: Manifest, arguments: argparse.Namespace
) -> Iterator[tuple[str, str, float | None]]:
    """The names, policies and budgets, most expensive first."""
    assert manifest.scorer is not None, "train a policy first: dash-train BUNDLE"
    table = manifest.scorer.static
    if arguments.skips:
        budgets = []
        for count in arguments.skips:
            same = [point for point in table if point.path.count(SKIP) == count]
            assert same, f"the static search stopped before {count} skipped layers"
            best = min(same, key=lambda point: point.kl)
            budgets.append((f"{count} skips", best.budget))
    elif arguments.losses:
        budgets = [
            (f"{loss:g} nats", min(point.budget for point in table if point.kl <= loss))
            for loss in arguments.losses
        ]
    else:
        budgets = sorted(manifest.scorer.presets.items(), key=lambda item: -item[1])
    base = manifest.variants[-1]
    path = (base,) * manifest.model.num_layers
    least = manifest.costs.token_ms(path, manifest.heads[base]) / reference_ms(manifest)
    for variant in manifest.variants[1:]:
        yield variant, variant, None
    for name, budget in budgets:
        baselines = (*SKIPPING, "random") if budget < least and not arguments.losses else ()
        for policy in ("dash", "static", *baselines):
            yield name, policy, budget


def skipping(manifest: Manifest, order: str, budget: float) -> StaticPolicy:
    """Every layer at `base_precision`, except that as many inner ones as needed are skipped.

    Args:
        manifest: manifest of the bundle.
        order: `even`, or `cosine` for the similarity of a layer's input and output.
        budget: a fraction of the reference's time.

    Raises:
        PolicyError: not even skipping every inner layer is cheap enough.
    """
    layers = manifest.model.num_layers
    inner, head = range(1, layers - 1), manifest.heads[SKIP]
    similar = sorted(inner, key=lambda layer: -manifest.layers[layer].cosine)
    limit, base = budget * reference_ms(manifest), base_precision(manifest, budget)
    for count in range(layers - 1):
        spaced = (1 + int((index + 0.5) * len(inner) / count) for index in range(count))
        skipped = set(spaced if order == "even" else similar[:count])
        path = tuple(SKIP if layer in skipped else base for layer in range(layers))
        if manifest.costs.token_ms(path, head) <= limit * (1 + 1e-9):
            return StaticPolicy(path, manifest, order, head, budget)
    raise below_every_skip(budget)


if __name__ == "__main__":
    main()
