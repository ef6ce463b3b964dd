"""dash-train: trains the policy of a bundle, or trains it again."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from dash_onnx.cli.cached import bundle_of
from dash_onnx.cli.common import (
    EFFORTS,
    Parser,
    add_bundle_argument,
    add_json_option,
    add_log_options,
    add_training_options,
    aligned,
    known,
    log_level,
    run,
    tell,
)
from dash_onnx.cli.plans import presets_table
from dash_onnx.cli.prepare import prepare_export
from dash_onnx.core.budget import scorer_facts, shown
from dash_onnx.core.errors import DashError
from dash_onnx.report.curve import curve

if TYPE_CHECKING:
    from dash_onnx.core.manifest import Manifest

_LOG = logging.getLogger(__name__)

_EXAMPLES = """\
  dash-train out/ --effort normal
  dash-train out/ --decisions 3
  dash-train out/ --from base/
  dash-train model.gguf                    # the bundle that dash-run uses, exported if need be
  dash-train out/ --calibration support-chats.jsonl handbook.txt
  dash-train out/ --calibration handbook/@0.3 hub:HuggingFaceH4/ultrachat_200k:train_sft@0.7
  zcat tickets.jsonl.gz | dash-train out/ --calibration -"""


def _parser() -> Parser:
    parser = Parser(
        "dash-train",
        "Train the policy of a bundle, which chooses for each token how each layer runs. The "
        "bundle keeps its policy until the new one is complete. Run the same command again to "
        "continue an interrupted training.",
        _EXAMPLES,
    )
    add_bundle_argument(
        parser, "a bundle; or a model (hub id, folder, GGUF file), first exported into a cache"
    )
    add_training_options(parser, EFFORTS)
    parser.add_argument(
        "--from",
        dest="start",
        metavar="OTHER",
        type=known,
        help="start from the policy of another bundle of a similar model, or of BUNDLE itself, and "
        "train with a tenth of the passes: for a fine-tune of it, new text or another machine",
    )
    add_json_option(parser)
    add_log_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    kept = "is kept from the other policy by --from: leave --decisions out"
    parser.refuse(arguments, (arguments.start is not None, "--decisions", kept))

    def body() -> None:
        prepare_export()
        from dash_onnx.core.atomic import TRAINING, workspace_of
        from dash_onnx.core.bundle import Bundle
        from dash_onnx.core.contract import FUSED_FOLDER
        from dash_onnx.exporters.calibration.texts import text_sources
        from dash_onnx.exporters.fused import fuse, options_of
        from dash_onnx.exporters.pipeline import announce_training
        from dash_onnx.exporters.train.options import TrainOptions
        from dash_onnx.exporters.train.train import train

        options = TrainOptions(
            effort=arguments.effort,
            calibration=text_sources(arguments.calibration),
            device=arguments.train_device,
            decisions=arguments.decisions,
            start=arguments.start,
        )
        bundle = Path(bundle_of(arguments.bundle)).resolve()  # the training replaces the folder
        fused = options_of(bundle / FUSED_FOLDER)
        announce_training(Bundle(bundle).manifest.model, options)
        try:
            manifest = train(bundle, options)
        except (KeyboardInterrupt, OSError) as error:
            if any(workspace_of(bundle, TRAINING).glob("*.pt")):
                error.add_note("the same command continues from where the training was last saved")
            raise
        facts = manifest.scorer
        assert facts is not None
        if fused is not None:
            # It may fail over a full disk, or a budget that the new policy cannot hold.
            try:
                fuse(Bundle(bundle), bundle / FUSED_FOLDER, fused, overwrite=True)
            except (DashError, OSError) as error:
                where = bundle / FUSED_FOLDER
                _LOG.warning(
                    "%s held the old policy: removed; %s; write it again with dash-fuse",
                    where,
                    error,
                )
        if arguments.json:
            print(json.dumps(dataclasses.asdict(facts)))
        else:
            tell(*table(manifest), curve(manifest).verdict)

    return run("dash-train", body, log_level(arguments))


def table(manifest: Manifest) -> list[str]:
    """The policy table and the presets, as lines."""
    facts = scorer_facts(manifest)
    head = ["budget", "KL", "head", *facts.actions]
    rows = [
        [
            shown(point.budget, up=point is not facts.points[-1]),
            f"{point.kl:.4f}",
            point.head,
            *(f"{point.shares[action]:.0%}" for action in facts.actions),
        ]
        for point in facts.points
    ]
    training = facts.training
    return [
        *aligned([head, *rows]),
        "",
        *presets_table(manifest),
        "",
        f"{training.effort} training on {training.tokens} tokens ({training.source}) in "
        f"{training.seconds:.0f} s; table from {training.held_out_tokens} other tokens",
    ]
