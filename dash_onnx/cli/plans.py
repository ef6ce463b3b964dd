"""The plans of a bundle, as the tools print them."""

from __future__ import annotations

from dash_onnx.cli.common import aligned
from dash_onnx.core.actions import ACTIONS
from dash_onnx.core.budget import PRESETS, shown
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import (
    TIE,
    Plan,
    alternatives,
    candidates,
    kl_reference,
    margin_of,
    measured_on,
)


def presets_table(manifest: Manifest) -> list[str]:
    """What each preset runs, as lines; empty without a plan."""
    rows = [
        [", ".join(names), f"{plan.time:.3f}", f"{plan.kl:.4f}", plan.head, _counts(plan)]
        for plan, names in candidates(manifest)
        if names
    ]
    return _explained(["preset", "time", "KL", "head", "layers"], rows, manifest)


def _counts(plan: Plan) -> str:
    """How many layers run each action, instead of the order in which they do."""
    if plan.path is None:
        return plan.text
    counts = ((action, plan.path.count(action)) for action in ACTIONS)
    return ", ".join(f"{count} {action}" for action, count in counts if count)


def plans_table(manifest: Manifest) -> list[str]:
    """The measured plans and which of them each preset runs, as lines; empty without a plan.

    Of the plans above the KL limits of all presets, only the slowest is shown.
    """
    plans, limit = candidates(manifest), max(PRESETS.values()) / margin_of(manifest)
    worse = [plan for plan, names in plans if not names and plan.kl > limit]
    rows = [
        [
            ", ".join(names),
            f"{plan.time:.3f}",
            shown(plan.budget),
            f"{plan.kl:.4f}",
            plan.head,
            plan.text,
        ]
        for plan, names in plans
        if plan not in worse[:-1]
    ]
    lines = _explained(["preset", "time", "budget", "KL", "head", "layers"], rows, manifest)
    told = "budget: the value of --budget that runs a row; it adds up the times of the parts"
    return [*lines, told] if lines else []


def _explained(head: list[str], rows: list[list[str]], manifest: Manifest) -> list[str]:
    """A table of plans, and what its columns mean."""
    if not rows:
        return []
    margin = margin_of(manifest)
    limits = {name: kl / margin for name, kl in PRESETS.items()}
    other = f"; up to {margin:g} times as high on other text" if margin > 1 else ""
    spared = f", divided by {margin:g} for other text" if margin > 1 else ""
    promised = ", ".join(f"{name} {limit:g}" for name, limit in PRESETS.items())
    best = manifest.variants[0]
    reference = kl_reference(manifest)
    decided = "; decisions per token only if they save more" if manifest.scorer else ""
    return [
        *aligned([head, *rows], left=(0, len(head) - 1)),
        f"time: of a token, as a fraction of that at {best}; KL: to {reference}, in nats on "
        f"{measured_on(manifest)}{other}; head: precision of the LM head",
        f"a preset runs the fastest plan within its KL limit ({promised} nats{spared}); of paths "
        f"that take up to {100 * TIE:g} % longer, the one with the lowest KL{decided}",
        *(
            f"{name}: no plan is within its limit, so it runs the one with the lowest KL"
            for name, limit in limits.items()
            if alternatives(limit, manifest) == (None, None)
        ),
    ]
