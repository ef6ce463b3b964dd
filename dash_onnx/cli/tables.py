"""The final output of dash-export."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dash_onnx.cli.common import aligned
from dash_onnx.core.actions import ACTIONS

if TYPE_CHECKING:
    from dash_onnx.core.manifest import Manifest
    from dash_onnx.exporters.export.check import CheckResult


def check_lines(result: CheckResult) -> list[str]:
    """The result of a check: a table of relative errors if it ran every graph or failed."""
    if not result.rows:
        return ["not compared with transformers: its RoPE differs for a context of this length"]
    *rows, whole = result.rows
    ((best, kl),) = whole.errors.items()
    worst = max(row.errors[best] for row in rows)
    line = (
        f"against transformers on {result.tokens} tokens: {best} layers differ by at most "
        f"{worst:.1e} (limit {rows[0].limits[best]:.0e}), KL of the whole path {kl:.1e} "
        f"(limit {whole.limits[best]:.0e})"
    )
    if result.kind == "quick" and not result.failures:
        return [line]
    actions = [action for action in ACTIONS if any(action in row.errors for row in rows)]
    head = ["layer", *(f"{action} err" for action in actions), "limits exceeded"]
    cells = [
        [
            row.name,
            *(f"{row.errors[a]:.2e}" if a in row.errors else "" for a in actions),
            ", ".join(row.exceeded),
        ]
        for row in result.rows
    ]
    return [*aligned([head, *cells]), "", line]


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What was exported, and the next command, as lines."""
    facts = manifest.export
    size = sum(file.bytes for file in manifest.files.values())
    lines = [
        f"{manifest.model.name} -> {out}: {size / 1e6:.0f} MB in {facts.seconds:.0f} s, "
        f"peak memory {facts.peak_rss_bytes / 1e9:.2f} GB",
        f"calibrated on {manifest.calibration.tokens} tokens ({manifest.calibration.source})",
    ]
    if facts.fp32_kept:
        lines.append(f"stored as FP32, because FP16 cannot hold them: {', '.join(facts.fp32_kept)}")
    return [*lines, f'try it: dash-run {shlex.quote(str(out))} "Hello!"']
