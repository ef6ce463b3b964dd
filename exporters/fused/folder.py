"""From a bundle to a fused folder, all or nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from dash_onnx.budget import Budget
from dash_onnx.bundle import Bundle, writing
from dash_onnx.errors import UnsupportedError
from dash_onnx.exporters.fused.fusion import Fusion
from dash_onnx.exporters.fused.genai import genai_config
from dash_onnx.exporters.fused.names import DATA, MODEL
from dash_onnx.policy import ScoredPolicy, StaticPolicy, make_policy

_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


def fuse(
    bundle: Bundle, out: Path, policy: str = "", budget: Budget | None = None, *, overwrite: bool
) -> None:
    """Writes a folder that ONNX Runtime GenAI loads as it is.

    Args:
        bundle: exported for the CPU.
        out: written to a temporary sibling and renamed at the end.
        policy: `dash`, or one with the same path for every token; see `make_policy`.
        budget: of `dash`: the default of the graph's own input.
        overwrite: replace an existing fused folder.

    Raises:
        DashError: the policy cannot be fused, or `out` must not be written.
    """
    manifest = bundle.manifest
    if manifest.target.device != "cpu":
        raise UnsupportedError(
            f"this bundle is for {manifest.target.device}; fused graphs are built for the CPU: "
            "export again with --device cpu"
        )
    chosen = make_policy(policy, manifest, budget)
    if isinstance(chosen, ScoredPolicy):
        fixed, default = None, chosen.budget
    elif isinstance(chosen, StaticPolicy):
        fixed, default = chosen.uniform, 0.0
    else:
        raise UnsupportedError(f"policy {chosen.name!r} has no graph; fuse dash or a static one")
    with writing(out, overwrite=overwrite, marker=MODEL) as folder:
        with (folder / DATA).open("wb") as data:
            model = Fusion(bundle, data, chosen.head, fixed, default).build()
        onnx.save(model, folder / MODEL)
        onnx.checker.check_model(folder / MODEL)
        for name in _TEXT_FILES:
            if name in bundle:
                shutil.copy(bundle.verified(name), folder / name)
        (folder / "genai_config.json").write_text(genai_config(bundle), "utf-8")
