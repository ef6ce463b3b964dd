"""Whether a bundle's losses were measured on text that its weights were not fitted to."""

from __future__ import annotations

from dash_onnx.core.manifest import Manifest

_MIN_SEQUENCES = 32


def holds_out(sequences: int) -> bool:
    """Whether an export hides some of so many calibration sequences from GPTQ."""
    return sequences >= _MIN_SEQUENCES


def measured_on(manifest: Manifest) -> str:
    """The text that the KL of plans was measured on; a training always holds some out."""
    seen = manifest.scorer is None and not holds_out(manifest.calibration.sequences)
    return "calibration text" if seen else "held-out text"
