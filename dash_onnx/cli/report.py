"""dash-report: one HTML page on a bundle's policy."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from dash_onnx.cli.common import Parser, add_bundle_argument, add_max_tokens_option, run
from dash_onnx.core.contract import REPORT_NAME

_EXAMPLES = """\
  dash-report out/
  dash-report out/ --text book.txt --html report.html --budget quality --budget 0.8
  dash-report out/ --json > report.json"""


def _parser() -> Parser:
    parser = Parser(
        "dash-report",
        "Show speed against quality of a bundle, and what its trained policy does: the decisions "
        "for each token of a sample text, the training, and predicted against measured KL. Writes "
        "one self-contained HTML file.",
        _EXAMPLES,
    )
    add_bundle_argument(parser)
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text, or .jsonl records; its beginning is the sample (default: the model "
        "writes one)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="the page to write (default: report.html in the bundle)",
    )
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="X",
        help="preset or fraction to run the sample at; can be repeated (default: every preset)",
    )
    add_max_tokens_option(parser, 180, "maximum tokens of the sample")
    parser.add_argument("--json", action="store_true", help="print the data as JSON; write no HTML")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    parser.refuse(arguments, (arguments.json, "--html", "is not written with --json"))
    return run("dash-report", lambda: _report(parser, arguments))


def _report(parser: Parser, arguments: argparse.Namespace) -> None:
    import dash_onnx
    from dash_onnx.core.atomic import check_file, write_text
    from dash_onnx.core.documents import read_document
    from dash_onnx.report.page import render
    from dash_onnx.report.report import build
    from dash_onnx.report.sample import generated_text, given_text

    model = dash_onnx.load(arguments.bundle)
    given = read_document(arguments.text, model.text) if arguments.text else None
    scorer = model.manifest.scorer
    untrained = "this bundle has no policy yet: train one with dash-train"
    options = "--text --budget --max-tokens"
    parser.refuse(arguments, (scorer is None, options, f"is for a trained policy; {untrained}"))
    presets = scorer.presets if scorer else {}
    budgets = arguments.budget or sorted(presets, key=presets.__getitem__)
    for budget in budgets:
        model.policy("dash", budget)  # an invalid one is refused before anything runs
    target = arguments.html or arguments.bundle / REPORT_NAME
    if not arguments.json:
        check_file(target)
    if scorer is None:
        text = None
    elif given is None:
        text = generated_text(model, arguments.max_tokens)
    else:
        text = given_text(model, given, arguments.max_tokens, arguments.text.name)
    report = build(model, text, budgets)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
        return
    write_text(target, render(report))
    print(target)
