"""Draft tokens, which one pass verifies together: their source and number.

What followed the same tokens earlier, in prompt, answer or expected text, may follow again. A
draft has the length that yields the most tokens per unit of time, given how often such tokens were
accepted so far and how long passes of several rows take.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from dash_onnx.core.actions import SKIP, Action, ActionPath
from dash_onnx.core.facts import PassCosts
from dash_onnx.core.forms import form_of, head_form_of

MAX_DRAFT_TOKENS = 15
"""Maximum draft tokens of one answer in one pass."""

MAX_DRAFT_ROWS = 32
"""Maximum rows of a pass that verifies drafts of several answers."""

Source = Literal["text", "expected", "grammar"]

_LONGEST = 16  # tokens of a match that are compared
_TRIED = 16  # latest occurrences of the same two tokens that are compared
_STARTS = (2, 3, 4, 6, 9, 13)  # match lengths from which rates are counted separately
_STEPS = [sum(size >= start for start in _STARTS) for size in range(_LONGEST + MAX_DRAFT_TOKENS)]
_MARGIN = 1.03  # tokens per plain pass from which drafting pays
_COUNTED = 256  # outcomes of a kind that count; later ones count for more
_PRIOR = 8  # outcomes that a prior belief is worth
_BELIEVED = {"text": 0.15, "expected": 0.35, "grammar": 0.65}
_MOST_BELIEVED = 0.98
_MIN_PROBABILITY = 0.02  # probability of a chain below which it ends
_EXTRA = 0.25  # cost of one more row in a pass, where nothing was profiled
_CONTEXT = 256  # tokens of context that one cost holds for


class Draft(NamedTuple):
    """The draft tokens of one pass, and how many were accepted.

    Attributes:
        source: prompt and answer, the expected text, or what a grammar leaves.
        tokens: how many were verified.
        accepted: how many of them the target sampled, too.
    """

    source: Source
    tokens: int
    accepted: int


class Found(NamedTuple):
    """What may follow.

    Attributes:
        source: where it was found.
        match: number of tokens at the text's end that also precede it there.
        tokens: up to `MAX_DRAFT_TOKENS`.
    """

    source: Source
    match: int
    tokens: list[int]


class Lookup:
    """Where the end of a text occurred before, and what followed."""

    def __init__(self, prompt: Sequence[int], expected: Sequence[int] = ()):
        """Begins an answer.

        Args:
            prompt: ids.
            expected: ids that the answer is likely to contain, in order.
        """
        self.tokens: list[int] = []
        self._last: dict[tuple[int, int], int] = {}  # by two tokens, the position after them
        self._before: list[int] = []  # by such a position, the one before it; 0 is none
        self._after: dict[int, int] = {}  # what last followed a token
        for token in prompt:
            self._index(token)
        self._expected, self._at, self._run = [*expected], 0, 0
        self._places: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, pair in enumerate(pairwise(expected), 2):
            self._places[pair].append(place)

    def add(self, token: int) -> None:
        """Takes the next token of the answer."""
        self._index(token)
        if not self._expected:
            return
        if self._at < len(self._expected) and self._expected[self._at] == token:
            self._at += 1
            self._run += 1
            return
        self._run = 0  # it differs: continue at the next position that ends like the answer
        places = self._places.get((self.tokens[-2], token))
        if places:
            self._at = places[min(bisect_left(places, self._at), len(places) - 1)]
            self._run = 2

    def _index(self, token: int) -> None:
        tokens, place = self.tokens, len(self.tokens)
        before = 0
        if place >= 2:
            pair = tokens[-2], tokens[-1]
            before = self._last.get(pair, 0)
            self._last[pair] = place
        self._before.append(before)
        if place:
            self._after[tokens[-1]] = token
        tokens.append(token)

    def find(self) -> Found | None:
        """What followed the longest match: the latest of equals, preferring the expected text."""
        tokens, best, end = self.tokens, 0, 0
        at = self._last.get((tokens[-2], tokens[-1]), 0) if len(tokens) > 1 else 0
        for _ in range(_TRIED):
            if not at or best == _LONGEST:
                break
            size = 2
            while size < min(_LONGEST, at) and tokens[at - 1 - size] == tokens[-1 - size]:
                size += 1
            if size > best:
                best, end = size, at
            at = self._before[at]
        run = min(self._run, _LONGEST)
        begins = not best and not self._at  # perhaps the answer begins with it
        if self._at < len(self._expected) and (run >= max(best, 1) or begins):
            return Found("expected", run, self._expected[self._at : self._at + MAX_DRAFT_TOKENS])
        return Found("text", best, tokens[end : end + MAX_DRAFT_TOKENS]) if best else None

    def agrees(self, found: Found) -> list[bool]:
        """For each token found, whether it is what last followed the one before it."""
        before = [self.tokens[-1], *found.tokens]
        return [self._after.get(a) == b for a, b in zip(before, found.tokens, strict=False)]


_Kind = tuple[Source, int, bool, bool]
"""Source, step of the match, whether the last successor agrees, whether it is the first."""


@dataclass
class _Outcomes:
    """How often draft tokens of a kind were accepted."""

    accepted: float = 0.0
    count: float = 0.0

    def see(self, accepted: bool) -> None:
        if self.count >= _COUNTED:
            self.accepted, self.count = self.accepted / 2, self.count / 2
        self.accepted += accepted
        self.count += 1

    def rate(self, believed: float) -> float:
        return (self.accepted + believed * _PRIOR) / (self.count + _PRIOR)


def _kinds(found: Found, agrees: list[bool]) -> list[_Kind]:
    """The kind of each token; the match grows with the tokens before it."""
    return [
        (found.source, _STEPS[found.match + n], agree, n == 0) for n, agree in enumerate(agrees)
    ]


def _believed(kind: _Kind) -> float:
    source, step, agrees, _ = kind
    return min(_BELIEVED[source] + 0.09 * step + 0.15 * agrees, _MOST_BELIEVED)


class DraftStats:
    """Acceptance of draft tokens over all generations of one target; any thread may use it."""

    def __init__(
        self,
        passes: PassCosts | None,
        path: ActionPath,
        head: Action,
        widened: Set[Action],
        reruns: bool = False,
        wide_head: Callable[[], bool] = lambda: True,
    ):
        """Takes the profile.

        Args:
            passes: the bundle's costs of passes.
            path: path of the target.
            head: precision of its LM head.
            widened: actions that passes of several rows may run wide.
            reruns: whether the accepted tokens of a pass run again if another is rejected.
            wide_head: whether the wide LM head is loaded, which draft tokens do not wait for.
        """
        self.reruns = reruns
        self._passes, self._layers, self._head = passes, Counter(path), head
        self._widened, self._wide_head = frozenset(widened), wide_head
        self._costs: dict[tuple[int, int, bool], float] = {}
        self.outcomes: dict[_Kind, _Outcomes] = defaultdict(_Outcomes)

    def cost(self, rows: int, context: int) -> float:
        """The time of a pass of some rows, as a multiple of that of one row."""
        key = rows, context // _CONTEXT, self._wide_head()
        found = self._costs.get(key)
        if found is None:
            found = self._costs[key] = self._cost(rows, context)
        return found

    def _cost(self, rows: int, context: int) -> float:
        passes, widened = self._passes, self._widened
        if rows == 1:
            return 1.0
        if passes is None:
            return 1.0 + _EXTRA * (rows - 1)

        def ms(rows: int) -> float:
            layers = sum(
                count
                * passes.layer_ms(form_of(passes, action, rows, context, widened), rows, context)
                for action, count in self._layers.items()
                if action != SKIP
            )
            wide = head_widened(widened, rows, self._wide_head())
            return layers + passes.head_ms(head_form_of(passes, self._head, rows, wide), rows)

        return max(ms(rows) / ms(1), 1.0)


def head_widened(widened: Set[Action], rows: int, loaded: bool) -> frozenset[Action]:
    """Actions whose LM head may run wide in a pass with the drafts of one answer.

    These do not wait for the wide head to load; passes with more rows, which are of batches, do.
    """
    return frozenset(widened if loaded or rows > MAX_DRAFT_TOKENS + 1 else ())


def best_length(gains: Sequence[Sequence[float]], stats: DraftStats, context: int) -> int:
    """How many draft tokens per answer yield the most tokens per unit of time, in one pass of all.

    Args:
        gains: for each answer, the tokens expected from a pass with 0, 1, 2, ... draft tokens.
        stats: draft statistics of their target.
        context: tokens of the longest.

    Returns:
        The same number for all of them: a pass pads those that have fewer.
    """
    answers = len(gains)
    best, count, again = _MARGIN * answers / stats.cost(answers, context), 0, 0.0
    longest = min(max(map(len, gains)), max(MAX_DRAFT_ROWS, MAX_DRAFT_TOKENS + 1) // answers)
    for n in range(1, longest):
        expected = sum(known[min(n, len(known) - 1)] for known in gains)
        if stats.reruns:  # of n tokens, where this is the first rejected one
            (known,) = gains  # states cannot be padded: such an answer runs alone
            before = known[n - 1] - known[n - 2] if n > 1 else 1.0
            again += (before - (known[n] - known[n - 1])) * stats.cost(n, context)
        rate = expected / (stats.cost(answers * (n + 1), context) + again)
        if rate > best:
            best, count = rate, n
    return count


class Drafter:
    """Finds draft tokens for one answer."""

    def __init__(
        self,
        prompt: Sequence[int],
        expected: Sequence[int] = (),
        eos: Set[int] = frozenset(),
    ):
        """Begins after the prompt.

        Args:
            prompt: ids.
            expected: see `Lookup`.
            eos: ids that end the answer.
        """
        self._eos = eos
        self._lookup = Lookup(prompt, expected)
        self._open: list[tuple[Found, list[_Kind], int]] = []  # not yet compared, and where

    def find(
        self, stats: DraftStats, text: Sequence[int], most: int, hint: Sequence[int] = ()
    ) -> tuple[Found | None, list[float]]:
        """The draft tokens that the next pass may verify, and what it would yield.

        Args:
            stats: draft statistics of the target.
            text: prompt and answer so far.
            most: maximum number of draft tokens.
            hint: tokens that a grammar makes likely; if given, nothing else is looked up.

        Returns:
            The draft tokens, without unlikely ones, and the tokens expected of a pass with the
            first 0, 1, 2, ... of them.
        """
        for token in text[len(self._lookup.tokens) :]:
            self._compare(stats, token)
            self._lookup.add(token)
        found = Found("grammar", 0, [*hint[:MAX_DRAFT_TOKENS]]) if hint else self._lookup.find()
        gains = [1.0]
        if found is None:
            return None, gains
        kinds = _kinds(found, self._lookup.agrees(found))
        self._open.append((found, kinds, len(self._lookup.tokens)))
        reached = 1.0
        for token, kind in zip(found.tokens[:most], kinds, strict=False):
            reached *= stats.outcomes[kind].rate(_believed(kind))
            gains.append(gains[-1] + reached)
            if token in self._eos or reached < _MIN_PROBABILITY:
                break
        return found._replace(tokens=found.tokens[: len(gains) - 1]), gains

    def _compare(self, stats: DraftStats, token: int) -> None:
        """Compares what could have been drafted, whether it was or not, with the actual token."""
        place, still = len(self._lookup.tokens), []
        for found, kinds, start in self._open:
            n = place - start
            accepted = found.tokens[n] == token
            stats.outcomes[kinds[n]].see(accepted)
            if accepted and n + 1 < len(found.tokens):
                still.append((found, kinds, start))
        self._open = still
