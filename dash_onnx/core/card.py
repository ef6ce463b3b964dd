"""The model card of a bundle: what a hub shows of it, with the manifest's figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dash_onnx.core.atomic import write_text
from dash_onnx.core.budget import reference_ms
from dash_onnx.core.contract import CARD_NAME, SOURCE_FOLDER
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import kl_reference, measured_on, preset_plans

_HUB = re.compile(r"\w+:([\w.-]+/[\w.-]+)(?:/[^@]*)?@\w+")


def write_card(folder: Path, manifest: Manifest) -> None:
    """Writes a bundle's README.md; it is not part of the bundle."""
    write_text(folder / CARD_NAME, card(manifest))


def update_card(folder: Path, before: Manifest, manifest: Manifest) -> None:
    """Writes a bundle's README.md again, unless it is not as `write_card` wrote it before."""
    path = folder / CARD_NAME
    if path.is_file() and path.read_text("utf-8", "replace") == card(before):
        write_card(folder, manifest)


def card(manifest: Manifest) -> str:
    """The card in Markdown, with the front matter that hubs read."""
    model, export, costs = manifest.model, manifest.export, manifest.costs
    base = _HUB.fullmatch(export.source)
    head = {
        "license": export.license,
        "base_model": base and base[1],
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "dash-onnx", *manifest.variants],
    }
    size = sum(facts.bytes for facts in manifest.files.values())
    documents = sorted(name for name in manifest.files if name.startswith(f"{SOURCE_FOLDER}/"))
    full_ms = reference_ms(manifest)
    lines = [
        "---",
        *(
            f"{key}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in head.items()
            if value
        ),
        "---",
        "",
        f"# {model.name}, ONNX in {', '.join(manifest.variants).upper()}",
        "",
        f"A bundle of dash-onnx, {size / 1e6:.0f} MB, made from `{export.source}` "
        f"({model.architecture}, {model.num_layers} layers, context {model.max_length}). "
        f"License: {export.license or 'not stated by the source'}.",
    ]
    if documents:
        links = ", ".join(f"[{name}]({name})" for name in documents)
        lines += ["", f"The documents of the original model: {links}."]
    lines += [
        "",
        "```sh",
        "pip install '.[cpu]'    # in a clone of dash-onnx",
        'dash-run . "Hello!"     # in this folder',
        "```",
    ]
    if plans := preset_plans(manifest):
        lines += ["", "| preset | tokens/s | KL, nats | layers |", "|---|--:|--:|---|"]
        for name, plan in plans.items():
            speed = 1000 / (plan.time * full_ms)
            lines.append(f"| `{name}` | {speed:.0f} | {plan.kl:.4f} | {plan.text} |")
        lines += [
            "",
            f"Speed: one answer, profiled on {costs.machine} with {costs.threads} threads. KL: "
            f"against {kl_reference(manifest)}, on {measured_on(manifest)}. Calibrated on "
            f"{manifest.calibration.tokens:,} tokens ({manifest.calibration.source}).",
        ]
    return "\n".join(lines) + "\n"
