"""What guessing has brought so far, and what it therefore pays to guess next.

All times are in plain passes: passes of the target over one token, without guesses.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dash_onnx.core.actions import LOSSY, Action, Path
from dash_onnx.core.budget import kl_at, reference_ms
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import Policy, ScoredPolicy, StaticPolicy

Source = Literal["ngram", "dash"]

MOST = 8  # tokens that are guessed for one pass

_EXTRA = 0.25  # what a further token of a pass takes, until it was timed
_WORTH = 1.1  # a draft's expected speed, as a multiple of the target's, that is worth loading it
_STEP = 0.1  # of a running mean, once ten values were seen
_MEMORY = 0.97  # of what came of guesses, per pass with some: the last thirty count
_PRIOR = 4  # guesses that what is believed of a source beforehand is worth
_BELIEVED: dict[Source, float] = {"ngram": 0.25, "dash": 0.8}  # share that is right
_MARGIN = 1.02  # tokens per plain pass from which guessing pays
_RETIMED = 32  # passes with guesses, at most, until a plain one is timed again
_ALLOWANCE = 1.0  # plain passes that a source may lose on probes
_REFILL = 0.005  # of it, per pass
_WORST = 2.0  # plain passes that one probe is charged at most: it may have loaded graphs


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


class Draft(NamedTuple):
    """A path, or a policy that chooses paths, which guesses for a target.

    Attributes:
        policy: of the guesses.
        cost: of one of them, as profiled.
        believed: share of them that is expected to be right.
    """

    policy: Policy
    cost: float
    believed: float


class Bet(NamedTuple):
    """What is to be guessed for a pass.

    Attributes:
        source: who guesses.
        match: length of the n-gram that was found; 0 for a path.
        tokens: how many, at most.
        probe: whether it is only to learn whether the source pays now.
    """

    source: Source
    match: int
    tokens: int
    probe: bool = False


@dataclass
class _Mean:
    """A running mean."""

    value: float = 0.0
    count: int = 0

    def see(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) * max(1 / self.count, _STEP)


@dataclass
class _Outcomes:
    """How often a guessed token was right."""

    right: float = 0.0
    wrong: float = 0.0

    def see(self, guess: Guess) -> None:
        """Takes what came of the guesses for one pass; those after a wrong one tell nothing."""
        self.right = self.right * _MEMORY + guess.right
        self.wrong = self.wrong * _MEMORY + (guess.right < guess.tokens)

    def rate(self, believed: float) -> float:
        """Share that is right, given what was believed before any was seen."""
        return (self.right + _PRIOR * believed) / (self.right + self.wrong + _PRIOR)


def speed(rate: float, tokens: int, cost: float) -> float:
    """Tokens per plain pass of a pass with guesses.

    Args:
        rate: share of the guesses that is right.
        tokens: guessed.
        cost: of guessing and checking one of them.
    """
    return sum(rate**right for right in range(tokens + 1)) / (1 + tokens * cost)


class Planner:
    """Learns from all generations of a target which guesses pay; any thread may use it.

    A source that does not pay is probed with one token now and then, for as long as its probes have
    lost less than one plain pass and half a percent of all since.

    Attributes:
        draft: whose path guesses; None where none is cheaper than the target.
    """

    def __init__(self, draft: Draft | None = None):
        """Has seen nothing yet."""
        self.draft = draft
        self._lock = threading.Lock()
        self._plain_ms = _Mean()
        self._extra = _Mean(_EXTRA, 1)
        self._drafting = _Mean(draft.cost if draft else 0.0, 1)
        self._outcomes: dict[tuple[Source, int], _Outcomes] = {}
        self._allowance: dict[Source, float] = dict.fromkeys(_BELIEVED, _ALLOWANCE)
        self._since_plain = 0

    def draft_for(self, speculate: str) -> Draft | None:
        """Whose path guesses; with `auto` one that is expected to be worth its weights' memory."""
        draft = self.draft
        if speculate == "auto" and draft is not None and _promise(draft) < _WORTH:
            return None
        return draft if speculate in ("dash", "auto") else None

    def choose(self, offers: Sequence[Bet], always: bool = False) -> Bet | None:
        """The bet that brings most tokens per time; None for a pass without guesses.

        Args:
            offers: what each source could guess, at most.
            always: guess whether it pays or not.
        """
        with self._lock:
            for source, left in self._allowance.items():
                self._allowance[source] = min(left + _REFILL, _ALLOWANCE)
            self._since_plain += 1
            if not self._plain_ms.count or (not always and self._since_plain > _RETIMED):
                return None
            rated = max(
                (self._rated(offer, tokens) for offer in offers for tokens in _counts(offer)),
                default=(0.0, None),
            )
            if rated[0] > _MARGIN or always:
                return rated[1]
            probes = [
                self._rated(offer, 1)
                for offer in offers
                if self._allowance[offer.source] >= self._cost(offer.source)
            ]
            return max(probes)[1]._replace(probe=True) if probes else None

    def see_plain(self, ms: float) -> None:
        """Takes the time of a pass without guesses."""
        with self._lock:
            self._since_plain = 0
            if self._plain_ms.count:
                ms = min(ms, 2 * self._plain_ms.value)  # what else the machine did
            self._plain_ms.see(ms)

    def see(
        self, bet: Bet, guess: Guess, draft_ms: float, ms: float, *, timed: tuple[bool, bool]
    ) -> None:
        """Takes what came of a bet.

        Args:
            bet: as chosen.
            guess: what came of it.
            draft_ms: that guessing took.
            ms: that the pass took.
            timed: whether these two tell what the next ones will take: the first of a sequence also
                set up what they run.
        """
        with self._lock:
            plain_ms = self._plain_ms.value
            for key in {(bet.source, 0), (bet.source, bet.match)}:
                self._outcomes.setdefault(key, _Outcomes()).see(guess)
            if timed[0] and bet.source == "dash":
                self._drafting.see(min(draft_ms / guess.tokens / plain_ms, _WORST))
            if timed[1]:
                extra = (ms / plain_ms - 1) / guess.tokens
                self._extra.see(min(max(extra, 0.0), 1.0))
            if bet.probe:
                lost = (draft_ms + ms) / plain_ms - 1 - guess.right
                self._allowance[bet.source] -= min(lost, _WORST)

    def _cost(self, source: Source) -> float:
        return self._extra.value + (self._drafting.value if source == "dash" else 0.0)

    def _rated(self, offer: Bet, tokens: int) -> tuple[float, Bet]:
        source, match = offer.source, offer.match
        believed = _BELIEVED[source]
        if source == "dash" and self.draft is not None:
            believed = self.draft.believed
        rate = self._outcomes.get((source, 0), _Outcomes()).rate(believed)
        if match:  # of all matches, until enough of this length were seen
            rate = self._outcomes.get((source, match), _Outcomes()).rate(rate)
        return speed(rate, tokens, self._cost(source)), offer._replace(tokens=tokens)


