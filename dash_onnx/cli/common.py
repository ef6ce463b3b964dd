"""What the command line tools share: one-line errors, exit codes, the log, common options."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO, TypeAlias

from dash_onnx.cli import leave
from dash_onnx.cli.log import Line, logging_to_stderr
from dash_onnx.core.errors import DashError
from dash_onnx.core.progress import wrapped
from dash_onnx.core.version import __version__

if TYPE_CHECKING:
    from dash_onnx.runtime.model import Model


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line.

    Attributes:
        elsewhere: what stands here for the options of other tools.
    """

    elsewhere: Mapping[str, str] = {}

    def __init__(self, prog: str, description: str, examples: str):
        """Adds `--version`, and the examples below the options."""
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=27),
        )
        self.add_argument("--version", action="version", version=f"dash-onnx {__version__}")

    def error(self, message: str) -> NoReturn:
        """Prints the error and where to find help; exit code 2."""
        for word in message.split() if message.startswith("unrecognized") else ():
            name = word.partition("=")[0]
            known = get_close_matches(name, self._option_string_actions, n=1, cutoff=0.65)
            if name in self.elsewhere:
                message += f"; instead of {name} give {self.elsewhere[name]}"
            elif name.startswith("--") and known:
                message += f"; did you mean {known[0]}?"
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, given: argparse.Namespace, *rules: tuple[object, str, str]) -> None:
        """Refuses options that have no effect beside others.

        Args:
            given: the parsed arguments.
            rules: for each, whether it applies, the options that it refuses, and why.
        """
        for applies, options, why in rules:
            for option in options.split() if applies else ():
                action = self._option_string_actions.get(option)
                name = action.dest if action else option.lower()  # such as PROMPT
                if getattr(given, name) != self.get_default(name):
                    self.error(f"{option} {why}")


def run(
    tool: str,
    body: Callable[[], None],
    level: int = logging.INFO,
    formatter: logging.Formatter | None = None,
) -> int:
    """Runs a tool's body.

    Args:
        tool: name of the tool.
        body: function that does the work.
        level: level of the log on stderr, see `log_level`.
        formatter: formatter of log lines; None formats for people.

    Returns:
        The exit code: 0; 2 for an error that the user can fix, reported in one line; 130 when
        interrupted. Anything else is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, _terminate)
    own_process = signal.getsignal(signal.SIGINT) is leave
    if own_process:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    with suppress(ValueError):  # closed, or read from before
        if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
            sys.stdin.reconfigure(encoding="utf-8")  # not the code page of Windows
    for stream in (sys.stdout, sys.stderr):
        # Some terminals and pipes cannot encode emoji; in tests the streams are of other types.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with logging_to_stderr(level, formatter or Line(tool)):
            body()
        sys.stdout.flush()
    except DashError as error:
        _tell(tool, error, f"error: {error}")
        return 2
    except KeyboardInterrupt as error:
        if own_process:  # another Ctrl-C must not interrupt this
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(file=sys.stderr)  # after the ^C of a terminal
        _tell(tool, error, "interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output is gone, as with `head`
        _discard_stdout()
        return 0
    except UnicodeDecodeError as error:
        _tell(tool, error, f"error: the input is not UTF-8 text ({error.reason})")
        return 2
    except OSError as error:  # such as a full disk
        _discard_stdout()
        place = f" {error.filename}" if error.filename else ""
        reason = error.strerror or error
        if error.errno == errno.ENOSPC:
            reason = f"{reason}; make room, or write to another disk"
        _tell(tool, error, f"error: cannot read or write{place}: {reason}")
        return 2
    finally:
        if own_process:  # nor the shutdown of the interpreter
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    return 0


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM: `kill` ends a tool like Ctrl-C, so that temporary folders are removed."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _tell(tool: str, error: BaseException, line: str) -> None:
    """Prints an error's notes, and a line after them."""
    for told in (*getattr(error, "__notes__", ()), line):
        print(f"{tool}: {told}", file=sys.stderr)


def _discard_stdout() -> None:
    """Drops output that can no longer be written, so that the interpreter does not try at exit."""
    with suppress(io.UnsupportedOperation):  # not a file, as in a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def seed(text: str) -> int:
    """An argparse type: a seed that every generator accepts."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..2**63-1")
    return value


def folder(text: str) -> Path:
    """An argparse type: a bundle's folder; an empty name does not mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("no bundle given")
    return Path(text)


_MOST = 1 << 48  # of anything that is counted: NumPy and `range` take it


