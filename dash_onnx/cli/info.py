"""dash-info: what a model or a bundle contains, before you spend time on it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_onnx.cli.cached import listing, remove
from dash_onnx.cli.common import Parser, add_json_option, aligned, run, tell
from dash_onnx.cli.forecast import forecast
from dash_onnx.cli.plans import plans_table
from dash_onnx.core.actions import DEFAULT_FORMS, PRECISIONS, SKIP, WIDE, Form, parse_variants
from dash_onnx.core.contract import SOURCE_FOLDER
from dash_onnx.core.errors import DashError, SourceError, printable
from dash_onnx.core.progress import about

if TYPE_CHECKING:
    from dash_onnx.core.manifest import Manifest

_EXAMPLES = """\
  dash-info ./model-folder
  dash-info model.gguf --variants int8,int4,wide --json
  dash-info out/
  dash-info                          # models that dash-run, dash-serve and dash-train exported
  dash-info --remove model.gguf"""

_EXACT = "int2 is exact: the weights of the layers are ternary"
_WIDE = "what runs INT4 has an INT8 copy of the layers for prompts: `--memory low` leaves it out"


def _parser() -> Parser:
    parser = Parser(
        "dash-info",
        "Show what a model contains, what its export would write and need, and how fast it would "
        "run on this machine; or what a bundle contains. Reads hardly any weights; for a hub "
        "id, downloads none except those of GGUF files.",
        _EXAMPLES,
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        help="model folder, .gguf file, hub id or bundle (default: list the models in the cache)",
    )
    parser.add_argument("--remove", metavar="MODEL", help="remove a model's bundle from the cache")
    parser.add_argument(
        "--variants",
        help=f"as in dash-export (default: int2 for ternary weights, else {DEFAULT_FORMS})",
    )
    parser.add_argument("--requantize", action="store_true", help="as in dash-export")
    add_json_option(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    parser.refuse(
        arguments,
        (arguments.remove is not None, "PATH", "does not go with --remove"),
        (arguments.path is None, "--variants --requantize", "needs a PATH"),
    )

    def body() -> None:
        from dash_onnx.core.manifest import MANIFEST_NAME

        if arguments.remove is not None:
            remove(arguments.remove)
        facts: Any
        if arguments.path is None:
            facts, lines = listing()
        elif not arguments.path:
            raise SourceError(
                "PATH is empty: give a model folder, a .gguf file, a hub id or a bundle"
            )
        elif not (Path(arguments.path) / MANIFEST_NAME).is_file():
            facts, lines = _model(arguments)
        elif arguments.variants or arguments.requantize:
            raise DashError("--variants and --requantize are for a model, and this is a bundle")
        else:
            facts, lines = _bundle(arguments)
        if arguments.json:
            print(json.dumps(facts))
        else:
            tell(*map(printable, lines))

    return run("dash-info", body)


def _model(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    variants, wide = parse_variants(arguments.variants)
    from dash_onnx.cli.prepare import prepare_export

    prepare_export()
    from dash_onnx.exporters.architectures import REGISTRY, architecture_of
    from dash_onnx.exporters.export.options import ExportOptions
    from dash_onnx.exporters.export.sizes import sizes_of
    from dash_onnx.exporters.export.suited import suited
    from dash_onnx.exporters.sources import open_source

    source = open_source(arguments.path, REGISTRY, arguments.requantize, weights=False)
    options = ExportOptions(
        variants=variants,
        wide=wide,
        requantize=arguments.requantize,
    )
    architecture = architecture_of(source.config)
    spec = architecture.describe(source.name, source.config, None)
    with suppress(SourceError):  # the weights of a hub id may not be downloaded
        options = suited(options, source, architecture, spec, layers=1)
    sizes = sizes_of(source, options)
    options = options.resolved(source.kind, spec)
    here = forecast(spec.facts, options, sizes)
    facts = {
        "kind": "model",
        "source": source.origin,
        "license": source.license,
        "model": dataclasses.asdict(spec.facts),
        "estimates": dataclasses.asdict(sizes),
        "here": dataclasses.asdict(here),
    }
    model = spec.facts
    columns = _columns(tuple(sizes.layers), sizes.heads)
    rows = [["", *columns]]
    parts: dict[str, dict[Any, int]] = {
        "layers, MB": sizes.layers,
        "LM head, MB": sizes.heads,
        "memory to run, MB": sizes.run,
    }
    for name, found in parts.items():
        rows.append([name, *(f"{found[a] / 1e6:.1f}" if a in found else "" for a in columns)])
    speeds: dict[Any, float] = {**here.tokens_per_s}
    rows.append(["tokens/s here", *(_speed(speeds[a]) if a in speeds else "" for a in columns)])
    free = here.free_memory_bytes
    return facts, [
        f"{source.origin}: {model.architecture}, {sizes.parameters / 1e9:.3f} billion parameters",
        f"{model.num_layers} layers, {model.hidden_size} wide ({model.intermediate_size} inside), "
        f"{model.num_heads} heads, {model.num_kv_heads} KV heads, {model.head_dim} wide; "
        f"{model.vocab_size} tokens, context {model.max_length}",
        _license(source.license),
        *([_EXACT] if options.ternary else []),
        "",
        *aligned(rows, left=(0,)),
        "",
        f"embedding {sizes.embedding / 1e6:.1f} MB; bundle {sizes.bundle / 1e6:.1f} MB on disk, "
        f"{sizes.work / 1e6:.1f} MB more during the export; {here.free_disk_bytes / 1e9:.1f} GB "
        "are free here",
        f"memory to run with a policy (every graph loaded) {sizes.run['policy'] / 1e6:.1f} MB; "
        f"KV cache {sizes.kv_per_token / 1e6:.3f} MB per token",
        *([_WIDE] if options.wide else []),
        f"memory to export about {sizes.export / 1e9:.1f} GB"
        + ("" if free is None else f"; {free / 1e9:.1f} GB are free here"),
        f"time to export about {about(here.export_s)}, then to train a policy about "
        f"{about(here.training_s)}",
        f"speeds and times are estimates for this machine, which reads memory at "
        f"{here.read_gb_per_s:.0f} GB/s; they are good to a factor of two",
    ]


def _bundle(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from dash_onnx.core.budget import reference_ms
    from dash_onnx.core.bundle import Bundle
    from dash_onnx.core.manifest import MANIFEST_NAME
    from dash_onnx.core.plans import candidates

    manifest = Bundle(arguments.path).manifest
    text = (Path(arguments.path) / MANIFEST_NAME).read_text("utf-8")
    written = json.loads(text)["format_version"]  # the manifest was read as the current format
    facts = dataclasses.asdict(manifest)
    del facts["files"], facts["ropes"], facts["attention"]
    size = sum(file.bytes for file in manifest.files.values())
    model, costs, export = manifest.model, manifest.costs, manifest.export
    columns = _columns((*manifest.layers[0].bytes,), costs.heads_ms)
    rows = [["", *columns]]
    totals = {
        form: sum(layer.bytes[form] for layer in manifest.layers)
        for form in columns
        if form in manifest.layers[0].bytes
    }
    medians: dict[Form, float] = {a: _median_ms(manifest, a) for a in manifest.actions}
    rows.append(["layers, MB", *(f"{totals[a] / 1e6:.1f}" if a in totals else "" for a in columns)])
    rows.append(["one layer, ms", *(_ms(medians.get(form)) for form in columns)])
    if (passes := costs.passes) is not None:
        most = passes.rows[-1]
        many = {form: passes.layer_ms(form, most, 0) for form in passes.layers_ms}
        rows.append([f"for {most} rows, ms", *(_ms(many.get(form)) for form in columns)])
    heads: dict[Form, float] = {head: ms for head, ms in costs.heads_ms.items()}
    rows.append(["LM head, ms", *(_ms(heads.get(form)) for form in columns)])
    tools = ", ".join(f"{name} {version}" for name, version in sorted(export.tools.items()))
    told = {
        "kind": "bundle",
        "format": written,
        "bytes": size,
        "kv_bytes_per_token": manifest.kv_bytes,
        "state_bytes": manifest.state_bytes,
        "plans": [
            {**dataclasses.asdict(plan), "presets": names} for plan, names in candidates(manifest)
        ],
    }
    return {**told, **facts}, [
        f"{arguments.path}: {model.name} ({model.architecture}), {size / 1e6:.0f} MB, for "
        f"{manifest.target.device}",
        f"{model.num_layers} layers, {model.hidden_size} wide, context {model.max_length}; blocks "
        f"of {manifest.target.block_size}, compensation of rank {manifest.compensation_rank}",
        *([_EXACT] if manifest.target.ternary and "int2" in manifest.variants else []),
        "",
        *aligned(rows, left=(0,)),
        "",
        f"a token, all layers {manifest.variants[0]}: {reference_ms(manifest):.2f} ms on "
        f"{costs.machine}, {costs.threads} threads",
        f"KV cache {manifest.kv_bytes / 1e6:.3f} MB per token" + _states(manifest),
        *_policy(manifest),
        f"from {export.source}, exported in {export.seconds:.0f} s, "
        f"peak memory {export.peak_rss_bytes / 1e9:.2f} GB",
        _license(export.license, any(name.startswith(SOURCE_FOLDER) for name in manifest.files)),
        f"calibrated on {manifest.calibration.tokens} tokens ({manifest.calibration.source})",
        f"format {written}, made with {tools}",
    ]


def _states(manifest: Manifest) -> str:
    if manifest.recurrence is None:
        return ""
    count = len(manifest.mixers) - len(manifest.attending)
    return f"; states of {count} layers {manifest.state_bytes / 1e6:.3f} MB, at any length"


def _license(name: str | None, documents: bool = False) -> str:
    where = f", see {SOURCE_FOLDER}/" if documents else ""
    return f"license {name or 'not stated by the source'}{where}"


def _columns(layers: Collection[Form], heads: Collection[Form]) -> list[Form]:
    """The forms of layers, and those of LM heads only, highest precision first."""
    order: tuple[Form, ...] = (*PRECISIONS, SKIP, WIDE)
    return [form for form in order if form in layers or form in heads]


def _policy(manifest: Manifest) -> list[str]:
    scorer = manifest.scorer
    if scorer is None:
        return [*plans_table(manifest), "no policy trained: see dash-train"]
    training = scorer.training
    return [
        f"policy: {training.effort} training on {training.tokens} tokens ({training.source})",
        *plans_table(manifest),
    ]


def _median_ms(manifest: Manifest, action: Any) -> float:
    return statistics.median(layer[action] for layer in manifest.costs.layers_ms)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _speed(tokens_per_s: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.3g}"