def _counts(offer: Bet) -> range:
    return range(1, offer.tokens + 1)


def planner_for(manifest: Manifest, path: Path, head: Action) -> Planner:
    """The planner of a target, with the draft that promises most tokens per profiled time.

    Candidates are the trained policy at its presets and the best static assignments, whose KL is
    known, and uniform precisions where nothing was trained.

    Args:
        manifest: of the bundle.
        path: of the target.
        head: precision of its LM head.
    """
    target_ms = manifest.costs.token_ms(path, head)
    drafts = [
        Draft(policy, ms / target_ms, believed)
        for policy, ms, believed in _candidates(manifest)
        if ms < target_ms
    ]
    return Planner(max(drafts, key=_promise, default=None))


def _promise(draft: Draft) -> float:
    return max(speed(draft.believed, n, draft.cost + _EXTRA) for n in range(1, MOST + 1))


def _candidates(manifest: Manifest) -> Iterator[tuple[Policy, float, float]]:
    """Policies, milliseconds of a token, and the share of tokens that is believed right."""
    scorer, full_ms = manifest.scorer, reference_ms(manifest)
    if scorer is None:
        for precision in (p for p in manifest.variants if p not in LOSSY):
            head = manifest.heads[precision]
            path = (precision,) * manifest.model.num_layers
            policy: Policy = StaticPolicy(path, manifest, name=precision, head=head)
            yield policy, manifest.costs.token_ms(path, head), _BELIEVED["dash"]
        return
    for budget in scorer.presets.values():
        kl = kl_at(budget, scorer.points)
        yield ScoredPolicy(manifest, budget), budget * full_ms, _right_at(kl)
    for point in scorer.static:
        policy = StaticPolicy(point.path, manifest, head=point.head)
        yield policy, point.budget * full_ms, _right_at(point.kl)


def _right_at(kl: float) -> float:
    """Share of guesses that is right at a KL in nats, within 0.02 where it was measured.

    A fit to answers of the demo model, not a bound.
    """
    return max(1 - max(kl, 0.0) ** 0.5 / 2, 0.05)  # a measured KL may be a little below zero
