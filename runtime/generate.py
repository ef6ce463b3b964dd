"""A generation between its passes: what it runs next, what it draws, and when it ends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from dash_onnx.core.actions import LETTERS, SKIP, ActionPath, Form, path_letters
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.budget import Budget
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.forms import widened_in_prompts
from dash_onnx.core.policy import Policy
from dash_onnx.core.thoughts import Thoughts
from dash_onnx.runtime.deciders import Decider, decider_of
from dash_onnx.runtime.drafts import MAX_DRAFT_TOKENS, Draft, Drafter, DraftStats, Found
from dash_onnx.runtime.grammar import Constraint
from dash_onnx.runtime.options import GenerationOptions, LogitsProcessor
from dash_onnx.runtime.results import Chunk, FinishReason, GeneratedToken, Logprobs
from dash_onnx.runtime.sampling import Sampler, Sampling
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import PromptPlan, Sessions

Piece = TypeVar("Piece", Chunk, GeneratedToken)


@dataclass
class CurrentPolicy:
    """The policy of a generation, which may change between its tokens.

    Attributes:
        policy: policy of the next token.
        at: returns the policy at another budget.
        changed: whether tokens may have been written under another one than the first.
    """

    policy: Policy
    at: Callable[[Budget], Policy]
    changed: bool = False

    def set_budget(self, budget: Budget) -> None:
        """Changes the budget from the next token on; any thread may call it.

        Args:
            budget: a fraction of the time at the highest exported precision, or a preset.

        Raises:
            PolicyError: the policy takes no budget, or the bundle cannot meet this one.
            DeviceError: memory has no room for what it would load; the budget stays.
        """
        policy = self.at(budget)
        if not same_choices(policy, self.policy):
            self.changed = True
        self.policy = policy


def same_choices(a: Policy, b: Policy) -> bool:
    """Whether two policies choose alike, such as those of a budget that was set again."""
    return (a.cache_key, a.head) == (b.cache_key, b.head)


@dataclass(eq=False, kw_only=True)
class Request(Generic[Piece]):
    """A requested generation.

    Attributes:
        ids: the prompt `[S]`.
        current: its policy, which may change between tokens; that of the options is ignored.
        options: what else the user chose.
        sampling: the resolved sampling options.
        plan: how the prompt runs.
        eos: ids that end the text.
        stops: ids of stop strings that are control tokens, which are not text; as these, they end
            no thoughts.
        constraint: from `options.grammar`.
        thoughts: where the answer begins.
        stats_of: returns the draft statistics of a policy; None if it cannot draft.
        expected: ids of `options.expected`.
        write: turns a token into a piece.
        deliver: takes the pieces, and the error that ends the generation early; called by the
            thread that runs the scheduler.
        cancelled: may be set by any thread: the generation ends before its next token.
        first: the policy that it began with.
        cache_key: how its prompt runs, and its answer, which may be a part of the next prompt. If
            two are equal, one may use the other's K/V.
        reused: tokens of the prompt that did not run, because a slot or a store held their K/V; set
            when it begins.
    """

    ids: Ids
    current: CurrentPolicy
    options: GenerationOptions
    sampling: Sampling
    plan: PromptPlan
    eos: frozenset[int]
    stops: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    thoughts: Thoughts = field(default_factory=Thoughts)
    stats_of: Callable[[Policy], DraftStats | None] = lambda policy: None
    expected: Sequence[int] = ()
    write: Callable[[GeneratedToken], Piece]
    deliver: Callable[[Piece | Exception], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        path, head, widened, _ = self.plan
        self.first = self.current.policy
        later = "" if self.first.uniform == path else self.first.cache_key
        wide = "".join(sorted({LETTERS[action] for action in path if action in widened}))
        parts = path_letters(path), head, wide and f"wide:{wide}", later
        self.cache_key = " ".join(filter(None, parts))
        self.reused = 0


class Step(NamedTuple):
    """The result of a pass.

    Attributes:
        tokens: new tokens of the answer; the last one has not run yet.
        path: the path that they took.
        draft: outcome of its draft tokens.
    """

    tokens: list[int]
    path: ActionPath
    draft: Draft | None = None


class Generation:
    """One generation between its passes.

    Attributes:
        text: ids of the prompt and of what was drawn.
        count: tokens reported so far.
        forced: the only tokens that the grammar lets follow the text; they are not drawn.
        uniform: whether all tokens of its policy take one path.
        decider: chooses the actions of the next pass.
        stats: draft statistics of its policy; None if it does not draft.
    """

    uniform: bool
    decider: Decider
    stats: DraftStats | None

    def __init__(self, sequence: SequenceState, request: Request):
        """Begins with the prompt."""
        self.text: list[int] = request.ids.tolist()
        self.count = 0
        self._request, self._sequence = request, sequence
        self._options, self._constraint = request.options, request.constraint
        self._thoughts, self._limit = request.thoughts, sequence.sessions.manifest.model.max_length
        self._sampler = Sampler(request.sampling, len(request.ids))
        self._ends = frozenset[int]() if request.options.ignore_eos else request.eos
        # Of tokens that are not reported yet; whether they are thoughts.
        self._notes: deque[tuple[Logprobs | None, bool]] = deque()
        self._policy: Policy | None = None
        self.follow()
        self._drafter: Drafter | None = None
        self._found: Found | None = None  # what the next pass may verify
        self._drafts: list[int] = []  # those that it verifies
        self.forced = self._forced()

    def follow(self) -> None:
        """Adopts the current policy for the next pass, whatever is set meanwhile."""
        policy, last = self._request.current.policy, self._policy
        self._policy = policy
        # The same budget set again keeps the controller, which knows what the text has cost so far.
        if last is None or (policy is not last and not same_choices(policy, last)):
            self.uniform = policy.uniform is not None
            self.decider = decider_of(policy, self._sequence)
            self.stats = self._request.stats_of(policy)

    def move(self, sequence: SequenceState) -> None:
        """Continues in another sequence, which holds the same tokens."""
        self._sequence = sequence
        self.decider.move(sequence)

    @property
    def spare(self) -> int:
        """How many tokens may run after the last one, leaving one more to be drawn."""
        drawn = len(self.text) - len(self._request.ids)
        return min(self._options.max_new_tokens - drawn - 1, self._limit - len(self.text))

    def look_ahead(self, stats: DraftStats) -> list[float]:
        """Finds draft tokens; returns the tokens expected of a pass with 0, 1, 2, ... of them."""
        if self._drafter is None:
            prompt, expected = self._request.ids.tolist(), self._request.expected
            self._drafter = Drafter(prompt, expected, self._ends | self._request.stops)
        asked = self._options.speculate
        most = MAX_DRAFT_TOKENS if asked is None or asked is True else asked
        hint = self._constraint.hint() if self._constraint is not None and self._formed else []
        self._found, gains = self._drafter.find(stats, self.text, min(self.spare, most), hint)
        return gains

    def draft(self, most: int) -> list[int]:
        """The draft tokens of the next pass: at most `most` of those that were found."""
        found = self._found.tokens if self._found is not None else []
        self._drafts = found[: max(min(most, self.spare), 0)]
        return self._drafts

    def take(self, logits: Logits, path: ActionPath) -> Step:
        """Samples from a pass that ran all of the text, and draft tokens.

        Args:
            logits: after the text and after each of `draft`, `[S, V]`.
            path: the path that they took.

        Returns:
            What was not reported yet: forced tokens, and those drawn now.
        """
        untold = self.text[len(self._request.ids) + self.count :]
        new, drafts, self._drafts = list[int](), self._drafts, []
        for row, draft in zip(logits, [*drafts, None], strict=True):
            new.append(self.draw(row))
            last = new[-1] in self._ends or new[-1] in self._request.stops
            if new[-1] != draft or last or self.forced:
                break
        if not drafts or self._found is None:
            return Step(untold + new, path)
        accepted = sum(a == b for a, b in zip(new, drafts, strict=False))
        return Step(untold + new, path, Draft(self._found.source, len(drafts), accepted))

    def take_forced(self) -> list[int]:
        """Adds the forced tokens to the text, and returns them."""
        forced, self.forced = self.forced, []
        if self._constraint is not None and forced:
            self._constraint.took(*forced)
        self.text += forced
        self._notes += [(None, False)] * len(forced)
        return forced

    def _forced(self) -> list[int]:
        asked = self._options.logprobs is not None or self._options.logits_processor is not None
        if self._constraint is None or asked or not self._formed:
            return []  # these options need every token's logits
        return self._constraint.forced()[: self.spare] if self.spare > 0 else []

    @property
    def _formed(self) -> bool:
        """Whether the grammar, if there is one, applies to the next token."""
        thoughts = self._thoughts
        return not (thoughts.open or thoughts.due) and thoughts.opening is None

    def _processed(self, processor: LogitsProcessor, logits: Logits) -> Logits:
        """What a processor makes of logits `[V]`.

        Raises:
            PolicyError: no token can be drawn from that.
        """
        found, told = processor(self.text, logits), "logits_processor must return logits"
        if not isinstance(found, np.ndarray) or found.shape != logits.shape:
            what = getattr(found, "shape", type(found).__name__)
            raise PolicyError(f"{told} of shape {logits.shape}, not {what}")
        if not np.issubdtype(found.dtype, np.floating):
            raise PolicyError(f"{told} in floating point, not {found.dtype}")
        if not (largest := np.max(found)) > -np.inf:
            raise PolicyError(f"{told} of which one is above -inf, and none is NaN")
        if largest == np.inf:  # only these
            return np.where(found == np.inf, 0, -np.inf).astype(found.dtype)
        return found

    def draw(self, logits: Logits) -> int:
        """Draws the next token from logits `[V]`."""
        raw = logits
        processor = self._options.logits_processor
        if processor is not None:
            logits = self._processed(processor, logits)
        if self._thoughts.due:
            token = self._thoughts.due[0]
        else:
            logits = self._masked(logits)
            if processor is not None and np.max(logits) == -np.inf:
                raise PolicyError("no token is left by both the grammar and the logits_processor")
            token = self._sampler(logits, self.text)
        most = self._options.logprobs
        told = None if most is None else Logprobs.of(raw, token, most)
        thinking = self._thoughts.took(token)
        self._notes.append((told, thinking))
        self.text.append(token)
        if self._constraint is not None:
            if not thinking:
                self._constraint.took(token)
            self.forced = self._forced()
        return token

    def _masked(self, logits: Logits) -> Logits:
        """What the grammar allows. It applies to the answer: thoughts are free, but must end."""
        if self._constraint is None:
            return logits
        if not self._thoughts.open:
            return self._constraint.masked(logits, self._thoughts.opening)
        masked = logits.copy()
        masked[[*self._request.eos]] = -np.inf
        return masked

    def told(self, step: Step, ms: float) -> Iterator[GeneratedToken]:
        """The results for the tokens of a pass, which share its milliseconds.

        The prompt's milliseconds count for the first token, whatever is forced to follow it.
        """
        count, draft = len(step.tokens), step.draft
        shares = [ms / count] * count if self.count else [ms, *[0.0] * (count - 1)]
        for n, (token, own) in enumerate(zip(step.tokens, shares, strict=True)):
            yield self._told(token, step.path, own, count - 1 - n, draft)
            draft = None

    def _told(
        self, token: int, path: ActionPath, ms: float, ahead: int, draft: Draft | None
    ) -> GeneratedToken:
        """The result for one token, with `ahead` tokens of the same pass after it."""
        self.count += 1
        reason: FinishReason | None = None
        logprobs, thinking = self._notes.popleft()
        if token in self._ends or (token in self._request.stops and not thinking):
            reason = "stop"
        elif self._sequence.length - ahead >= self._limit:
            reason = "context"
        elif self.count == self._options.max_new_tokens:
            reason = "length"
        return GeneratedToken(token, path, ms, reason, draft, logprobs, thinking)


def prefill_plan(sessions: Sessions, policy: Policy, precision: Form | None = None) -> PromptPlan:
    """How a prompt runs.

    Args:
        sessions: sessions of the bundle.
        policy: policy of the tokens after it.
        precision: None takes the policy's path if that is the same for all tokens, else its highest
            precision, and the wide form where that is good enough and memory allows it; `wide`
            takes the same path, and the wide form wherever it is faster.

    Raises:
        PolicyError: the precision was not exported, or the wide form is not loaded.
    """
    manifest = sessions.manifest
    layers = manifest.model.num_layers
    groups = policy.groups(layers)
    if precision == "wide" and not sessions.widened:
        raise PolicyError("this bundle has no wide form, or memory='low' leaves it out")
    if precision is None or precision == "wide":
        used = policy.used(layers, manifest.actions)
        highest = next(action for action in manifest.variants if any(action in u for u in used))
        path = policy.uniform or (highest,) * layers
        path = tuple(highest if action == SKIP else action for action in path)
        if precision == "wide":
            widened = frozenset(manifest.variants)
        else:
            widened = sessions.widened and widened_in_prompts(manifest, policy)
        return PromptPlan(path, policy.head, widened, groups)
    if precision not in manifest.variants:
        raise PolicyError(
            f"prefill precision {precision!r} is not in this bundle; "
            f"it has {', '.join(manifest.variants)}{', and wide' if sessions.widened else ''}"
        )
    path, head = (precision,) * layers, manifest.heads[precision]
    return PromptPlan(path, head, frozenset(), groups)


def forced_plan(sessions: Sessions, policy: Policy, precision: Form | None = None) -> PromptPlan:
    """How tokens run that a grammar forces, without draft tokens: as beside them, if they may be.

    Args:
        sessions: sessions of the bundle.
        policy: policy of the answer.
        precision: see `prefill_plan`, for a policy that decides for each token.
    """
    if policy.uniform is None:
        return prefill_plan(sessions, policy, precision)
    groups = policy.groups(sessions.manifest.model.num_layers)
    return PromptPlan(policy.uniform, policy.head, sessions.widened, groups)
