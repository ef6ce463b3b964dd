"""The plans of a bundle, as the tools print them."""

from __future__ import annotations

from dash_onnx.cli.common import aligned
from dash_onnx.core.budget import PRESETS, shown
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import TIE, alternatives, candidates, kl_reference, margin_of, measured_on


def plans_table(manifest: Manifest) -> list[str]:
    """The measured plans and which of them each preset runs, as lines; empty without a plan.

    Of the plans above the KL limits of all presets, only the slowest is shown.
    """
    plans, margin = candidates(manifest), margin_of(manifest)
    if not plans:
        return []
    limits = {name: kl / margin for name, kl in PRESETS.items()}
    worse = [plan for plan, names in plans if not names and plan.kl > max(limits.values())]
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
    other = f"; up to {margin:g} times as high on other text" if margin > 1 else ""
    spared = f", divided by {margin:g} for other text" if margin > 1 else ""
    promised = ", ".join(f"{name} {limit:g}" for name, limit in PRESETS.items())
    best = manifest.variants[0]
    reference = kl_reference(manifest)
    decided = "; decisions per token only if they save more" if manifest.scorer else ""
    return [
        *aligned([["preset", "time", "budget", "KL", "head", "layers"], *rows], left=1),
        f"time: of a token, as a fraction of that at {best}; budget: the same from the sum of its "
        f"parts; KL: to {reference}, in nats on {measured_on(manifest)}{other}; head: precision "
        "of the LM head",
        f"a preset runs the fastest plan within its KL limit ({promised} nats{spared}); of paths "
        f"that take up to {100 * TIE:g} % longer, the one with the lowest KL{decided}",
        *(
            f"{name}: no plan is within its limit, so it runs the one with the lowest KL"
            for name, limit in limits.items()
            if alternatives(limit, manifest) == (None, None)
        ),
    ]
