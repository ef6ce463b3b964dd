"""The interactive chat of dash-run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dash_onnx.cli.common import Terminated, may_repeat, tell
from dash_onnx.cli.record import Record, path_view, show
from dash_onnx.core.atomic import write_text
from dash_onnx.core.errors import ContextLengthError, DashError, PolicyError, SourceError
from dash_onnx.core.text import read_json
from dash_onnx.runtime.options import GenerationOptions

if TYPE_CHECKING:
    from dash_onnx.runtime.model import Model

_MESSAGES = "messages"  # key of the facts in a session file
_PASTED_S = 0.05  # seconds within which the next line of pasted text arrives
HELP = """\
/budget X     sets the budget: quality, balanced, fast or a fraction; without X: shows it
/system TEXT  sets the system message; without TEXT: removes it
/regen        answers the last message again
/save FILE    writes the conversation as JSON
/load FILE    loads a saved conversation
/reset        clears the conversation and its --session file, but keeps the system message
/exit         leaves, like Ctrl-D
Ctrl-C stops an answer, or discards the current input. To send a message that begins
with a slash, put a space before it."""


class Chat:
    """A conversation; the K/V of its beginning is reused from answer to answer."""

    def __init__(
        self,
        model: Model,
        options: GenerationOptions,
        *,
        system: str | None = None,
        session: Path | None = None,
        show_path: bool = False,
    ):
        """Starts with only the system message, or continues a session.

        Args:
            model: the loaded model.
            options: options of all answers.
            system: system message.
            session: file for the conversation and its K/V; written after each answer.
            show_path: whether to colour each token by its cost.

        Raises:
            PolicyError: the model has no chat template.
            SourceError: the session is damaged, or belongs to another bundle.
        """
        if not model.text.chat_template:
            raise PolicyError("this model has no chat template, so it holds no chat; give a PROMPT")
        self._model, self._show_path = model, show_path
        self._trace: TextIO | None = None
        self._cache = model.new_cache()
        self._options = options
        self._messages: list[dict[str, Any]] = []
        self._session, self._unsaved = session, False
        self._saved: Path | None = None  # our own file, safe to overwrite
        if session is not None and session.exists():
            self._resume(session)
        if system:
            self._system(system)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP),
            "/budget": self._budget,
            "/system": self._system,
            "/regen": self._regen,
            "/save": self._save,
            "/load": self._load,
            "/reset": self._reset,
        }

    def run(self, trace: TextIO | None = None) -> None:
        """Reads messages and commands until the end of input.

        Args:
            trace: stream to which each token is written.

        Raises:
            SourceError: the session could not be saved after the last answer.
        """
        self._trace = trace
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing in input())
        terminal = sys.stdin.isatty()
        if terminal:
            self._say("chat with the model; /help lists the commands, /exit or Ctrl-D leaves")
        while True:
            try:
                line = _read() if terminal else input()
            except EOFError:
                break
            except Terminated:
                raise
            except KeyboardInterrupt:  # discards the typed line, not the conversation
                if not terminal:
                    raise
                print("\n/exit or Ctrl-D leaves", file=sys.stderr)
                continue
            if not line.strip():
                continue
            command, _, argument = line.rstrip().partition(" ")
            if command in ("/exit", "\x04"):  # Ctrl-D ends no input on Windows
                break
            try:
                if not line.startswith("/"):
                    self._answer([*self._messages, {"role": "user", "content": line.strip()}])
                elif command in self._commands:
                    self._commands[command](argument.strip())
                else:
                    raise PolicyError(f"no command {command!r}; /help lists them")
            except Terminated:
                raise
            except KeyboardInterrupt:  # stops the command, not the chat
                print(file=sys.stderr)  # after the ^C of a terminal
                self._say("stopped")
            except DashError as error:
                reset = "; /reset starts over" if isinstance(error, ContextLengthError) else ""
                self._say(f"error: {error}{reset}")
        if self._unsaved:
            raise SourceError(f"the last answers are not in {self._session}")

    def _say(self, text: str) -> None:
        print(text if text == HELP else f"dash-run: {text}", file=sys.stderr)

    def _answer(self, asked: list[dict[str, Any]]) -> None:
        sampling = self._options.sampling(self._model.sampling)
        policy = self._model.policy_of(self._options)
        record = Record(policy, sampling)
        view = path_view(self._model, self._options, self._show_path)
        with _typing_waits():
            try:
                if may_repeat(asked[-1].get("content") or ""):
                    self._model.preload(policy, prefill=self._options.prefill)
                with self._model.stream(asked, options=self._options, cache=self._cache) as chunks:
                    show(record.watch(chunks, self._trace), view)
            except KeyboardInterrupt as interrupt:
                if isinstance(interrupt, Terminated) or not record.chunks:
                    raise  # the conversation stays as it was
                print()
                self._say("stopped")
            else:
                tell(record.line(), file=sys.stderr)
        answer = {"role": "assistant", "content": "".join(chunk.text for chunk in record.chunks)}
        if reasoning := "".join(chunk.reasoning for chunk in record.chunks):
            answer["reasoning_content"] = reasoning
        self._messages = [*asked, answer]
        if self._session is not None and self._cache.tokens:
            self._unsaved = True
            with _told_of(self._session):
                self._cache.save(self._session, {_MESSAGES: json.dumps(self._messages)})
            self._unsaved = False

    def _resume(self, session: Path) -> None:
        facts = self._cache.load(session)
        try:
            self._messages = json.loads(facts[_MESSAGES])
        except (KeyError, ValueError, RecursionError):
            raise SourceError(f"{session} holds no conversation") from None
        self._model.text.render_chat(self._messages, answer_next=False)  # raises if invalid
        self._say(f"{len(self._messages)} messages from {session}")

    def _budget(self, text: str) -> None:
        options = dataclasses.replace(self._options, budget=text or self._options.budget)
        policy = self._model.policy_of(options)
        if text:
            self._model.preload(policy, prefill=self._options.prefill, batches=False)
        self._options = options
        self._say(f"policy {policy.name}")

    def _system(self, text: str) -> None:
        kept = [message for message in self._messages if message["role"] != "system"]
        self._messages = [{"role": "system", "content": text}, *kept] if text else kept

    def _regen(self, _: str) -> None:
        roles = [message["role"] for message in self._messages]
        if len(roles) < 2 or roles[-1] != "assistant":
            raise PolicyError("there is no answer yet")
        self._answer(self._messages[:-1])

    def _save(self, name: str) -> None:
        with _told_of(name):
            path = _path(name)
            if path.exists() and path != self._saved:
                raise SourceError(f"{path} exists; choose another name")
            write_text(path, json.dumps(self._messages, ensure_ascii=False, indent=1) + "\n")
        self._saved = path
        self._say(f"{len(self._messages)} messages in {path}")

    def _load(self, name: str) -> None:
        with _told_of(name):
            path = _path(name)
            messages = read_json(path)
        self._model.text.render_chat(messages, answer_next=False)  # raises if it is none
        self._messages, self._saved = messages, path
        self._say(f"{len(messages)} messages from {path}")

    def _reset(self, _: str) -> None:
        self._messages = [message for message in self._messages if message["role"] == "system"]
        if self._session is not None:
            self._unsaved = False
            with _told_of(self._session):
                self._session.unlink(missing_ok=True)
        self._say("conversation cleared")


def _read() -> str:
    """Reads up to Enter, or all lines of pasted text."""
    lines = [input("> " if sys.stdout.isatty() else "")]
    # On Windows select() takes only sockets; the end of input is seen again at the next line.
    with contextlib.suppress(OSError, ValueError, EOFError):
        while not lines[-1].startswith("/") and select.select([sys.stdin], [], [], _PASTED_S)[0]:
            lines.append(input())
    return "\n".join(lines)


def _path(name: str) -> Path:
    if not name:
        raise SourceError("give a file name")
    return Path(name).expanduser()


@contextlib.contextmanager
def _told_of(file: str | Path) -> Iterator[None]:
    """Turns what is wrong with a file, or with its name, into an error that the chat reports.

    Raises:
        SourceError: it cannot be read or written.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # also an unknown ~user, or a NUL
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"cannot read or write {file}: {reason}") from None


@contextlib.contextmanager
def _typing_waits() -> Iterator[None]:
    """Hides what is typed during an answer; it becomes the beginning of the next line."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError):  # not a terminal
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
