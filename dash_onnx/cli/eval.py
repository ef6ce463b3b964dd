"""dash-eval: quality and speed of a policy on a text file, or its accuracy on a task."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dash_onnx.cli.common import (
    Parser,
    add_log_options,
    add_reference_option,
    add_runtime_options,
    load_reference,
    log_level,
    positive,
    run,
)
from dash_onnx.core.actions import PRECISIONS, check_action
from dash_onnx.core.errors import DashError
from dash_onnx.core.progress import Phase

if TYPE_CHECKING:
    from dash_onnx.runtime.engine import Model

_LOG = logging.getLogger(__name__)

_EXAMPLES = """\
  dash-eval out/ --text book.txt --policy int4 --max-windows 8
  dash-eval out/ --text book.txt --policy dash --budget 0.8 --json
  dash-eval out/ --text book.txt --policy static:int8,int4*28,int8
  dash-eval out/ --task arc.jsonl --max-items 200 --budget balanced
  dash-eval out/ --task piqa --policy int8 --json"""

# Options of `evaluate_text` by their names there; it has the defaults.
_OF_A_TEXT = ("window", "prompt_tokens", "prefill", "max_windows", "reference")


def _parser() -> Parser:
    parser = Parser(
        "dash-eval",
        "Measure a policy on a text or a task. The given text is decoded through the runtime: the "
        "prompt part of each window is prefilled, the rest is decoded token by token under the "
        "policy.",
        _EXAMPLES,
    )
    add_runtime_options(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text")
    what.add_argument(
        "--task",
        metavar="FILE.jsonl|NAME",
        help="items of LAMBADA, HellaSwag, ARC, or exact match (prompt, answer); or a task of "
        "lm-evaluation-harness, by name or as a YAML file; needs the extra [eval]",
    )
    parser.add_argument(
        "--window", type=positive, metavar="N", help="tokens in a window of --text (default: 512)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=positive,
        metavar="N",
        help="tokens of each window that are prefilled (default: 128)",
    )
    parser.add_argument(
        "--prefill",
        choices=PRECISIONS,
        help="precision of the prefill (default: the highest that the policy uses)",
    )
    add_reference_option(parser)
    parser.add_argument(
        "--max-windows", type=positive, metavar="N", help="windows of --text (default: all)"
    )
    parser.add_argument(
        "--max-items", type=positive, metavar="N", help="items of --task (default: all)"
    )
    parser.add_argument(
        "--speculate",
        action=argparse.BooleanOptionalAction,
        help="of --task: guess tokens where a text is generated, as dash-run does (default: where "
        "the policy takes one path)",
    )
    add_log_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    of_task = arguments.task is not None  # and be it an empty name
    other, foreign = ("text", _OF_A_TEXT) if of_task else ("task", ("max_items", "speculate"))
    for name in foreign:
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes with --{other}")
    body = _task if of_task else _eval
    return run("dash-eval", lambda: body(arguments), log_level(arguments))


def _load(arguments: argparse.Namespace) -> Model:
    import dash_onnx

    return dash_onnx.load(
        arguments.bundle,
        device=arguments.device,
        threads=arguments.threads,
        sha256=arguments.sha256,
    )


def _eval(arguments: argparse.Namespace) -> None:
    from dash_onnx.core.text import read_text
    from dash_onnx.eval.text import evaluate_text

    text = read_text(arguments.text)
    model = _load(arguments)
    given = {name: value for name in _OF_A_TEXT if (value := getattr(arguments, name)) is not None}
    given["reference"] = load_reference(arguments.reference, model, arguments.threads)
    if arguments.prefill is not None:
        check_action(arguments.prefill, model.manifest.variants)
    with Phase("windows", total=arguments.max_windows) as phase:
        result = evaluate_text(
            model,
            text,
            model.policy(arguments.policy, arguments.budget),
            on_window=phase.update,
            **given,
        )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    shares = ", ".join(f"{action} {share:.1%}" for action, share in result.actions.items())
    error = f" (+- {result.kl_stderr:.5f})" if result.kl_stderr else ""
    print(
        f"perplexity     {result.perplexity:.3f}  (reference {result.reference_perplexity:.3f})\n"
        f"KL             {result.kl:.5f} nats{error}\n"
        f"top-1          {result.top1:.2%}\n"
        f"ms per token   {result.ms_per_token:.2f} (median of {result.tokens}; "
        f"profiled cost {result.cost_ms:.2f})\n"
        f"actions        {shares}"
    )


def _task(arguments: argparse.Namespace) -> None:
    try:
        from lm_eval.utils import handle_non_serializable, make_table

        from dash_onnx.eval.model import DashLM
        from dash_onnx.eval.tasks import evaluate_task
    except ImportError as error:
        remedy = "in a clone of dash-onnx, `pip install '.[eval]'`"
        raise DashError(f"tasks need lm-evaluation-harness ({error}): {remedy}") from None
    given = arguments.policy, arguments.budget
    model = DashLM(_load(arguments), *given, speculate=arguments.speculate)
    with _quietly():
        found = evaluate_task(model, arguments.task, arguments.max_items)
    facts = model.get_model_info()
    if arguments.json:
        facts = {"results": found["results"], **facts}
        print(json.dumps(facts, default=handle_non_serializable))
        return
    print(make_table(found).rstrip())
    if facts["cost_ms"] is not None:
        print(f"profiled cost {facts['cost_ms']:.2f} ms per decoded token")
    if facts["truncated"]:
        print(f"truncated from the left to fit the context: {facts['truncated']} requests")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The harness prints, and shows progress whether anyone looks or not."""
    if _LOG.isEnabledFor(logging.DEBUG):
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere:
        stderr = sys.stderr if sys.stderr.isatty() else nowhere
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stderr):
            yield


if __name__ == "__main__":
    raise SystemExit(main())
