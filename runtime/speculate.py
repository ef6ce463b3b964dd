"""Speculative decoding: the next tokens are guessed, and checked in one pass of the target.

Several tokens in one pass cost little more than one. A guess is right where the target, asked in
the usual way for each token in turn, draws the same one: so the text is that of the target alone,
greedy or sampled, up to how kernels round when several tokens run at once. For guesses of one
certain token each, this is the rule of arXiv 2211.17192.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, Literal

import numpy as np

from dash_onnx.core.arrays import Logits
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.deciders import FixedPath, decider_of
from dash_onnx.runtime.planner import MOST, Bet, Guess, Planner

if TYPE_CHECKING:
    from dash_onnx.runtime.sequence import SequenceState

Speculate = Literal["off", "ngram", "dash", "auto"]
"""Who guesses: nobody, the text itself, a cheap path of the bundle, or whichever pays."""

_LONGEST, _SHORTEST = 6, 2  # tokens of the text's end that are looked for in what came before
_SURE = 0.4  # probability below which a path guesses no further


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


class Speculation:
    """Guesses and checks for one generation.

    Attributes:
        path: of every token.
    """

    def __init__(
        self,
        sequence: SequenceState,
        policy: Policy,
        draw: Callable[[Logits], int],
        speculate: Speculate,
        planner: Planner,
        eos: Set[int] = frozenset(),
    ):
        """Begins after the prompt.

        Args:
            sequence: that the prompt ran in.
            policy: the target; it takes one path for every token.
            draw: draws a token from logits `[V]`, and appends it to the text.
            speculate: who guesses.
            planner: of the target.
            eos: ids after which nothing comes.

        Raises:
            PolicyError: the target's paths differ between tokens.
        """
        if policy.uniform is None:
            raise PolicyError(
                f"speculation checks guesses on one path for every token, such as int8; policy "
                f"{policy.name!r} has none"
            )
        self._sequence, self._draw, self._eos = sequence, draw, eos
        self.path = policy.uniform
        self._target = FixedPath(policy.uniform, policy.head)
        self._index = NgramIndex() if speculate in ("ngram", "auto") else None
        draft = planner.draft_for(speculate)
        self._draft = None if draft is None else decider_of(draft.policy, sequence)
        self._planner, self._always = planner, speculate != "auto"
        self._ran: set[int] = set()  # sizes of passes; 0: a draft
        self._found: list[int] = []

    def step(self, text: list[int], room: int) -> tuple[list[int], Guess | None]:
        """Runs the last token and what is guessed to follow it.

        Args:
            text: prompt and answer so far, which `draw` appends to.
            room: how many further tokens the answer may have.

        Returns:
            The new tokens, at least one, and what came of the guesses.
        """
        bet = self._planner.choose([*self._offers(text, min(MOST, room - 1))], self._always)
        started = time.perf_counter()
        guesses = [] if bet is None else self._guesses(bet, text[-1])
        guessed_at = time.perf_counter()
        ids = np.array([text[-1], *guesses], np.int64)
        logits, _ = self._sequence.forward(
            ids if guesses else int(ids[0]), self._target, every=True
        )
        new: list[int] = []
        for row, guessed in zip(logits, [*guesses, None], strict=True):
            token = self._draw(row)
            new.append(token)
            if token != guessed or token in self._eos:
                break
        ms = (time.perf_counter() - guessed_at) * 1e3
        self._sequence.truncate(self._sequence.length - len(ids) + len(new))
        timed = 0 in self._ran, len(ids) in self._ran
        self._ran |= {len(ids), *([0] if bet and bet.source == "dash" else [])}
        if bet is None:
            if timed[1]:
                self._planner.see_plain(ms)
            return new, None
        right = sum(a == b for a, b in zip(new, guesses, strict=False))
        guess = Guess(bet.source, len(guesses), right)
        draft_ms = (guessed_at - started) * 1e3
        self._planner.see(bet, guess, draft_ms, ms, timed=timed)
        return new, guess

    def _offers(self, text: list[int], most: int) -> Iterator[Bet]:
        """What each source could guess."""
        if self._index is not None:
            self._index.extend(text)
            size, self._found = self._index.following(most)
            if self._found:
                yield Bet("ngram", size, len(self._found))
        if self._draft is not None and most > 0:
            yield Bet("dash", 0, most)

    def _guesses(self, bet: Bet, token: int) -> list[int]:
        """Tokens to follow one, up to EOS."""
        if bet.source == "dash":
            return self._drafted(token, bet.tokens)
        found = self._found[: bet.tokens]
        ends = [at for at, token in enumerate(found, 1) if token in self._eos]
        return found[: ends[0]] if ends else found

    def _drafted(self, token: int, count: int) -> list[int]:
        """What the draft's path takes for most likely, as long as it is sure."""
        assert self._draft is not None
        guesses: list[int] = []
        length = self._sequence.length
        while len(guesses) < count:
            logits, _ = self._sequence.forward(token, self._draft)
            token = int(logits.argmax())
            guesses.append(token)
            sure = 1 / np.exp(logits.astype(np.float32) - logits[token]).sum() >= _SURE
            if token in self._eos or not sure:
                break
        self._sequence.truncate(length)
        return guesses
