"""Everything in a report, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from dash_onnx.core.actions import Action
from dash_onnx.core.budget import Budget, reference_ms
from dash_onnx.core.facts import Costs, LayerFacts, Training
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import kl_reference, measured_on
from dash_onnx.core.version import __version__
from dash_onnx.report.analysis import Analysis, analyse
from dash_onnx.report.curve import Curve, curve
from dash_onnx.report.sample import Sample, SampleText, measure
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.ort import onnxruntime


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
        model: name of the source model.
        actions: actions of the bundle, most expensive first.
        full_ms: profiled milliseconds of a token at the highest exported precision.
        curve: speed against quality, from the manifest.
        sample: a text run under the policy; None without a scorer.
        analyses: of `sample.runs`, in order.
        training: how the scorer was trained; None without one.
        layers: measurements of the calibration.
        costs: profiled milliseconds.
        provenance: facts about the origin, by name.
        measured_on: the text that the KL of the curve was measured on.
        kl_reference: what that KL is to.
    """

    model: str
    actions: tuple[Action, ...]
    full_ms: float
    curve: Curve
    sample: Sample | None
    analyses: tuple[Analysis, ...]
    training: Training | None
    layers: tuple[LayerFacts, ...]
    costs: Costs
    provenance: dict[str, str]
    measured_on: str
    kl_reference: str


def build(
    model: Model,
    text: SampleText | None,
    budgets: Sequence[Budget],
) -> Report:
    """Measures the sample and gathers the rest from the manifest.

    Args:
        model: the bundle.
        text: text of the sample; None for a bundle without a scorer.
        budgets: presets or fractions to run it at.

    Raises:
        PolicyError: no plan was measured, or the bundle cannot meet a budget.
    """
    manifest = model.manifest
    training = manifest.scorer.training if manifest.scorer else None
    sample = measure(model, text, budgets) if text else None
    runs = [(run, sample.tokens) for run in sample.runs] if sample else []
    return Report(
        model=manifest.model.name,
        actions=manifest.actions,
        full_ms=reference_ms(manifest),
        curve=curve(manifest),
        sample=sample,
        analyses=tuple(analyse(run, tokens, manifest.actions) for run, tokens in runs),
        training=training,
        layers=manifest.layers,
        costs=manifest.costs,
        provenance=_provenance(manifest, training, sample),
        measured_on=measured_on(manifest),
        kl_reference=kl_reference(manifest),
    )


def _provenance(
    manifest: Manifest, training: Training | None, sample: Sample | None
) -> dict[str, str]:
    model, target, origin = manifest.model, manifest.target, manifest.calibration
    tools = ", ".join(f"{tool} {version}" for tool, version in manifest.export.tools.items())
    run: dict[str, str] = {}
    if training:
        run = {
            "scorer trained on": f"{training.tokens} tokens, {training.source}; "
            f"effort {training.effort}, seed {training.seed}, {training.seconds:.0f} s",
            "curve measured on": f"{training.held_out_tokens} tokens held out of the training",
        }
    if sample:
        run["sample"] = (
            f"{len(sample.tokens)} tokens, {sample.source}, after {sample.prompt_tokens} "
            "prefilled ones"
        )
    return {
        "model": f"{model.name} ({model.architecture}, {model.num_layers} layers, "
        f"hidden size {model.hidden_size}, vocabulary {model.vocab_size})",
        "source": manifest.export.source,
        "graphs": f"{', '.join(manifest.variants)} for {target.device} in {target.dtype}, "
        f"blocks of {target.block_size}",
        "costs profiled on": f"{manifest.costs.machine}, {manifest.costs.threads} threads",
        "layers calibrated on": f"{origin.tokens} tokens, {origin.source}, seed {origin.seed}",
        **run,
        "exported with": tools,
        "report made with": f"dash-onnx {__version__}, onnxruntime {onnxruntime().__version__}, on "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
