"""dash-report: one HTML page on a bundle's policy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dash_onnx.cli.common import (
    Parser,
    add_device_options,
    add_log_options,
    log_level,
    positive,
    run,
)
from dash_onnx.core.contract import REPORT_NAME
from dash_onnx.core.progress import Phase

_EXAMPLES = """\
  dash-report out/
  dash-report out/ --text book.txt --html report.html --budgets quality balanced 0.8
  dash-report out/ --json > report.json"""


def _parser() -> Parser:
    parser = Parser(
        "dash-report",
        "Show what the trained policy of a bundle does: speed against quality, the decisions for "
        "each token of a sample text, training, reliability. Writes one self-contained HTML file.",
        _EXAMPLES,
    )
    parser.add_argument("bundle", metavar="OUT", type=Path, help="a bundle with a policy")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text whose beginning is the sample (default: the model writes a sample)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="the page to write (default: report.html in the bundle)",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=[],
        metavar="BUDGET",
        help="presets or fractions to run the sample at (default: every preset)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=180,
        metavar="N",
        help="tokens of the sample (default: 180)",
    )
    add_device_options(parser)
    parser.add_argument("--json", action="store_true", help="print the data as JSON; write no HTML")
    add_log_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.json and arguments.html:
        parser.error("--json writes no HTML: leave --html out")
    return run("dash-report", lambda: _report(arguments), log_level(arguments))


def _report(arguments: argparse.Namespace) -> None:
    import dash_onnx
    from dash_onnx.core.atomic import check_file, write_text
    from dash_onnx.core.budget import scorer_facts
    from dash_onnx.core.records import to_json
    from dash_onnx.core.text import read_text
    from dash_onnx.report.page import render
    from dash_onnx.report.report import build
    from dash_onnx.report.sample import generated_text, given_text

    given = read_text(arguments.text) if arguments.text else None
    model = dash_onnx.load(arguments.bundle, device=arguments.device, threads=arguments.threads)
    facts = scorer_facts(model.manifest)
    budgets = arguments.budgets or sorted(facts.presets, key=facts.presets.__getitem__)
    for budget in budgets:
        model.policy("dash", budget)  # a wrong one is refused before anything runs
    target = arguments.html or arguments.bundle / REPORT_NAME
    if not arguments.json:
        check_file(target)
    if given is None:
        text = generated_text(model, arguments.tokens)
    else:
        text = given_text(model, given, arguments.tokens, arguments.text.name)
    with Phase("runs") as phase:
        report = build(model, text, budgets, phase.update)
    if arguments.json:
        print(json.dumps(to_json(report)))
        return
    write_text(target, render(report))
    print(target)


if __name__ == "__main__":
    raise SystemExit(main())
