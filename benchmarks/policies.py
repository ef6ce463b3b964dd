"""Quality of the trained policy and of its baselines, at the same profiled cost.

    python benchmarks/policies.py out/ --text book.txt --max-windows 8

For each budget `dash` and the best static assignment; `even`, `cosine` and `random` where it asks
for skipping; and the uniform paths. Budgets are the presets, the costs of a token whose layers take
some share of what all layers in the cheapest precision take, and those of the best static
assignments that skip some layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from tqdm import tqdm

import dash_onnx
from dash_onnx.core.actions import SKIP
from dash_onnx.core.budget import reference_ms
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.text import read_text
from dash_onnx.eval.text import evaluate_text

POLICIES = ("dash", "static", "even", "cosine", "random")


def main() -> None:
    """Prints a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="OUT")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="*",
        default=[1.0, 0.93, 0.87, 0.81],
        help="of the layers' time in the cheapest precision (default: 1.0 0.93 0.87 0.81)",
    )
    parser.add_argument("--skips", type=int, nargs="*", default=[], help="layers per token")
    parser.add_argument("--no-presets", action="store_true")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--max-windows", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = dash_onnx.load(arguments.bundle)
    manifest, text = model.manifest, read_text(arguments.text)
    assert manifest.scorer is not None, "train a policy first: dash-train OUT"
    full_ms = reference_ms(manifest)
    costs, layers, base = manifest.costs, manifest.model.num_layers, manifest.variants[-1]
    base_ms = costs.token_ms((base,) * layers, manifest.heads[base])
    layers_ms = costs.unit_ms * layers
    runs: list[tuple[str, float | None]] = [(variant, None) for variant in manifest.variants[1:]]
    if not arguments.no_presets:
        for budget in sorted(manifest.scorer.presets.values(), reverse=True):
            runs += [("dash", budget), ("static", budget)]
    budgets = [(base_ms - (1 - share) * layers_ms) / full_ms for share in arguments.shares]
    for count in arguments.skips:
        same = [point for point in manifest.scorer.static if point.path.count(SKIP) == count]
        assert same, f"the static search stopped before {count} skipped layers"
        budgets.append(min(same, key=lambda point: point.kl).budget)
    for budget in budgets:
        runs += [("dash", budget), ("static", budget)]
        if budget < base_ms / full_ms:
            runs += [("even", budget), ("cosine", budget), ("random", budget)]
    runs = [run for run in runs if run[0] in (*arguments.policies, *manifest.variants)]
    if not arguments.json:
        print("policy  budget  cost/full  cost ms  ms    KL (stderr)       top-1   skipped")
    for policy, budget in tqdm(runs, disable=None):
        try:
            chosen = model.policy(policy, budget)
        except PolicyError as error:
            print(f"{policy:7} {budget or 0:.3f}   {error}", flush=True)
            continue
        result = evaluate_text(model, text, chosen, max_windows=arguments.max_windows)
        if arguments.json:
            row = {"policy": policy, "budget": budget, **dataclasses.asdict(result)}
            print(json.dumps(row), flush=True)
            continue
        print(
            f"{policy:7} {budget or 0:.3f}   {result.cost_ms / full_ms:.3f}      "
            f"{result.cost_ms:.2f}     {result.ms_per_token:.2f}  {result.kl:.4f} "
            f"({result.kl_stderr:.4f})   {result.top1:.1%}   {result.actions.get('skip', 0):.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