def at_least(least: int, why: str = "") -> Callable[[str], int]:
    """An argparse type: an integer of at least so much, and why."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}{why}")
        if int(text) > _MOST:
            raise argparse.ArgumentTypeError(f"{text} is more than any file or memory has")
        return int(text)

    return integer


positive, count = at_least(1), at_least(0)


def may_repeat(text: str) -> bool:
    """Whether much of the answer may be drafted from a text, which justifies the wide LM head."""
    return len(text) > 1000  # characters


def decisions(text: str) -> int:
    """An argparse type: how often the scorer runs per token."""
    return sys.maxsize if text == "every" else positive(text)


Options: TypeAlias = argparse._ActionsContainer
"""Where options are added: a parser, or a group in its help."""


def add_log_options(parser: Options) -> None:
    """Adds the options of long-running tools."""
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning"),
        default="info",
        help="debug logs every step, and the warnings of other packages; warning logs warnings and "
        "errors only (default: %(default)s)",
    )


def log_level(arguments: argparse.Namespace) -> int:
    """The level given by `--log-level`."""
    return logging.getLevelNamesMapping()[arguments.log_level.upper()]


def add_bundle_argument(parser: Options, told: str | None = None) -> None:
    """Adds the bundle that a tool reads; `told` is the help of a tool that exports models first."""
    usual = "the bundle that dash-export wrote, or a model that is in the cache"
    parser.add_argument(
        "bundle", metavar="BUNDLE", type=folder if told else known, help=told or usual
    )


def known(text: str) -> Path:
    """An argparse type: a bundle's folder, or the name of a model that is in the cache."""
    from dash_onnx.cli.cached import known_bundle

    try:
        return Path(known_bundle(folder(text)))
    except DashError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_json_option(parser: Options) -> None:
    """Adds the option of tools whose output programs can read."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def add_threads_option(parser: Options) -> None:
    """Adds the option of tools that run a bundle."""
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads (default: all, or a container's limit)",
    )


def add_policy_options(parser: Options) -> None:
    """Adds the options for how a bundle computes a token."""
    parser.add_argument(
        "--policy",
        default="",
        help="int8, int4, dash, static:... (default: by --budget)",
    )
    parser.add_argument(
        "--budget",
        metavar="X",
        help="quality, balanced (default), fast, or such as 0.8",
    )


def add_parallel_option(parser: Options, what: str) -> None:
    """Adds the option for the number of sequences in a batch."""
    parser.add_argument(
        "--parallel", type=positive, default=8, metavar="N", help=f"{what} (default: %(default)s)"
    )


def add_max_tokens_option(parser: Options, default: int, what: str) -> None:
    """Adds the option for the number of tokens to generate."""
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=default,
        metavar="N",
        help=f"{what} (default: %(default)s)",
    )


def tell(*lines: str, file: TextIO | None = None) -> None:
    """Prints lines, to stdout by default; on a terminal, sentences break between words."""
    text, to = "\n".join(lines), file or sys.stdout
    print(wrapped(text) if to.isatty() else text, file=to)


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Lines of a table, with right-aligned columns of minimum width.

    Args:
        rows: cells, header first.
        left: indices of the columns that are left-aligned.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def add_memory_option(parser: Options) -> None:
    """Adds the option of tools that generate."""
    parser.add_argument(
        "--memory",
        choices=("high", "low"),
        default="high",
        help="low: less memory, slower prompts (default: high)",
    )


def add_reference_option(parser: Options) -> None:
    """Adds the option of tools that report a KL."""
    parser.add_argument(
        "--reference",
        type=known,
        metavar="OTHER",
        help="another bundle of the same model, such as one with `--variants full`; KL is measured "
        "against its highest precision (default: that of BUNDLE)",
    )


def load_reference(path: Path | None, model: Model, threads: int | None) -> Model:
    """The bundle that `--reference` names, or the model itself.

    Raises:
        DashError: it cannot be loaded, or is of a different model.
    """
    if path is None:
        return model
    import dash_onnx

    other = dash_onnx.load(path, threads=threads)
    ours, theirs = (
        dataclasses.replace(one.manifest.model, name="", max_length=0) for one in (model, other)
    )
    if ours != theirs:
        raise DashError(f"--reference {path} is a bundle of another model")
    return other


EFFORTS = ("quick", "normal", "thorough")


def add_training_options(parser: Options, efforts: tuple[str, ...]) -> None:
    """Adds the options of tools that train a policy."""
    parser.add_argument(
        "--effort",
        choices=efforts,
        default="quick",
        help="how long to train the policy (quick: 3 to 10 minutes for a 135M model on 2 cores, "
        "normal: 12 to 25, thorough: 30 to 70; "
        + ("none: no policy, dash-train trains one later; " if "none" in efforts else "")
        + "default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        action="extend",
        default=[],
        metavar="SOURCE",
        help="texts of your domain, after the folder: a file (.jsonl can hold prompts and "
        "responses), a folder, - for standard input, or "
        "hub:DATASET[,CONFIG][:SPLIT[:COLUMN]]; SOURCE@0.5 sets its share (default: text that the "
        "model generates; see docs/reference/texts.md)",
    )
    parser.add_argument(
        "--decisions",
        type=decisions,
        metavar="N|every",
        help="how often the scorer runs per token: N times, spread over the layers, or before "
        "every layer; each run decides for the layers up to the next (default: 1)",
    )
    parser.add_argument(
        "--train-device",
        choices=("cpu", "cuda", "auto"),
        default="cpu",
        help="where PyTorch calibrates and trains, whatever device the bundle is for; auto uses a "
        "GPU if PyTorch finds one (default: %(default)s)",
    )
