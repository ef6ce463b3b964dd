"""dash-fuse: the policy of a bundle as one ONNX graph, for other ONNX Runtime clients."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dash_onnx.cli.common import Parser, add_bundle_argument, add_json_option, run
from dash_onnx.cli.prepare import prepare_export
from dash_onnx.core.actions import PRECISIONS, WIDE

_CLIENTS = ("genai", "optimum", "node", "web")
_EXAMPLES = """\
  dash-fuse out/                                # out/fused/, the trained policy
  dash-fuse out/ phone/ --budget fast
  dash-fuse out/ page/model --for web           # see examples/web
  dash-fuse out/ phone/ --policy static:int8,int4*28,int8"""


def _parser() -> Parser:
    parser = Parser(
        "dash-fuse",
        "Write one ONNX graph that makes the decisions itself: a folder for onnxruntime-genai, or "
        "for any ONNX Runtime program that feeds past_key_values. The bundle is not changed.",
        _EXAMPLES,
    )
    add_bundle_argument(parser)
    parser.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", help="folder to write (default: BUNDLE/fused)"
    )
    parser.add_argument(
        "--for",
        dest="client",
        choices=_CLIENTS,
        default=_CLIENTS[0],
        help="the program that will run it: ONNX Runtime GenAI and lm-eval, optimum, "
        "onnxruntime-node or onnxruntime-web (default: %(default)s)",
    )
    parser.add_argument(
        "--policy",
        default="",
        help="dash, or a policy that runs all tokens the same way, such as int4 or static:... "
        "(default: with --budget what dash-run runs at that budget; without it dash if a policy "
        "was trained, else what balanced runs)",
    )
    parser.add_argument(
        "--budget",
        help="the graph's default budget: quality, balanced, fast or a fraction (default: "
        "balanced)",
    )
    parser.add_argument(
        "--prefill",
        choices=(*PRECISIONS, WIDE),
        help="for dash, the precision of prompts (default: the highest that the policy uses, but "
        "int8 instead of full); for a single precision such as int4, only wide: faster prompts, in "
        "INT8; a precision that the policy does not use makes the file larger",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    add_json_option(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    arguments = _parser().parse_args(argv)
    return run("dash-fuse", lambda: _fuse(arguments))


def _fuse(arguments: argparse.Namespace) -> None:
    prepare_export()
    from dash_onnx.exporters.api import fuse
    from dash_onnx.exporters.fused import DATA, FACTS, MODEL

    names = ("client", "policy", "budget", "prefill", "overwrite")
    options = {name: getattr(arguments, name) for name in names}
    out = fuse(arguments.bundle, arguments.out, **options)
    size = sum((out / name).stat().st_size for name in (MODEL, DATA))
    if arguments.json:
        print(json.dumps({"folder": str(out), "bytes": size}))
    else:
        budgets = json.loads((out / FACTS).read_text("utf-8"))["budgets"]
        what = "one path for all tokens, so it takes no budget"
        if budgets:
            given = f"decides for a budget of {budgets['default']:.2f}"
            what = given if arguments.client == "optimum" else f"{given}, which can be changed"
        print(f"{out}: {size / 1e6:.0f} MB, {what}")
