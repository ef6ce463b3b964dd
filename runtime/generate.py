"""Generation: from a prompt to tokens, and from tokens to text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
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
from dash_onnx.core.text import Detokenizer, TextCodec
from dash_onnx.runtime.cache import Cache
from dash_onnx.runtime.deciders import Decider, decider_of
from dash_onnx.runtime.grammar import Constraint
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.planner import Guess, Planner
from dash_onnx.runtime.sampling import Sampler, Sampling
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import PromptPlan, Sessions
from dash_onnx.runtime.speculate import Speculation

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
        guess: with `speculate`, the outcome of the draft of the pass that begins with this token;
            all tokens of the pass share its milliseconds.
        logprobs: if requested.
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


class Generation:
    """One generation between its passes: its text, what it runs next, and when it ends.

    Attributes:
        text: ids of the prompt and of what was drawn.
        count: tokens that were told.
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
    ):
        """Begins with the prompt `ids` `[S]`; the rest is that of `generate_tokens`."""
        self.text: list[int] = ids.tolist()
        self.count = 0
        self._sampler, self._constraint = Sampler(sampling), constraint
        self._logprobs: deque[Logprobs | None] = deque()  # of tokens that are not told yet
        self._sequence, self._current, self._options, self._eos = sequence, current, options, eos
        self._policy = current.policy
        self._decider = decider_of(self._policy, sequence)

    @property
    def decider(self) -> Decider:
        """What chooses the actions of the next token."""
        if self._current.policy is not self._policy:
            self._policy = self._current.policy
            self._decider = decider_of(self._policy, self._sequence)
        return self._decider

    @property
    def room(self) -> int:
        """How many further tokens there may be."""
        limit = self._sequence.sessions.manifest.model.max_length
        return min(self._options.max_new_tokens - self.count, limit - self._sequence.length)

    def draw(self, logits: Logits) -> int:
        """Draws the next token from logits `[V]`."""
        raw = logits
        if self._constraint is not None:
            logits = self._constraint.masked(logits)
        token = self._sampler(logits, self.text)
        if self._constraint is not None:
            self._constraint.took(token)
        most = self._options.logprobs
        self._logprobs.append(None if most is None else Logprobs.of(raw, token, most))
        self.text.append(token)
        return token

    def tell(
        self, token: int, path: Path, ms: float, *, ahead: int = 0, guess: Guess | None = None
    ) -> GeneratedToken:
        """What is told of a token that was drawn.

        Args:
            token: drawn.
            path: of its pass.
            ms: see `GeneratedToken`.
            ahead: later tokens that the sequence has run already.
            guess: see `GeneratedToken`.
        """
        self.count += 1
        reason: FinishReason | None = None
        if token in self._eos and not self._options.ignore_eos:
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
    planner: Planner | None = None,
) -> Iterator[GeneratedToken]:
    """Generates token by token; the first one comes from the prefill.

    Args:
        ids: the prompt, `[S]`.
        current: its policy; `options.policy` is not looked at.
        options: what else the user chose.
        sampling: resolved likewise.
        eos: ids that end the text.
        constraint: of `options.grammar`.
        planner: of the policy, for `options.speculate`.

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
            sequence, ids, current, options, sampling=sampling, eos=eos, constraint=constraint
        )
        text, speculation = going.text, None
        if options.speculate != "off":
            speculation = Speculation(
                sequence,
                current.policy,
                going.draw,
                options.speculate,
                planner or Planner(),
                frozenset() if options.ignore_eos else eos,
            )
        plan = prefill_plan(sessions, current.policy, options.prefill)
        path = plan.path
        started, guess = time.perf_counter(), None
        new = [going.draw(sequence.prefill(rest, *plan))]
        cache.tokens += rest.tolist()
        while True:
            ms = (time.perf_counter() - started) * 1e3 / len(new)
            for ahead, token in zip(reversed(range(len(new))), new, strict=True):
                told = going.tell(token, path, ms, ahead=ahead, guess=guess)
                yield told
                guess = None
                if told.finish_reason is not None:
                    return
            started, token = time.perf_counter(), text[-1]
            if speculation is not None:
                new, guess = speculation.step(text, going.room)
                cache.tokens += [token, *new[:-1]]
                path = speculation.path
            else:
                logits, path = sequence.forward(token, going.decider)
                cache.tokens.append(token)
                new = [going.draw(logits)]
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


def text_of(
    codec: TextCodec, steps: Iterator[GeneratedToken], prompt_tokens: int, stop: tuple[str, ...]
) -> Generator[Chunk]:
    """Turns tokens into text; holds back what may become a stop string."""
    writer = TextWriter(codec, prompt_tokens, stop)
    try:
        for step in steps:
            chunk = writer.add(step)
            yield chunk
            if chunk.finish_reason is not None:
                return
    finally:  # a stop string ends the text before the steps end
        if isinstance(steps, Generator):
            steps.close()


class TextWriter:
    """Turns the tokens of one generation into chunks of text."""

    def __init__(self, codec: TextCodec, prompt_tokens: int, stop: Sequence[str]):
        """Begins; holds back what may become one of the stop strings."""
        self._detokenizer, self._prompt_tokens = Detokenizer(codec), prompt_tokens
        self._stop, self._held, self._count = stop, "", 0

    def add(self, step: GeneratedToken) -> Chunk:
        """The chunk of a token; one with a finish reason is the last."""
        self._count += 1
        reason, held = step.finish_reason, self._held
        if reason != "stop":  # the EOS token itself is no text
            held += self._detokenizer.add(step.token)
        if reason is not None:
            held += self._detokenizer.finish()
        cut = min((at for at in (held.find(word) for word in self._stop) if at >= 0), default=-1)
        if cut >= 0:
            text, held, reason = held[:cut], "", "stop"
        elif reason is not None:
            text, held = held, ""
        else:
            safe = len(held) - _longest_partial(held, self._stop)
            text, held = held[:safe], held[safe:]
        self._held = held
        told = step.token, step.path, step.ms, self._prompt_tokens, self._count, reason
        return Chunk(text, *told, step.guess, step.logprobs)


def _longest_partial(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = 0
    for word in stop:
        for size in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:size]):
                longest = size
                break
    return longest
