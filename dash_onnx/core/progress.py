"""Progress of long work: a bar on a terminal, lines in a log, nothing where no one listens.

Everything goes through `logging`, at INFO. A terminal gets a `BarHandler`: where the package's
logger has one, phases are bars; otherwise each is a line at its start, every half minute and at its
end. A program that configures no logging sees nothing.
"""

from __future__ import annotations

import logging
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

T = TypeVar("T")

PACKAGE = "dash_onnx"
"""Name of the package's top-level logger."""

_LOG = logging.getLogger(__name__)
_MARK = {"phase": True}  # of records that a bar stands for
_BAR_S = 1.0  # from one refresh of a bar to the next, between steps
_LINE_S = 30.0  # from line to line of a log


def wrapped(text: str) -> str:
    """A text whose lines break between words, to fit the terminal; rows of tables stay."""
    wrap = textwrap.TextWrapper(
        width=max(shutil.get_terminal_size().columns - 1, 1),
        break_long_words=False,
        break_on_hyphens=False,  # of paths
    ).wrap
    lines = text.split("\n")
    return "\n".join(part for line in lines for part in ("  " not in line and wrap(line)) or [line])


class BarHandler(logging.StreamHandler):
    """Writes records to a terminal, above the bars that stand for those of phases."""

    def format(self, record: logging.LogRecord) -> str:
        """Breaks lines between words."""
        return wrapped(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        """Leaves out what a bar shows."""
        from tqdm import tqdm

        if not hasattr(record, "phase"):
            with tqdm.external_write_mode(self.stream):
                super().emit(record)


def _bars() -> bool:
    return any(isinstance(one, BarHandler) for one in logging.getLogger(PACKAGE).handlers)


@dataclass(frozen=True)
class Expected:
    """A phase that will run.

    Attributes:
        name: name of the `Phase`.
        seconds: time that it is expected to take.
    """

    name: str
    seconds: float


class Schedule:
    """The phases that a command will run, in order; the time taken corrects what is left."""

    def __init__(self, phases: Sequence[Expected]):
        """Says nothing until the first phase starts: those before it are done already."""
        self._phases = phases
        self._next = 0  # the first phase that has not started
        self._announced = self._took = 0.0  # seconds, of those that ended

    def start(self, name: str, left: float) -> float | None:
        """Starts the next phase with a name.

        Args:
            name: name of the phase.
            left: fraction of it that an earlier run did not finish.

        Returns:
            Seconds announced for what is left of it; None where it is not scheduled.
        """
        found = (at for at in range(self._next, len(self._phases)) if self._phases[at].name == name)
        at = next(found, None)
        if at is None:
            return None
        if not self._next:
            self._tell(at, left)
        self._next = at + 1
        return self._phases[at].seconds * left

    def end(self, announced: float, took: float) -> None:
        """Ends a phase, with the seconds that were announced for it and those that it took."""
        self._announced, self._took = self._announced + announced, self._took + took

    def correction(self, announced: float = 0.0, took: float = 0.0) -> float:
        """By what factor phases take longer than announced.

        Args:
            announced: seconds, for the phase that runs.
            took: seconds that it will have taken, as it looks now.
        """
        announced, took = self._announced + announced, self._took + took
        return took / announced if announced else 1.0

    @property
    def later(self) -> float:
        """Seconds announced for the phases after the one that runs."""
        return self._seconds(self._next)

    def _tell(self, first: int, left: float) -> None:
        fractions = [0.0] * first + [left] + [1.0] * (len(self._phases) - first - 1)
        parts = [
            f"{phase.name} {about(phase.seconds * fraction) if fraction else '(done)'}"
            for phase, fraction in zip(self._phases, fractions, strict=True)
        ]
        done = f" ({number} done)" if (number := fractions.count(0.0)) else ""
        total = about(self._phases[first].seconds * left + self._seconds(first + 1))
        _LOG.info(f"{len(parts)} phases{done}, about {total} on this machine: {', '.join(parts)}")

    def _seconds(self, first: int) -> float:
        return sum(phase.seconds for phase in self._phases[first:])


_schedule = Schedule(())


def announce(phases: Sequence[Expected]) -> None:
    """Sets the phases that this process runs next; an empty list clears them."""
    global _schedule
    _schedule = Schedule(phases)


class Phase:
    """A part of long work, as a context manager.

    >>> with Phase("text", total=255, unit="tokens") as phase:
    ...     phase.update(1)
    """

    def __init__(self, name: str, *, total: int | None = None, done: int = 0, unit: str = ""):
        """Shows nothing yet.

        Args:
            name: as in the schedule, where there is one.
            total: steps, None if it is not known. A single one is done when the context ends.
            done: steps of an earlier run.
            unit: unit of the steps, in the plural.
        """
        self._name, self._total, self._first, self._done = name, total, done, done
        self._single = total == 1
        self._unit = f" {unit}" if unit else ""
        self._ended = threading.Event()
        self._announced: float | None = None  # seconds
        self._expected: float | None = None  # seconds, corrected by what earlier phases took
        self._figures = ""

    def __enter__(self) -> Self:
        from tqdm import tqdm  # here: every tool imports this module, and few have phases

        self._schedule, self._started = _schedule, time.monotonic()
        left = 1 - self._first / self._total if self._total else 1.0
        shown = _LOG.isEnabledFor(logging.INFO)
        self._announced = self._schedule.start(self._name, left)
        if self._announced is not None:
            self._expected = self._announced * self._schedule.correction()
        self._bar = tqdm(
            desc=self._name,
            total=self._total,
            initial=self._first,
            unit=self._unit.strip() or "it",
            file=sys.stderr,
            disable=not (shown and _bars()),
        )
        self._say(self._start())
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        if shown:  # steps may be long: a thread writes lines and moves bars meanwhile
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._single and self._done < 1 and kind is None:
            self.update()
        self._bar.close()
        if kind not in (None, GeneratorExit):
            return
        took = self._elapsed()
        # By `break`, or by an error: a loop closes its generator before that is handled.
        early = kind is not None and self._done != self._total
        text = f"ended after {self._count()}" if early else "done"
        text += f" in {took:.1f} s"
        if self._announced is not None and self._expected is not None:
            text += f" (expected {about(self._expected)})"
            self._schedule.end(self._announced, took)
        later = self._schedule.later * self._schedule.correction()
        if later and not early:
            text += f", about {about(later)} to go"
        self._say(text)

    def update(self, steps: int = 1) -> None:
        """Counts steps that are done."""
        self._done += steps
        self._annotate()
        self._bar.update(steps)
        self._say(self._state(), logging.DEBUG)

    def set_postfix(self, **figures: str) -> None:
        """Shows figures of the last step, on a bar and at DEBUG."""
        self._figures = ", ".join(f"{name}={text}" for name, text in figures.items())
        self._say(self._figures, logging.DEBUG)

    def _annotate(self) -> None:
        """Adds to the bar what it does not show by itself."""
        if self._bar.disable:
            return
        own, later = self._rest()
        parts = [self._figures]
        if own and self._done == self._first:  # from then on the bar shows it
            parts.append(f"about {about(own)} to go")
        if later:
            parts.append(f"{about(later)} after it")
        self._bar.set_postfix_str(", ".join(filter(None, parts)), refresh=False)

    def _repeat(self) -> None:
        while not self._bar.disable and not self._ended.wait(_BAR_S):
            self._annotate()
            self._bar.refresh()
        while not self._ended.wait(_LINE_S):
            own, later = self._rest()
            text = self._state()
            if own:
                text += f", about {about(own)} to go"
            if later:
                text += f", {about(later)} after it"
            self._say(text)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _rest(self) -> tuple[float | None, float]:
        """Seconds left in this phase, if that is known, and in those after it."""
        elapsed, own = self._elapsed(), None
        if self._total and self._done > self._first:
            own = elapsed / (self._done - self._first) * max(self._total - self._done, 0)
        elif self._expected is not None:
            own = max(self._expected - elapsed, 0.0)
        if self._announced is None or own is None:
            return own, 0.0
        correction = self._schedule.correction(self._announced, elapsed + own)
        return own, self._schedule.later * correction

    def _start(self) -> str:
        text = "starts"
        if self._first:
            text += f" after {self._count()}"
        elif self._total and not self._single:
            text += f", {self._total}{self._unit or ' steps'}"
        return text if self._expected is None else f"{text}, expected {about(self._expected)}"

    def _count(self) -> str:
        total = "" if self._total is None else f" of {self._total}"
        return f"{self._done}{total}{self._unit}"

    def _state(self) -> str:
        count = "" if self._single else f"{self._count()} "
        return f"{count}after {about(self._elapsed())}"

    def _say(self, text: str, level: int = logging.INFO) -> None:
        _LOG.log(level, "%s: %s", self._name, text, extra=_MARK)


class Loop(Phase, Generic[T]):
    """A phase that goes over items.

    >>> for layer in Loop("layers", range(12, 30), done=12): ...
    """

    def __init__(self, name: str, items: Iterable[T], *, done: int = 0):
        """Shows nothing yet.

        Args:
            name: see `Phase`.
            items: the items, without those that an earlier run has done.
            done: how many an earlier run has done.
        """
        total = done + len(items) if isinstance(items, Sized) else None
        super().__init__(name, total=total, done=done)
        self._items = items

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.update()


def about(seconds: float) -> str:
    """A duration in its unit, rounded."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
