"""dash-run: streams text from a bundle; without a prompt, an interactive chat."""

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
from typing import TYPE_CHECKING, Any, TextIO

from dash_onnx.cli.batch import read_batch, run_batch
from dash_onnx.cli.cached import bundle_of
from dash_onnx.cli.common import (
    Options,
    Parser,
    add_bundle_argument,
    add_json_option,
    add_max_tokens_option,
    add_memory_option,
    add_parallel_option,
    add_policy_options,
    add_threads_option,
    count,
    may_repeat,
    run,
    seed,
    tell,
)
from dash_onnx.cli.record import Record, path_view, show
from dash_onnx.core.actions import PRECISIONS, WIDE
from dash_onnx.core.atomic import check_file
from dash_onnx.core.errors import PolicyError, SourceError
from dash_onnx.core.policy import Policy
from dash_onnx.core.text import read_json, read_text
from dash_onnx.runtime.grammar import Grammar
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.stream import Completion

if TYPE_CHECKING:
    from dash_onnx.runtime.model import Model

_MAX_CHARACTERS = 4_000_000  # limit for stdin: a million tokens
_PATIENCE_S = 2.0  # seconds before an idle pipe is reported
_LOG = logging.getLogger(__name__)
_DEFAULTS = GenerationOptions()
_MODEL, _PROMPT = "the model as the first argument", "the prompt as the second argument"
_ELSEWHERE = {  # docs/reference/cli.md
    **dict.fromkeys(("-m", "--model"), _MODEL),
    **dict.fromkeys(("-p", "--prompt"), _PROMPT),
    **{"-n": "--max-tokens", "-t": "--threads", "-s": "--seed", "-r": "--stop"},
    **{"-sys": "--system", "--system-prompt": "--system", "-jf": "--json-schema"},
    **{"-c": "dash-export --max-length", "-md": "--speculate", "--draft-model": "--speculate"},
}
_EXAMPLES = """\
  dash-run out/ "Tell me a story" --budget fast --show-path
  cat notes.txt | dash-run out/ "Summarize this" --json
  dash-run out/ --session talk       interactive chat; /help lists its commands"""


def _parser() -> Parser:
    parser = Parser("dash-run", "Generate text with a model or its bundle.", _EXAMPLES)
    parser.usage = "dash-run BUNDLE [PROMPT] [option ...]"
    parser._optionals.title, parser.elsewhere = "basic", _ELSEWHERE
    add_bundle_argument(parser, "a bundle or a model: hub id, folder, GGUF file")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="message, or text to continue; - reads stdin",
    )
    _add_basic(parser)
    _add_sampling(parser.add_argument_group("sampling"))
    _add_advanced(parser.add_argument_group("advanced"))
    return parser


def _add_basic(basic: Options) -> None:
    add_policy_options(basic)
    add_max_tokens_option(basic, _DEFAULTS.max_new_tokens, "maximum tokens to generate")
    basic.add_argument(
        "--max-thinking-tokens",
        type=count,
        metavar="N",
        help="max. thinking tokens; 0: none (default: no limit)",
    )
    basic.add_argument("--raw", action="store_true", help="PROMPT is text to continue")
    basic.add_argument("--system", metavar="TEXT", help="system message of the chat")
    basic.add_argument(
        "--session",
        type=Path,
        metavar="FILE",
        help="keep the interactive chat in FILE, or continue it",
    )
    basic.add_argument(
        "--batch",
        type=Path,
        metavar="FILE",
        help="answer `prompt` or `messages` of each JSON line",
    )
    add_json_option(basic)
    basic.add_argument(
        "--show-path", action="store_true", help="color each token by its cost, green to red"
    )


def _add_sampling(sampling: Options) -> None:
    for name, kind, off in (
        ("temperature", float, "0 is greedy"),
        ("top_k", int, "0 is off"),
        ("top_p", float, "1 is off"),
        ("min_p", float, "0 is off"),
        ("repetition_penalty", float, "1 is off"),
    ):
        sampling.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="X",
            help=f"{off} (default: the model's own)",
        )
    sampling.add_argument("--seed", type=seed, metavar="N", help="default: random")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop string; can be repeated"
    )
    sampling.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="answer in JSON that fits this schema"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help=argparse.SUPPRESS)


