"""Speculative decoding: the next tokens are guessed, and checked in one pass of the target.

Several tokens in one pass cost little more than one. A guess is right where the target, asked in
the usual way for each token in turn, draws the same one: so the text is that of the target alone,
greedy or sampled, up to how kernels round when several tokens run at once. For guesses of one
certain token each, this is the rule of arXiv 2211.17192.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from dash_onnx.core.arrays import Logits
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.deciders import FixedPath, decider_of

if TYPE_CHECKING:
    from dash_onnx.runtime.sequence import SequenceState

Speculate = Literal["off", "ngram", "dash", "auto"]
"""Who guesses: nobody, the text itself, a cheap path of the bundle, or whichever pays."""

Source = Literal["ngram", "dash"]

MOST = 8  # tokens that are guessed for one pass
_LONGEST, _SHORTEST = 6, 2  # tokens of the text's end that are looked for in what came before
_SURE = 0.4  # probability below which a path guesses no further
_MEMORY = 0.95  # of times and of what came of guesses: the last twenty count
_PER_TOKEN = 0.15  # what a further token of a pass costs, as a share of one, until it was seen


class Guess(NamedTuple):
    """What came of the guesses for one pass.

    Attributes:
        source: who guessed.
        tokens: how many were guessed.
        right: how many of them the target drew, too.
    """

    source: Source
    tokens: int
    right: int


class NgramIndex:
    """Where the last tokens of a text occurred in it before, and what followed (prompt lookup)."""

    def __init__(self) -> None:
        """Starts with an empty text."""
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # of each n-gram but the last, where it ended

    def extend(self, text: Sequence[int]) -> None:
        """Takes the whole text so far; only what is new is looked at."""
        for token in text[len(self._tokens) :]:
            for size in range(_SHORTEST, _LONGEST + 1):
                if len(self._tokens) >= size:
                    self._ends[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def following(self, count: int) -> tuple[int, list[int]]:
        """Length of the longest end that occurred before, and up to `count` tokens after it."""
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            end = self._ends.get(tuple(self._tokens[-size:]))
            if end is not None and len(self._tokens) >= size:
                return size, self._tokens[end : end + count]
        return 0, []


@dataclass
class _Estimate:
    """How often a guessed token is right, as far as it was seen."""

    right: float = 0.0
    wrong: float = 0.0

    def see(self, guess: Guess) -> None:
        """Takes what came of the guesses for one pass; those after a wrong one tell nothing."""
        self.right = self.right * _MEMORY + guess.right
        self.wrong = self.wrong * _MEMORY + (guess.right < guess.tokens)

    def forget(self) -> None:
        """A pass without: what did not pay is tried again some day."""
        self.right, self.wrong = self.right * _MEMORY, self.wrong * _MEMORY

    @property
    def rate(self) -> float:
        """Of one token."""
        return (self.right + 1) / (self.right + self.wrong + 2)

    def expected(self, count: int) -> float:
        """Tokens that a pass with `count` guesses brings, its own included."""
        return sum(self.rate**right for right in range(count + 1))


@dataclass
class _Times:
    """Milliseconds of passes by their number of tokens, as far as they were seen."""

    seen: dict[int, float] = field(default_factory=dict)

    def see(self, tokens: int, ms: float) -> None:
        """Takes the time of one pass; the first one of its size also sets it up."""
        before = self.seen.get(tokens)
        self.seen[tokens] = ms if before is None else min(ms, before + (ms - before) * 0.2)

    def of(self, tokens: int) -> float:
        """Seen, or guessed from the nearest smaller pass; infinite before any."""
        smaller = [count for count in self.seen if count <= tokens]
        if not smaller:
            return float("inf")
        nearest = max(smaller)
        return self.seen[nearest] * (1 + _PER_TOKEN * (tokens - nearest) / nearest)


class Speculation:
    """Guesses and checks for one generation; everything it learns, it learns from this one.

    Attributes:
        path: of every token.
    """

    def __init__(
        self,
        sequence: SequenceState,
        policy: Policy,
        draw: Callable[[Logits], int],
        speculate: Speculate,
        draft: Policy | None,
    ):
        """Begins after the prompt.

        Args:
            sequence: that the prompt ran in.
            policy: the target; it takes one path for every token.
            draw: draws a token from logits `[V]`, and appends it to the text.
            speculate: who guesses.
            draft: whose path guesses; None: none.

        Raises:
            PolicyError: the target's paths differ between tokens.
        """
        if policy.uniform is None:
            raise PolicyError(
                f"speculation checks guesses on one path for every token, such as int8; policy "
                f"{policy.name!r} has none"
            )
        self._sequence, self._draw = sequence, draw
        self.path = policy.uniform
        self._target = FixedPath(policy.uniform, policy.head)
        self._index = NgramIndex() if speculate in ("ngram", "auto") else None
        self._draft = None if draft is None else decider_of(draft, sequence)
        self._always = speculate != "auto"
        self._estimates: dict[tuple[Source, int], _Estimate] = {}
        self._passes, self._drafts = _Times(), _Times()

    def step(self, text: list[int], room: int) -> tuple[list[int], Guess | None]:
        """Runs the last token and what is guessed to follow it.

        Args:
            text: prompt and answer so far, which `draw` appends to.
            room: how many further tokens the answer may have.

        Returns:
            The new tokens, at least one, and what came of the guesses.
        """
        key, guesses = self._guess(text, min(MOST, room - 1))
        started = time.perf_counter()
        ids = np.array([text[-1], *guesses], np.int64)
        logits, _ = self._sequence.forward(
            ids if guesses else int(ids[0]), self._target, every=True
        )
        new: list[int] = []
        for row, guessed in zip(logits, [*guesses, None], strict=True):
            token = self._draw(row)
            new.append(token)
            if token != guessed:
                break
        self._passes.see(len(ids), (time.perf_counter() - started) * 1e3)
        self._sequence.truncate(self._sequence.length - len(ids) + len(new))
        if key is None:
            for estimate in self._estimates.values():
                estimate.forget()
            return new, None
        guess = Guess(key[0], len(guesses), len(new) - 1)
        self._estimates[key].see(guess)
        return new, guess

    def _guess(self, text: list[int], most: int) -> tuple[tuple[Source, int] | None, list[int]]:
        """The tokens that are likely to follow, if guessing pays, and where they are from."""
        options: list[tuple[float, tuple[Source, int], list[int]]] = []
        if self._index is not None:
            self._index.extend(text)
            size, found = self._index.following(most)
            if found:
                options += self._plans(("ngram", size), found, 0.0)
        if self._draft is not None and most > 0:
            ms = self._drafts.of(1)
            ms = 0.0 if ms == float("inf") else ms  # the first time shows what it takes
            options += self._plans(("dash", 0), [-1] * most, ms)
        if not options:
            return None, []
        rate, key, guesses = max(options, key=lambda option: option[0])
        if not self._always and rate <= 1 / self._passes.of(1):
            return None, []
        return key, self._drafted(text[-1], len(guesses)) if key[0] == "dash" else guesses

    def _plans(
        self, key: tuple[Source, int], found: list[int], draft_ms: float
    ) -> Iterator[tuple[float, tuple[Source, int], list[int]]]:
        """For each number of guesses, tokens per millisecond."""
        estimate = self._estimates.setdefault(key, _Estimate())
        for count in range(1, len(found) + 1):
            ms = self._passes.of(count + 1) + count * draft_ms
            yield estimate.expected(count) / ms, key, found[:count]

    def _drafted(self, token: int, count: int) -> list[int]:
        """What the draft's path takes for most likely, as long as it is sure."""
        assert self._draft is not None
        guesses: list[int] = []
        length, started = self._sequence.length, time.perf_counter()
        while len(guesses) < count:
            logits, _ = self._sequence.forward(token, self._draft)
            token = int(logits.argmax())
            guesses.append(token)
            if 1 / np.exp(logits.astype(np.float32) - logits[token]).sum() < _SURE:
                break
        self._drafts.see(1, (time.perf_counter() - started) * 1e3 / len(guesses))
        self._sequence.truncate(length)
        return guesses
