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
    add_bundle_argument,
    add_json_option,
    add_policy_options,
    add_reference_option,
    add_threads_option,
    count,
    load_reference,
    positive,
    run,
)
from dash_onnx.core.errors import DashError

if TYPE_CHECKING:
    from dash_onnx.runtime.model import Model

_EXAMPLES = """\
  dash-eval out/ --text book.txt --policy int4 --limit 8
  dash-eval out/ --text book.txt --policy dash --budget 0.8 --json
  dash-eval out/ --text book.txt --policy static:int8,int4*28,int8
  dash-eval out/ --task arc.jsonl --limit 200 --budget balanced
  dash-eval out/ --task piqa --policy int8 --json"""

_WINDOW = 512  # tokens


def _parser() -> Parser:
    parser = Parser(
        "dash-eval",
        "Measure a policy on a text or a task. The given text is decoded through the runtime: the "
        "prompt part of each window is prefilled, the rest is decoded token by token under the "
        "policy.",
        _EXAMPLES,
    )
    add_bundle_argument(parser)
    add_json_option(parser)
    add_policy_options(parser)
    add_threads_option(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text, or .jsonl with records as for --calibration of dash-train",
    )
    what.add_argument(
        "--task",
        metavar="FILE.jsonl|NAME",
        help="items of LAMBADA, HellaSwag, ARC, or exact match (prompt, answer); or a task of "
        "lm-evaluation-harness, by name or as a .yaml file; needs the extra [eval]",
    )
    parser.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help=f"tokens in a window of --text, a quarter of them prefilled (default: {_WINDOW})",
    )
    add_reference_option(parser)
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="windows of --text, or items of --task (default: all)",
    )
    parser.add_argument(
        "--speculate",
        type=count,
        metavar="N",
        help="with --task: maximum draft tokens per pass of an answer; 0: none (default: 15)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    of_task = arguments.task is not None  # even an empty name
    parser.refuse(
        arguments,
        (of_task, "--window --reference", "goes with --text"),
        (not of_task, "--speculate", "goes with --task"),
    )
    body = _task if of_task else _eval
    return run("dash-eval", lambda: body(arguments))


def _load(arguments: argparse.Namespace) -> Model:
    import dash_onnx

    return dash_onnx.load(arguments.bundle, threads=arguments.threads)


def _eval(arguments: argparse.Namespace) -> None:
    from dash_onnx.core.documents import read_document
    from dash_onnx.eval.text import evaluate_policies

    model = _load(arguments)
    text = read_document(arguments.text, model.text)
    window = arguments.window or _WINDOW
    policy = model.policy(arguments.policy, arguments.budget)
    (result,) = evaluate_policies(
        model,
        text,
        [policy],
        window=window,
        prompt_tokens=max(1, window // 4),
        max_windows=arguments.limit,
        reference=load_reference(arguments.reference, model, arguments.threads),
    )
    if arguments.json:
        asked = {"policy": policy.name, "budget": policy.budget}
        print(json.dumps({**asked, **dataclasses.asdict(result)}))
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
        found = evaluate_task(model, arguments.task, arguments.limit)
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
    """Silences the harness, which prints and shows progress even without a terminal."""
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere:
        stderr = sys.stderr if sys.stderr.isatty() else nowhere
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stderr):
            yield
