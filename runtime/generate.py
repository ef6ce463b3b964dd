"""Generation: from a prompt to tokens, and from tokens to text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from dash_onnx.core.actions import Action, Path, path_letters
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.budget import Budget
from dash_onnx.core.errors import ContextLengthError, PolicyError
from dash_onnx.core.forms import widened_in_prompts
from dash_onnx.core.policy import Policy
from dash_onnx.core.statistics import log_softmax
from dash_onnx.runtime.cache import Cache
from dash_onnx.runtime.deciders import Decider, decider_of
from dash_onnx.runtime.grammar import Constraint
from dash_onnx.runtime.guesses import MOST, Guess, Guesser, Learned
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.sampling import Sampler, Sampling
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import PromptPlan, Sessions

FinishReason = Literal["stop", "length", "context"]
"""`stop`: EOS or a stop string; `length`: max_new_tokens; `context`: the context is full."""


class Logprobs(NamedTuple):
    """Log probabilities at one token, in nats, before temperature, filters and grammar.

    Attributes:
        token: of the one that was drawn.
        top: ids of the likeliest, with theirs.
    """

    token: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: Logits, token: int, most: int) -> Logprobs:
        """From logits `[V]`."""
        logs = log_softmax(logits.astype(np.float32))
        likeliest = np.argpartition(-logs, most)[:most]
        ordered = likeliest[np.argsort(-logs[likeliest], kind="stable")]
        top = tuple((int(one), float(logs[one])) for one in ordered)
        return cls(float(logs[token]), top)


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token.

    Attributes:
        token: its id.
        path: the action of each layer in the pass that produced it.
        ms: wall time of that pass and the sampling, in milliseconds (the first: the prefill).
        finish_reason: set on the last token.
        guess: what came of the guesses for the pass that this token is the first of; its
            milliseconds are shared by all tokens of the pass.
        logprobs: where they were asked for.
    """

    token: int
    path: Path
    ms: float
    finish_reason: FinishReason | None = None
    guess: Guess | None = None
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of generated text.

    Attributes:
        text: may be empty while a character or a stop string is incomplete.
        token: id of the token that completed it.
        path: the action of each layer for that token.
        ms: wall time of that token in milliseconds.
        prompt_tokens: length of the prompt.
        generated_tokens: how many tokens were generated so far.
        finish_reason: set on the last chunk.
        guess: see `GeneratedToken`.
        logprobs: likewise.
    """

    text: str
    token: int
    path: Path
    ms: float
    prompt_tokens: int
    generated_tokens: int
    finish_reason: FinishReason | None = None
    guess: Guess | None = None
    logprobs: Logprobs | None = None

    def __repr__(self) -> str:
        end = f", {self.finish_reason}" if self.finish_reason else ""
        path = path_letters(self.path)
        return f"<Chunk {self.text!r}: token {self.token}, {self.ms:.1f} ms, {path}{end}>"


@dataclass
class CurrentPolicy:
    """The policy of a generation, which may change between its tokens.

    Attributes:
        policy: of the next token.
        at: that of another budget.
    """

    policy: Policy
    at: Callable[[Budget], Policy]

    def set_budget(self, budget: Budget) -> None:
        """Spends another budget from the next token on; any thread may call it.

        Args:
            budget: a fraction of the time at the highest exported precision, or a preset.

        Raises:
            PolicyError: the policy takes no budget, or the bundle cannot meet this one.
        """
        self.policy = self.at(budget)


class Step(NamedTuple):
    """What a pass brought.

    Attributes:
        tokens: new ones of the answer; the last one was not run yet.
        path: that they took.
        guess: what came of guesses.
    """

    tokens: list[int]
    path: Path
    guess: Guess | None = None


Learn = Callable[[Policy], Learned | None]
"""What was learned of guesses for a policy; None where nothing is guessed."""


class Generation:
    """One generation between its passes: its text, what it runs next, and when it ends.

    Attributes:
        text: ids of the prompt and of what was drawn.
        count: tokens that were told.
        forced: tokens that the grammar lets follow the text alone; they run as a prompt does.
    """

    def __init__(
        self,
        sequence: SequenceState,
        ids: Ids,
        current: CurrentPolicy,
        options: GenerationOptions,
        *,
        sampling: Sampling,
        eos: frozenset[int],
        constraint: Constraint | None = None,
        learn: Learn = lambda policy: None,
        expected: Sequence[int] = (),
    ):
        """Begins with the prompt `ids` `[S]`; the rest is that of `generate_tokens`."""
        self.text: list[int] = ids.tolist()
        self.count = 0
        self._prompt, self._learn, self._expected = ids, learn, expected
        self._guesser: Guesser | None = None
        self._sampler, self._constraint = Sampler(sampling), constraint
        self._logprobs: deque[Logprobs | None] = deque()  # of tokens that are not told yet
        self._sequence, self._current, self._options = sequence, current, options
        self._ends = frozenset[int]() if options.ignore_eos else eos
        self._policy = current.policy
        self._decider = decider_of(self._policy, sequence)
        self.forced = self._forced()

    @property
    def decider(self) -> Decider:
        """What chooses the actions of the next token."""
        if self._current.policy is not self._policy:
            self._policy = self._current.policy
            self._decider = decider_of(self._policy, self._sequence)
        return self._decider

    @property
    def spare(self) -> int:
        """How many tokens may run after the last one, with one more to be drawn."""
        limit = self._sequence.sessions.manifest.model.max_length
        drawn = len(self.text) - len(self._prompt)
        return min(self._options.max_new_tokens - drawn - 1, limit - len(self.text))

    def step(self) -> Step:
        """Runs the last token, and what is forced or guessed to follow it."""
        sequence, last = self._sequence, self.text[-1]
        if self.forced:
            plan = prefill_plan(sequence.sessions, self._current.policy, self._options.prefill)
            forced = self.take_forced()
            logits = sequence.prefill(np.array([last, *forced], np.int64), *plan)
            return Step([*forced, self.draw(logits)], plan.path)
        decider, context = self.decider, sequence.length
        learned = self._learn(self._policy)
        found = None
        if learned is not None:
            if self._guesser is None:
                self._guesser = Guesser(self._prompt.tolist(), self._expected, self._ends)
            found = self._guesser.guess(learned, self.text, min(self.spare, MOST), context)
        guesses = found.tokens if found else []
        new = list[int]()
        ids = np.array([last, *guesses], np.int64) if guesses else last
        logits, path = sequence.forward(ids, decider, every=True)
        for row, guess in zip(logits, [*guesses, None], strict=True):
            new.append(self.draw(row))
            if new[-1] != guess or new[-1] in self._ends or self.forced:
                break
        held = sequence.truncate(context + len(new))
        if held < context + len(new):  # states cannot forget the wrong guesses alone
            sequence.layers(np.array([last, *new[:-1]], np.int64)[held - context :], decider)
        if found is None:
            return Step(new, path)
        right = sum(a == b for a, b in zip(new, guesses, strict=False))
        return Step(new, path, Guess(found.source, len(guesses), right))

    def take_forced(self) -> list[int]:
        """The forced tokens, which are in the text from now on."""
        forced, self.forced = self.forced, []
        assert self._constraint is not None or not forced
        if self._constraint is not None and forced:
            self._constraint.took(*forced)
        self.text += forced
        self._logprobs += [None] * len(forced)
        return forced

    def _forced(self) -> list[int]:
        if self._constraint is None or self._options.logprobs is not None:
            return []  # log probabilities need every token's logits
        return self._constraint.forced()[: self.spare] if self.spare > 0 else []

    def draw(self, logits: Logits) -> int:
        """Draws the next token from logits `[V]`."""
        raw = logits
        if self._constraint is not None:
            logits = self._constraint.masked(logits)
        token = self._sampler(logits, self.text)
        most = self._options.logprobs
        self._logprobs.append(None if most is None else Logprobs.of(raw, token, most))
        self.text.append(token)
        if self._constraint is not None:
            self._constraint.took(token)
            self.forced = self._forced()
        return token

    def told(self, step: Step, ms: float) -> Iterator[GeneratedToken]:
        """What is told of the tokens of a pass, which share its milliseconds.

        The prompt's are those of the first token, whatever is forced to follow it.
        """
        count, guess = len(step.tokens), step.guess
        shares = [ms / count] * count if self.count else [ms, *[0.0] * (count - 1)]
        for n, (token, own) in enumerate(zip(step.tokens, shares, strict=True)):
            yield self._told(token, step.path, own, count - 1 - n, guess)
            guess = None

    def _told(
        self, token: int, path: Path, ms: float, ahead: int, guess: Guess | None
    ) -> GeneratedToken:
        """Likewise of one, with tokens after it that the sequence has run already."""
        self.count += 1
        reason: FinishReason | None = None
        if token in self._ends:
            reason = "stop"
        elif self._sequence.length - ahead >= self._sequence.sessions.manifest.model.max_length:
            reason = "context"
        elif self.count == self._options.max_new_tokens:
            reason = "length"
        return GeneratedToken(token, path, ms, reason, guess, self._logprobs.popleft())


def generate_tokens(
    sessions: Sessions,
    ids: Ids,
    current: CurrentPolicy,
    options: GenerationOptions,
    *,
    sampling: Sampling,
    eos: frozenset[int],
    constraint: Constraint | None = None,
    learn: Learn = lambda policy: None,
    expected: Sequence[int] = (),
) -> Iterator[GeneratedToken]:
    """Generates token by token; the first one comes from the prefill.

    Args:
        ids: the prompt, `[S]`.
        current: its policy; `options.policy` is not looked at.
        options: what else the user chose.
        sampling: resolved likewise.
        eos: ids that end the text.
        constraint: of `options.grammar`.
        learn: see `Learn`.
        expected: ids of `options.expected`.

    Raises:
        ContextLengthError: the prompt does not fit the context.
        PolicyError: the prompt is empty.
        DashError: the cache is in use.
    """
    facts = sessions.manifest.model
    check_prompt(ids, facts.max_length, facts.vocab_size)
    cache = Cache(sessions) if options.cache is None else options.cache
    sequence, rest = cache.acquire(ids)
    try:
        going = Generation(
            sequence,
            ids,
            current,
            options,
            sampling=sampling,
            eos=eos,
            constraint=constraint,
            learn=learn,
            expected=expected,
        )
        plan = prefill_plan(sessions, current.policy, options.prefill)
        started, forced = time.perf_counter(), going.take_forced()
        rest = np.concatenate([rest, np.array(forced, np.int64)])
        step = Step([*forced, going.draw(sequence.prefill(rest, *plan))], plan.path)
        cache.tokens += rest.tolist()
        while True:
            ms = (time.perf_counter() - started) * 1e3
            for told in going.told(step, ms):
                yield told
                if told.finish_reason is not None:
                    return
            started, token = time.perf_counter(), going.text[-1]
            step = going.step()
            cache.tokens += [token, *step.tokens[:-1]]
    finally:
        cache.release()


def prefill_plan(sessions: Sessions, policy: Policy, precision: Action | None = None) -> PromptPlan:
    """How a prompt runs.

    Args:
        sessions: of the bundle.
        policy: of the tokens after it.
        precision: None takes the highest that the policy takes in each layer, and the wide form
            where that is good enough and memory allows it.

    Raises:
        PolicyError: the precision was not exported.
    """
    manifest = sessions.manifest
    if precision is None:
        used = policy.used(manifest.model.num_layers, manifest.actions)
        highest = next(action for action in manifest.variants if any(action in u for u in used))
        path = tuple(next((a for a in manifest.variants if a in u), highest) for u in used)
        widened = sessions.widened and widened_in_prompts(manifest, policy)
        return PromptPlan(path, policy.head, widened, policy.uniform is not None)
    if precision not in manifest.variants:
        raise PolicyError(
            f"prefill precision {precision!r} is not in this bundle; "
            f"it has {', '.join(manifest.variants)}"
        )
    path, head = (precision,) * manifest.model.num_layers, manifest.heads[precision]
    return PromptPlan(path, head, joined=policy.uniform is not None)


def check_prompt(ids: Ids, max_length: int, vocab_size: int) -> None:
    """Refuses a prompt that cannot run.

    Raises:
        ContextLengthError: longer than the context.
        PolicyError: empty, not one-dimensional, or with ids outside the vocabulary.
    """
    if ids.ndim != 1 or len(ids) == 0:
        shape = "empty" if ids.size == 0 else f"of shape {ids.shape}"
        raise PolicyError(f"the prompt is {shape}; it must be a non-empty list of token ids")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise PolicyError(
            f"token ids must be in 0..{vocab_size - 1}; found {int(ids.min())}..{int(ids.max())}"
        )
    if len(ids) > max_length:
        raise ContextLengthError(
            f"the prompt has {len(ids)} tokens, the context of this bundle is {max_length}; "
            "shorten it, or export with a longer --max-length"
        )
