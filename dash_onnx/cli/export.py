"""dash-export: a Hugging Face model in, a DASH bundle out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shlex
from contextlib import suppress
from pathlib import Path

from dash_onnx.cli.common import (
    EFFORTS,
    Parser,
    add_json_option,
    add_log_options,
    add_training_options,
    log_level,
    positive,
    run,
    tell,
)
from dash_onnx.cli.plans import presets_table
from dash_onnx.cli.prepare import prepare_export
from dash_onnx.cli.tables import check_lines, summary
from dash_onnx.core.actions import DEFAULT_FORMS, Action, parse_variants
from dash_onnx.core.atomic import check_destination
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import BundleError, DashError
from dash_onnx.report.curve import curve

_LOG = logging.getLogger(__name__)

_EXAMPLES = """\
  dash-export HuggingFaceTB/SmolLM2-135M-Instruct out/
  dash-export ./model-folder out/ --variants full,int8,int4,wide --max-length 2048
  dash-export model.gguf out/ --calibration my-domain.txt --overwrite
  dash-export model.gguf out/ --calibration chats/@0.7 hub:HuggingFaceH4/no_robots@0.3"""


def _parser() -> Parser:
    parser = Parser(
        "dash-export",
        "Export a causal LM as a bundle, a folder with ONNX graphs of each layer in INT8, in INT4 "
        "and as a skip, and train its policy. --variants adds full precision and INT2.",
        _EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder or .gguf file")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new bundle")
    graphs = parser.add_argument_group("graphs")
    graphs.add_argument(
        "--variants",
        help="precisions of each layer: full, int8, int4, int2; and wide, an INT8 copy that runs "
        "the prompts and batches of int4 and int2 faster on a CPU (default: int2 for ternary "
        f"weights, which it represents exactly, else {DEFAULT_FORMS})",
    )
    graphs.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="device of the bundle: cpu computes in FP32, cuda in FP16 (default: %(default)s)",
    )
    graphs.add_argument(
        "--max-length",
        type=positive,
        help="context in tokens (default: the model's own; for longrope its original length)",
    )
    graphs.add_argument(
        "--kv-cache",
        choices=("float", "int8", "int4"),
        default="float",
        help="element type of the KV cache: on the CPU, int8 needs a quarter of float's memory, "
        "int4 an eighth (default: %(default)s)",
    )
    graphs.add_argument(
        "--requantize",
        action="store_true",
        help="requantize the weights of a GGUF file: faster in small models, but less accurate "
        "than its own integers",
    )
    graphs.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub id (default: main)"
    )
    policy = parser.add_argument_group("text and training")
    add_training_options(policy, ("none", *EFFORTS))
    work = parser.add_argument_group("export")
    work.add_argument(
        "--fused",
        action="store_true",
        help="also write OUT/fused, the policy as one graph for other programs (see dash-fuse)",
    )
    work.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing bundle, and discard an interrupted export with other options",
    )
    work.add_argument(
        "--check",
        choices=("quick", "full", "none"),
        default="quick",
        help="compare the result with transformers; exit code 1 if a limit is exceeded. quick: the "
        "highest precision of every layer, on a short text; full: every graph, on a longer text, "
        "with a table; none: no comparison (default: %(default)s)",
    )
    add_json_option(parser)
    add_log_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    parser.refuse(
        arguments,
        (arguments.effort == "none", "--decisions", "needs a training: leave --effort none out"),
        (
            arguments.fused,
            "--device --kv-cache",
            "does not go with --fused, whose graphs are for the CPU and have a float KV cache",
        ),
    )
    failures: list[str] = []

    def body() -> None:
        variants, wide = parse_variants(arguments.variants)
        _check_out(arguments.out, arguments.overwrite)  # before imports that take seconds
        try:
            failures.extend(_export(arguments, variants, wide))
        except (KeyboardInterrupt, DashError, OSError) as error:
            if (
                arguments.effort != "none" and not arguments.overwrite and _untrained(arguments.out)
            ):  # else it may be an older one
                command = f"dash-train {shlex.quote(str(arguments.out))}"
                error.add_note(
                    f"{arguments.out} can answer; `{command}`, with the same --effort, "
                    "--calibration, --decisions and --train-device, trains its policy"
                )
            raise

    code = run("dash-export", body, log_level(arguments))
    return code or (1 if failures else 0)


def _export(arguments: argparse.Namespace, variants: tuple[Action, ...], wide: bool) -> list[str]:
    """Runs the pipeline and prints the result; returns the limits that the check found exceeded."""
    _LOG.info("opening %s", arguments.model)
    prepare_export()
    from dash_onnx.exporters.calibration.texts import text_sources
    from dash_onnx.exporters.export import ExportOptions
    from dash_onnx.exporters.fused import FuseOptions
    from dash_onnx.exporters.pipeline import build
    from dash_onnx.exporters.train.options import PLANS, TrainOptions

    calibration, trained = text_sources(arguments.calibration), arguments.effort != "none"
    options = ExportOptions(
        variants=variants,
        wide=wide,
        device=arguments.device,
        train_device=arguments.train_device,
        max_length=arguments.max_length,
        calibration=calibration,
        min_tokens=PLANS[arguments.effort].min_tokens if trained else 0,
        kv_cache=arguments.kv_cache,
        requantize=arguments.requantize,
        overwrite=arguments.overwrite,
        revision=arguments.revision,
    )
    training = TrainOptions(
        effort=arguments.effort,
        calibration=calibration,
        device=arguments.train_device,
        decisions=arguments.decisions,
    )
    built = build(
        arguments.model,
        arguments.out,
        options,
        check=arguments.check,
        training=training if trained else None,
        fused=FuseOptions() if arguments.fused else None,
    )
    manifest, checked = built.manifest, built.checked
    if arguments.json:
        facts = dataclasses.asdict(manifest)
        del facts["files"], facts["ropes"], facts["attention"]
        facts["check"] = checked and dataclasses.asdict(checked)
        print(json.dumps({"folder": str(arguments.out), **facts}))
    else:
        tell(*presets_table(manifest))
        if manifest.scorer is not None:
            tell(curve(manifest).verdict)
        if checked is not None:
            tell(*check_lines(checked))
        print(*summary(manifest, arguments.out), sep="\n")  # a command to copy has no line breaks
    return checked.failures if checked else []


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuses to replace existing files; a bundle without a policy may only need training."""
    try:
        check_destination(out, overwrite)
    except BundleError as error:
        if not overwrite and _untrained(out):
            raise BundleError(
                f"{error}, or train its policy: dash-train {shlex.quote(str(out))}"
            ) from None
        raise


def _untrained(out: Path) -> bool:
    with suppress(BundleError):
        return Bundle(out).manifest.scorer is None
    return False