def _add_advanced(advanced: Options) -> None:
    add_threads_option(advanced)
    add_parallel_option(advanced, "answers that --batch generates at once")
    advanced.add_argument(
        "--prefill",
        choices=(*PRECISIONS, WIDE),
        metavar="P",
        help="precision of prompts, or wide (default: by policy)",
    )
    add_memory_option(advanced)
    advanced.add_argument(
        "--speculate",
        type=count,
        metavar="N",
        help="max. draft tokens per pass; 0: none (default: 15)",
    )
    advanced.add_argument(
        "--expected", type=Path, metavar="FILE", help="text that the answer is likely to contain"
    )
    advanced.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="a JSON line per token; -: instead of the text",
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    # Intermixed: `BUNDLE --raw PROMPT` works, although PROMPT is optional.
    arguments = parser.parse_intermixed_args(argv)
    batch = arguments.batch is not None
    chat = arguments.prompt is None and not batch
    parser.refuse(
        arguments,
        (batch, "PROMPT --session --trace --show-path --json", "does not go with --batch"),
        (not batch, "--parallel", "goes with --batch"),
        (arguments.raw, "--system --max-thinking-tokens", "needs a chat: leave --raw out"),
        (chat, "--json --raw", "needs a PROMPT"),
        (chat and _lines(arguments), "--trace", "- needs a PROMPT"),
        (not chat, "--session", "needs the interactive chat: leave PROMPT out"),
        (arguments.json, "--show-path", "is for a reader: leave --json out"),
        (_lines(arguments), "--json --show-path", "does not go with --trace -"),
        (arguments.speculate == 0, "--expected", "needs draft tokens: leave --speculate out"),
    )
    if chat and None in (sys.stdin, sys.stdout):
        parser.error("the chat needs an open stdin and stdout")
    return run("dash-run", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    import dash_onnx

    for path in (None if _lines(arguments) else arguments.trace, arguments.session):
        if path:
            check_file(path)
    prompt: Any = None if arguments.prompt is None else _text(arguments.prompt)
    lines = read_batch(arguments.batch) if arguments.batch else None
    own = {"expected", "grammar", "logits_processor", "logprobs", "max_new_tokens"}
    own |= {"chat_template_kwargs", "frequency_penalty", "presence_penalty", "special_tokens"}
    schema = arguments.json_schema
    names = {field.name for field in dataclasses.fields(GenerationOptions)} - own
    options = GenerationOptions(
        **{name: getattr(arguments, name) for name in names},
        max_new_tokens=arguments.max_tokens,
        expected=read_text(arguments.expected, empty=True) if arguments.expected else "",
        grammar=Grammar.json_schema(read_json(schema)) if schema else None,
    )
    bundle = bundle_of(arguments.bundle)
    started = time.perf_counter()
    model = dash_onnx.load(
        bundle,
        threads=arguments.threads,
        memory=arguments.memory,
    )
    # Before anything is written or asked.
    policy = model.policy_of(options)
    _check_effects(options, policy, model)
    # So that no token waits for a graph to load.
    wide = lines is not None or bool(options.expected) or may_repeat(prompt or "")
    model.preload(policy, prefill=arguments.prefill, batches=wide)
    load_ms = (time.perf_counter() - started) * 1e3
    if lines is not None:
        run_batch(
            model,
            lines,
            options,
            parallel=arguments.parallel,
            raw=arguments.raw,
            system=arguments.system,
        )
        return
    with contextlib.ExitStack() as stack:
        if prompt is None:
            from dash_onnx.cli.chat import Chat

            view = arguments.show_path
            system, session = arguments.system, arguments.session
            chat = Chat(model, options, system=system, session=session, show_path=view)
            chat.run(_trace(arguments, stack))
            return
        if (arguments.system or model.text.chat_template) and not arguments.raw:
            prompt = [{"role": "user", "content": prompt}]
            if arguments.system:
                prompt.insert(0, {"role": "system", "content": arguments.system})
        record = Record(policy, options.sampling(model.sampling), load_ms)
        stream = stack.enter_context(model.stream(prompt, options=options))
        chunks = record.watch(stream, _trace(arguments, stack))
        if _lines(arguments):
            for _ in chunks:  # each is in the trace
                sys.stdout.flush()
            print(json.dumps(record.figures()))
        elif arguments.json:
            answer = Completion.of(chunks)
            told = {"text": answer, "reasoning": answer.reasoning}
            print(json.dumps({**told, **record.figures()}))
        else:
            show(chunks, path_view(model, options, arguments.show_path))
            tell(record.line(), file=sys.stderr)
            if record.only_thoughts:
                _LOG.warning(
                    "the thoughts took all of --max-tokens: raise it, or set --max-thinking-tokens"
                )


def _check_effects(options: GenerationOptions, policy: Policy, model: Model) -> None:
    """Tells which options have no effect with this policy and model.

    Raises:
        PolicyError: expected text is given, and the policy cannot use it.
    """
    if options.expected and policy.uniform is None:
        raise PolicyError(
            "--expected needs draft tokens, and a policy that decides for each token has none: "
            "choose another, such as --policy int8"
        )
    if options.sampling(model.sampling).temperature:
        return
    for name in ("top_k", "top_p", "min_p", "seed"):
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            _LOG.warning("--%s changes nothing at a temperature of 0: set --temperature", option)


def _trace(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> TextIO | None:
    """The stream of --trace, opened when nothing is refused any more: it empties the file.

    Raises:
        SourceError: the file cannot be written.
    """
    if _lines(arguments):
        return sys.stdout
    if arguments.trace is None:
        return None
    try:
        return stack.enter_context(arguments.trace.open("w", encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot write {arguments.trace}: {error.strerror}") from None


def _lines(arguments: argparse.Namespace) -> bool:
    """Whether the trace goes to stdout instead of the text."""
    return str(arguments.trace) == "-"


def _text(prompt: str) -> str:
    """The prompt, followed by piped input.

    Raises:
        PolicyError: the text is empty, or longer than any context.
    """
    parts = ["", _piped(wanted=True)] if prompt == "-" else [prompt, _piped()]
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise PolicyError("the prompt is empty")
    return text


def _piped(wanted: bool = False) -> str:
    """The content of stdin, if it is a pipe or a file."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        kind = 0
    if not (wanted or stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):
        return ""
    with contextlib.suppress(OSError):  # Windows cannot tell for a pipe
        if stat.S_ISFIFO(kind) and not select.select([sys.stdin], [], [], _PATIENCE_S)[0]:
            print("dash-run: waiting for text on stdin; </dev/null has none", file=sys.stderr)
    text = sys.stdin.read(_MAX_CHARACTERS + 1)
    if len(text) > _MAX_CHARACTERS:
        raise PolicyError(f"stdin holds more than {_MAX_CHARACTERS} characters; shorten it")
    return text.removeprefix("\ufeff")  # a mark that Windows puts at the beginning
