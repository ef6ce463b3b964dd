"""dash-run: text from a bundle, streamed; without a prompt an interactive chat."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dash_onnx.cli.common import (
    Parser,
    Terminated,
    add_memory_option,
    add_runtime_options,
    positive,
    run,
    seed,
)
from dash_onnx.core.actions import PRECISIONS
from dash_onnx.core.errors import ContextLengthError, DashError, SourceError
from dash_onnx.runtime.options import GenerationOptions

if TYPE_CHECKING:
    from dash_onnx.report.terminal import PathView
    from dash_onnx.runtime.engine import Model
    from dash_onnx.runtime.generate import Chunk

_DEFAULTS = GenerationOptions()
_EXAMPLES = """\
  dash-run out/ --chat "What is the capital of France?"
  dash-run out/ "Once upon a time" --policy int4 --max-new-tokens 100 --temperature 0.8
  dash-run out/ "2 + 2 =" --policy random:1 --trace trace.jsonl --json
  dash-run out/ --chat "Tell me a story" --budget fast --show-path
  dash-run out/                      interactive chat; /reset forgets, /exit or Ctrl-D leaves"""


def _parser() -> Parser:
    parser = Parser("dash-run", "Generate text from a DASH bundle.", _EXAMPLES)
    add_runtime_options(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="`-` reads it from stdin")
    parser.add_argument(
        "--chat", action="store_true", help="PROMPT is a chat message: apply the chat template"
    )
    parser.add_argument("--system", help="system message of the chat")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=_DEFAULTS.max_new_tokens,
        metavar="N",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--prefill",
        choices=PRECISIONS,
        help="precision of the prompt (default: see --memory)",
    )
    add_memory_option(parser)
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="record what a token runs as CUDA graphs, one per layer and action (--device cuda)",
    )
    for name, off in (
        ("temperature", "0 is greedy"),
        ("top_k", "0 is off"),
        ("top_p", "1 is off"),
        ("min_p", "0 is off"),
        ("repetition_penalty", "1 is off"),
    ):
        default = getattr(_DEFAULTS, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="X",
            help=f"{off} (default: %(default)s)",
        )
    parser.add_argument("--seed", type=seed, help="of the sampling (default: different each time)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.jsonl",
        help="write each token's path and milliseconds, one JSON object a line",
    )
    parser.add_argument(
        "--show-path",
        action="store_true",
        help="colour each token by its profiled cost, green to red; where stdout is no terminal, "
        "or NO_COLOR is set, print token, milliseconds and path (F 8 4 .) below the text",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    # Intermixed: `OUT --chat PROMPT` works, although PROMPT is optional.
    arguments = parser.parse_intermixed_args(argv)
    if arguments.json and arguments.prompt is None:
        parser.error("--json needs a PROMPT")
    if arguments.json and arguments.show_path:
        parser.error("--show-path colours text for a reader; it does not go with --json")
    if arguments.system and not arguments.chat and arguments.prompt is not None:
        parser.error("--system goes with --chat")
    return run("dash-run", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    import dash_onnx

    names = {field.name for field in dataclasses.fields(GenerationOptions)} - {"cache"}
    options = GenerationOptions(**{name: getattr(arguments, name) for name in names})
    started = time.perf_counter()
    model = dash_onnx.load(
        arguments.bundle,
        device=arguments.device,
        threads=arguments.threads,
        memory=arguments.memory,
        cuda_graphs=arguments.cuda_graphs,
    )
    # Before anything is written, or asked.
    policy = model.policy(arguments.policy, arguments.budget)
    model.preload(policy, prefill=arguments.prefill)  # no token waits for a graph to load
    load_ms = (time.perf_counter() - started) * 1e3
    with contextlib.ExitStack() as stack:
        trace = None
        if arguments.trace:
            try:
                trace = stack.enter_context(arguments.trace.open("w", encoding="utf-8"))
            except OSError as error:
                raise SourceError(f"cannot write {arguments.trace}: {error.strerror}") from None
        if arguments.prompt is None:
            _chat(model, arguments.system, options, trace, arguments.show_path)
            return
        text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        prompt: Any = _messages(arguments.system, text) if arguments.chat else text
        record = Record(policy.name, load_ms)
        chunks = record.watch(model.stream(prompt, options=options), model, trace)
        if arguments.json:
            text = "".join(chunk.text for chunk in chunks)
            print(json.dumps({"text": text, **record.figures()}))
        else:
            _show(chunks, _path_view(model, options, arguments.show_path))
            print(record.line(), file=sys.stderr)


@dataclass
class Record:
    """What happened during one generation."""

    policy: str
    load_ms: float | None = None  # of the model, where this is its first generation
    times: list[float] = field(default_factory=list)
    actions: Counter[str] = field(default_factory=Counter)
    last: Chunk | None = None

    def watch(self, chunks: Iterator[Chunk], model: Model, trace: TextIO | None) -> Iterator[Chunk]:
        """Passes chunks on, noting times and actions."""
        for chunk in chunks:
            if self.last is not None:  # the first token comes from the prefill
                self.actions.update(chunk.path)
            self.times.append(chunk.ms)
            self.last = chunk
            if trace is not None:
                facts = {
                    "token": chunk.token,
                    "text": model.text.token(chunk.token),
                    "ms": round(chunk.ms, 3),
                    "path": chunk.path,
                }
                print(json.dumps(facts, ensure_ascii=False), file=trace)
            yield chunk

    def figures(self) -> dict[str, Any]:
        """The figures of `--json`."""
        assert self.last is not None
        decode = self.times[1:]
        total = sum(self.actions.values())
        return {
            "load_ms": None if self.load_ms is None else round(self.load_ms, 3),
            "finish_reason": self.last.finish_reason,
            "prompt_tokens": self.last.prompt_tokens,
            "generated_tokens": len(self.times),
            "time_to_first_token_ms": round(self.times[0], 3),
            "ms_per_token": round(statistics.median(decode), 3) if decode else None,
            "tokens_per_second": round(1e3 * len(decode) / sum(decode), 2) if decode else None,
            "policy": self.policy,
            "actions": {a: round(n / total, 4) for a, n in sorted(self.actions.items())},
        }

    def line(self) -> str:
        """The summary after the text."""
        facts = self.figures()
        speed = facts["tokens_per_second"]
        shares = ", ".join(f"{a} {share:.0%}" for a, share in facts["actions"].items())
        return (
            "["
            + (f"loaded in {self.load_ms / 1e3:.1f} s | " if self.load_ms is not None else "")
            + f"{facts['generated_tokens']} tokens"
            + (f", {speed:.1f} tokens/s" if speed else "")
            + f", first token after {facts['time_to_first_token_ms']:.0f} ms"
            + (f" | {shares}" if shares else "")
            + f" | {facts['finish_reason']}]"
        )


def _show(chunks: Iterator[Chunk], view: PathView | None) -> str:
    text = ""
    for chunk in chunks:
        text += chunk.text
        print(view.show(chunk) if view else chunk.text, end="", flush=True)
    print()
    if view:
        view.finish()
    return text


def _path_view(model: Model, options: GenerationOptions, wanted: bool) -> PathView | None:
    if not wanted:
        return None
    from dash_onnx.report.terminal import PathView

    policy = model.policy(options.policy, options.budget)
    return PathView(model.text, model.manifest, policy)


def _messages(system: str | None, user: str) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": user}]


def _chat(
    model: Model,
    system: str | None,
    options: GenerationOptions,
    trace: TextIO | None,
    show_path: bool,
) -> None:
    """Reads messages until the end of input; the K/V of the conversation is kept."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing in input())
    terminal = sys.stdin.isatty()
    cache = model.new_cache()
    messages = _messages(system, "")[:-1]
    if terminal:
        print("chat with the model; /reset forgets, /exit or Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            break
        if line == "/exit":
            break
        if line == "/reset":
            messages = _messages(system, "")[:-1]
            continue
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        record = Record(model.policy(options.policy, options.budget).name)
        try:
            view = _path_view(model, options, show_path)
            with contextlib.closing(model.stream(asked, options=options, cache=cache)) as chunks:
                answer = _show(record.watch(chunks, model, trace), view)
        except Terminated:
            raise
        except KeyboardInterrupt:  # stops this answer, not the chat
            print()
            print("[stopped]", file=sys.stderr)
            continue
        except ContextLengthError as error:
            print(f"dash-run: error: {error}; /reset starts anew", file=sys.stderr)
            continue
        except DashError as error:
            print(f"dash-run: error: {error}", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
        print(record.line(), file=sys.stderr)
