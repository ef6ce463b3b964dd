"""Writes a bundle as a fused folder, all or nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from dash_onnx.core.actions import SKIP
from dash_onnx.core.atomic import writing
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import SOURCE_FOLDER
from dash_onnx.core.errors import BundleError, UnsupportedError
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import ScoredPolicy, StaticPolicy, make_policy
from dash_onnx.core.records import RecordError, from_json
from dash_onnx.exporters.fused.clients import CLIENTS
from dash_onnx.exporters.fused.facts import (
    BUDGET,
    DATA,
    FACTS,
    MODEL,
    FusedFacts,
    FuseOptions,
    adapter,
)
from dash_onnx.exporters.fused.fusion import Fusion
from dash_onnx.exporters.fused.genai import adapt_tokenizer, genai_config
from dash_onnx.runtime.ort import onnxruntime

_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


def fuse(bundle: Bundle, out: Path, options: FuseOptions, *, overwrite: bool) -> None:
    """Writes a folder that one kind of client can load.

    Args:
        bundle: a bundle exported for the CPU.
        out: the folder, written to a temporary sibling and renamed at the end.
        options: the client, the policy and its budget.
        overwrite: replace an existing fused folder.

    Raises:
        DashError: the policy cannot be fused, or `out` may not be replaced.
    """
    check_fusable(bundle.manifest, options.client)
    if options.budget is not None:
        options = replace(options, budget=str(options.budget))
    manifest, client = bundle.manifest, CLIENTS[options.client]
    trained = manifest.scorer is not None and options.budget is None
    policy = make_policy(options.policy or ("dash" if trained else ""), manifest, options.budget)
    if not isinstance(policy, ScoredPolicy | StaticPolicy):
        raise UnsupportedError(f"policy {policy.name!r} has no graph; fuse dash or a static one")
    facts = FusedFacts.of(options, policy, manifest)
    if facts.path and options.policy.startswith("static:@"):  # the file may change
        options = replace(options, policy=f"static:{','.join(facts.path)}")
        facts = replace(facts, options=options)
    if "int2" in facts.runs and not client.multiplies_blocks:
        raise UnsupportedError(
            f"{options.client} has no fast product for INT2: choose another --policy, or export "
            "with --variants int8,int4"
        )
    head = policy.head
    if head == "int2" and (facts.budgets or not client.multiplies_blocks):
        head = manifest.heads[SKIP]  # one for all budgets, even those that lose less
    with writing(out, overwrite=overwrite, marker=FACTS) as folder:
        with (folder / DATA).open("wb") as data:
            model = Fusion(bundle, data, client, head, facts).build()
        onnx.save(model, folder / MODEL)
        onnx.checker.check_model(folder / MODEL)
        for name in _TEXT_FILES:
            if name in bundle:
                shutil.copyfile(bundle.verified(name), folder / name)
        for name in manifest.files:
            if name.startswith(f"{SOURCE_FOLDER}/"):
                (folder / SOURCE_FOLDER).mkdir(exist_ok=True)
                shutil.copyfile(bundle.verified(name), folder / name)
        if client.genai_files:
            (folder / "genai_config.json").write_text(genai_config(bundle), "utf-8")
            adapt_tokenizer(folder)
            for preset, budget in facts.budgets.presets.items() if facts.budgets else ():
                _write_adapter(folder / adapter(preset), budget)
        (folder / FACTS).write_text(json.dumps(dataclasses.asdict(facts), indent=2) + "\n", "utf-8")


def check_fusable(manifest: Manifest, client: str) -> None:
    """Refuses a bundle that has no fused graph, whatever the policy.

    Raises:
        UnsupportedError: the client is not known, or cannot run a part of the bundle.
    """
    if client not in CLIENTS:
        raise UnsupportedError(f"unknown client {client!r}; choose {', '.join(CLIENTS)}")
    if manifest.target.device != "cpu":
        raise UnsupportedError(
            f"this bundle is for {manifest.target.device}; fused graphs are built for the CPU: "
            "export again with --device cpu"
        )
    if manifest.target.kv_cache != "float":
        raise UnsupportedError(
            f"this bundle has an {manifest.target.kv_cache} KV cache, which fused graphs lack: "
            "export again without --kv-cache"
        )
    others = any((a.source, a.kv_heads, a.head_dim) != (None,) * 3 for a in manifest.attention)
    if others or manifest.block.per_layer_width:
        raise UnsupportedError(
            f"{manifest.model.architecture} cannot be fused: a fused graph needs heads of one "
            "size, and K/V in every layer; run the bundle itself"
        )
    if manifest.mixers and client != "genai":
        kinds = ", ".join(sorted({*manifest.mixers} - {"attention"}))
        raise UnsupportedError(
            f"{client} does not support the states of {kinds} layers: fuse --for "
            "genai, or run the bundle itself"
        )


def options_of(folder: Path) -> FuseOptions | None:
    """The options that a fused folder was made with; None if there is no such folder.

    Raises:
        BundleError: its facts cannot be read.
    """
    if not (folder / MODEL).is_file():
        return None
    try:
        return from_json(FusedFacts, json.loads((folder / FACTS).read_text("utf-8"))).options
    except (OSError, ValueError, RecordError):
        raise BundleError(
            f"{folder / FACTS} cannot be read; remove {folder} and run dash-fuse again"
        ) from None


def _write_adapter(path: Path, budget: float) -> None:
    """Writes the adapter: GenAI feeds inputs that have a default only from adapters."""
    ort = onnxruntime()
    value = ort.OrtValue.ortvalue_from_numpy(np.array([budget], np.float32))
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({BUDGET: value})
    file.export_adapter(str(path))
