"""dash-run: text from a bundle, streamed; without a prompt an interactive chat."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import select
import stat
import sys
import time
from pathlib import Path
from typing import Any

from dash_onnx.cli.batch import read_batch, run_batch
from dash_onnx.cli.cached import bundle_of
from dash_onnx.cli.common import (
    Parser,
    add_graphs_option,
    add_memory_option,
    add_runtime_options,
    positive,
    run,
    seed,
)
from dash_onnx.cli.record import Record, path_view, show
from dash_onnx.core.actions import PRECISIONS
from dash_onnx.core.atomic import check_file
from dash_onnx.core.errors import PolicyError, SourceError
from dash_onnx.core.text import read_json
from dash_onnx.runtime.grammar import Grammar
from dash_onnx.runtime.options import GenerationOptions

_MOST_CHARACTERS = 4_000_000  # of stdin: a million tokens
_PATIENCE_S = 2.0  # before a pipe that brings nothing is told
_DEFAULTS = GenerationOptions()
_EXAMPLES = """\
  dash-run out/ "What is the capital of France?"
  dash-run model.gguf "Hello!"       exports the model first, once, into a cache
  dash-run out/ "Tell me a story" --budget fast --show-path
  dash-run out/ "Once upon a time" --raw --policy int4 --max-new-tokens 100 --temperature 0.8
  dash-run out/ "2 + 2 =" --policy random:1 --trace trace.jsonl --json
  cat notes.txt | dash-run out/ "Summarize this"
  dash-run out/ "Invent a person" --json-schema person.json
  dash-run out/ --batch prompts.jsonl > answers.jsonl
  dash-run out/ --session talk       interactive chat; /help lists its commands"""


def _parser() -> Parser:
    parser = Parser("dash-run", "Generate text from a DASH bundle.", _EXAMPLES)
    asked = parser.add_argument_group("input")
    answer = parser.add_argument_group("answer")
    computed = add_runtime_options(parser)
    output = parser.add_argument_group("output")
    computed.add_argument(
        "--prefill",
        choices=PRECISIONS,
        help="precision of the prompt (default: see --memory)",
    )
    add_memory_option(computed)
    add_graphs_option(computed)
    computed.add_argument(
        "--speculate",
        action=argparse.BooleanOptionalAction,
        help="guess tokens from prompt and answer, and check several at once where that pays: the "
        "same text, up to rounding, sooner (default: where the policy takes one path)",
    )
    computed.add_argument(
        "--expected",
        type=Path,
        metavar="FILE",
        help="text that the answer is likely to contain, such as the file that is to be edited: it "
        "is guessed from, too",
    )
    asked.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="a chat message if the model has a chat template, else text to continue; piped stdin "
        "is appended; `-` reads only stdin",
    )
    asked.add_argument(
        "--batch",
        type=Path,
        metavar="FILE.jsonl",
        help="answer the `prompt` or the `messages` of every line, several at once; prints one "
        "JSON line per answer as it ends, with its `id` or index",
    )
    asked.add_argument(
        "--rows",
        type=positive,
        default=8,
        metavar="N",
        help="batch size of --batch (default: %(default)s)",
    )
    form = asked.add_mutually_exclusive_group()
    form.add_argument(
        "--raw", action="store_true", help="PROMPT is text to continue: no chat template"
    )
    form.add_argument("--chat", action="store_true", help="refuse a model without a chat template")
    asked.add_argument("--system", metavar="TEXT", help="system message of the chat")
    asked.add_argument(
        "--session",
        type=Path,
        metavar="FILE",
        help="keep the interactive chat and its KV cache in FILE, and continue it next time (needs "
        "the package safetensors)",
    )
    answer.add_argument(
        "--max-new-tokens",
        type=positive,
        default=_DEFAULTS.max_new_tokens,
        metavar="N",
        help="generate at most N tokens (default: %(default)s)",
    )
    for name, kind, off in (
        ("temperature", float, "0 is greedy"),
        ("top_k", int, "0 is off"),
        ("top_p", float, "1 is off"),
        ("min_p", float, "0 is off"),
        ("repetition_penalty", float, "1 is off"),
    ):
        answer.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="X",
            help=f"{off} (default: the model's own)",
        )
    answer.add_argument("--seed", type=seed, help="seed for sampling (default: random)")
    answer.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop string; can be repeated"
    )
    answer.add_argument(
        "--json-schema",
        type=Path,
        metavar="FILE.json",
        help="constrain the answer to JSON of this schema (needs the package llguidance)",
    )
    answer.add_argument("--ignore-eos", action="store_true", help="continue after the end token")
    output.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.jsonl",
        help="write each token's path and milliseconds, one JSON object per line",
    )
    output.add_argument(
        "--json-lines",
        action="store_true",
        help="print one JSON object per token as it is generated, then the figures of --json",
    )
    output.add_argument(
        "--show-path",
        action="store_true",
        help="color each token by its profiled cost, green to red; if stdout is not a terminal, or "
        "NO_COLOR is set, print token, milliseconds and path (F 8 4 .) below the text",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    # Intermixed: `OUT --chat PROMPT` works, although PROMPT is optional.
    arguments = parser.parse_intermixed_args(argv)
    if arguments.batch:
        for name in ("prompt", "session", "trace", "show_path", "json", "json_lines"):
            if getattr(arguments, name):
                told = "PROMPT" if name == "prompt" else f"--{name.replace('_', '-')}"
                parser.error(f"--batch does not go with {told}")
        return run("dash-run", lambda: _run(arguments), logging.INFO)
    for_programs = arguments.json or arguments.json_lines
    if for_programs and arguments.prompt is None:
        parser.error("--json needs a PROMPT")
    if for_programs and arguments.show_path:
        parser.error("--show-path colors text for a reader; it does not go with --json")
    if arguments.system and arguments.raw:
        parser.error("--system needs a chat: leave --raw out")
    if arguments.session and arguments.prompt is not None:
        parser.error("--session needs the interactive chat: leave PROMPT out")
    if arguments.prompt is None and None in (sys.stdin, sys.stdout):
        parser.error("the chat needs an open stdin and stdout")
    if arguments.raw and arguments.prompt is None:
        parser.error("--raw needs a PROMPT")
    return run("dash-run", lambda: _run(arguments), logging.INFO)


def _run(arguments: argparse.Namespace) -> None:
    import dash_onnx

    for path in (arguments.trace, arguments.session):
        if path:
            check_file(path)
    prompt: Any = None if arguments.prompt is None else _text(arguments.prompt)
    lines = read_batch(arguments.batch) if arguments.batch else None
    own, schema = {"cache", "expected", "grammar", "logprobs"}, arguments.json_schema
    names = {field.name for field in dataclasses.fields(GenerationOptions)} - own
    options = GenerationOptions(
        **{name: getattr(arguments, name) for name in names},
        expected=_file(arguments.expected) if arguments.expected else "",
        grammar=Grammar.json_schema(read_json(schema)) if schema else None,
    )
    bundle = bundle_of(arguments.bundle)
    started = time.perf_counter()
    model = dash_onnx.load(
        bundle,
        device=arguments.device,
        threads=arguments.threads,
        memory=arguments.memory,
        cuda_graphs=arguments.cuda_graphs,
        sha256=arguments.sha256,
    )
    # Before anything is written, or asked.
    policy = model.policy_of(options)
    # No token waits for a graph to load.
    model.preload(policy, prefill=arguments.prefill)
    load_ms = (time.perf_counter() - started) * 1e3
    if lines is not None:
        run_batch(
            model,
            lines,
            options,
            rows=arguments.rows,
            raw=arguments.raw,
            system=arguments.system,
        )
        return
    with contextlib.ExitStack() as stack:
        trace = None
        if arguments.trace:
            try:
                trace = stack.enter_context(arguments.trace.open("w", encoding="utf-8"))
            except OSError as error:
                raise SourceError(f"cannot write {arguments.trace}: {error.strerror}") from None
        if prompt is None:
            from dash_onnx.cli.chat import Chat

            Chat(
                model,
                options,
                system=arguments.system,
                session=arguments.session,
                trace=trace,
                show_path=arguments.show_path,
            ).run()
            return
        chat = arguments.chat or arguments.system or model.text.chat_template
        if chat and not arguments.raw:
            prompt = [{"role": "user", "content": prompt}]
            if arguments.system:
                prompt.insert(0, {"role": "system", "content": arguments.system})
        record = Record(policy, options.sampling(model.sampling), load_ms)
        chunks = record.watch(model.stream(prompt, options=options), model, trace)
        if arguments.json_lines:
            for chunk in chunks:
                facts = {"text": chunk.text, "token": chunk.token, "ms": round(chunk.ms, 3)}
                print(json.dumps({**facts, "path": chunk.path}), flush=True)
            print(json.dumps(record.figures()))
        elif arguments.json:
            text = "".join(chunk.text for chunk in chunks)
            print(json.dumps({"text": text, **record.figures()}))
        else:
            show(chunks, path_view(model, options, arguments.show_path))
            print(record.line(), file=sys.stderr)


def _text(prompt: str) -> str:
    """The prompt, and below it what is piped into the tool.

    Raises:
        PolicyError: it is empty, or longer than any context.
    """
    parts = ["", _piped(wanted=True)] if prompt == "-" else [prompt, _piped()]
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise PolicyError("the prompt is empty")
    return text


def _file(path: Path) -> str:
    """The text of a file.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None


def _piped(wanted: bool = False) -> str:
    """What stdin holds, where it is a pipe or a file."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        kind = 0
    if not (wanted or stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):
        return ""
    with contextlib.suppress(OSError):  # Windows cannot tell of a pipe
        if stat.S_ISFIFO(kind) and not select.select([sys.stdin], [], [], _PATIENCE_S)[0]:
            print("dash-run: waiting for text on stdin", file=sys.stderr)
    text = sys.stdin.read(_MOST_CHARACTERS + 1)
    if len(text) > _MOST_CHARACTERS:
        raise PolicyError(f"stdin holds more than {_MOST_CHARACTERS} characters; shorten it")
    return text


if __name__ == "__main__":
    raise SystemExit(main())
