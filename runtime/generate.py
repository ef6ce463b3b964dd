"""Generation: from a prompt to tokens, and from tokens to text."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

from dash_onnx.core.actions import Action, Path
from dash_onnx.core.arrays import Ids
from dash_onnx.core.errors import ContextLengthError, PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.core.text import Detokenizer, TextCodec
from dash_onnx.runtime.cache import Cache
from dash_onnx.runtime.deciders import decider_of
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.sampling import Sampler, Sampling
from dash_onnx.runtime.sessions import Sessions
from dash_onnx.runtime.speculate import Guess, Speculation

FinishReason = Literal["stop", "length", "context"]
"""`stop`: EOS or a stop string; `length`: max_new_tokens; `context`: the context is full."""


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token.

    Attributes:
        token: its id.
        path: the action of each layer in the pass that produced it.
        ms: wall time of that pass and the sampling, in milliseconds (the first: the prefill).
        finish_reason: set on the last token.
        guess: with `speculate`, what came of the guesses for the pass that this token is the first
            of; its milliseconds are shared by all tokens of the pass.
    """

    token: int
    path: Path
    ms: float
    finish_reason: FinishReason | None = None
    guess: Guess | None = None


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
    """

    text: str
    token: int
    path: Path
    ms: float
    prompt_tokens: int
    generated_tokens: int
    finish_reason: FinishReason | None = None
    guess: Guess | None = None


@dataclass
class CurrentPolicy:
    """The policy of a generation, which may change between its tokens.

    Attributes:
        policy: of the next token.
    """

    policy: Policy


def generate_tokens(
    sessions: Sessions,
    ids: Ids,
    current: CurrentPolicy,
    options: GenerationOptions,
    *,
    sampling: Sampling,
    eos: frozenset[int],
    draft: Policy | None = None,
) -> Iterator[GeneratedToken]:
    """Generates token by token; the first one comes from the prefill.

    Args:
        ids: the prompt, `[S]`.
        current: its policy; `options.policy` is not looked at.
        options: what else the user chose.
        sampling: resolved likewise.
        eos: ids that end the text.
        draft: whose path guesses, for `options.speculate`.

    Raises:
        ContextLengthError: the prompt does not fit the context.
        PolicyError: the prompt is empty, or the cache is in use.
    """
    manifest = sessions.manifest
    limit = manifest.model.max_length
    check_prompt(ids, limit, manifest.model.vocab_size)
    cache = Cache(sessions) if options.cache is None else options.cache
    sequence, rest = cache.acquire(ids)
    try:
        sampler, text = Sampler(sampling), [int(token) for token in ids]
        policy = current.policy
        decider = decider_of(policy, sequence)
        speculation = None
        if options.speculate != "off":
            speculation = Speculation(sequence, policy, sampler, options.speculate, draft)
        path, head = prefill_plan(sessions, policy, options.prefill)
        started, count, guess = time.perf_counter(), 0, None
        text.append(sampler(sequence.prefill(rest, path, head), text))
        cache.tokens += rest.tolist()
        new = text[-1:]
        while True:
            ms = (time.perf_counter() - started) * 1e3 / len(new)
            for left, token in zip(reversed(range(len(new))), new, strict=True):
                count += 1
                reason: FinishReason | None = None
                if token in eos and not options.ignore_eos:
                    reason = "stop"
                elif sequence.length - left >= limit:
                    reason = "context"
                elif count == options.max_new_tokens:
                    reason = "length"
                yield GeneratedToken(token, path, ms, reason, guess)
                guess = None
                if reason is not None:
                    return
            started = time.perf_counter()
            if speculation is not None:
                room = min(options.max_new_tokens - count, limit - sequence.length)
                token = text[-1]
                new, guess = speculation.step(text, room)
                cache.tokens += [token, *new[:-1]]
                path = speculation.path
                continue
            if current.policy is not policy:
                policy = current.policy
                decider = decider_of(policy, sequence)
            logits, path = sequence.forward(text[-1], decider)
            cache.tokens.append(text[-1])
            new = [sampler(logits, text)]
            text += new
    finally:
        cache.release()


def prefill_plan(
    sessions: Sessions, policy: Policy, precision: Action | None = None
) -> tuple[Path, Action]:
    """The path and the LM head of a prompt.

    Args:
        sessions: of the bundle.
        policy: of the tokens after it.
        precision: None takes the highest exported; where memory is low, the highest that the policy
            takes in each layer, so that the prompt loads no graph of its own.

    Raises:
        PolicyError: the precision was not exported.
    """
    manifest = sessions.manifest
    if precision is None and sessions.memory == "low":
        used = policy.used(manifest.model.num_layers, manifest.actions)
        highest = next(action for action in manifest.variants if any(action in u for u in used))
        path = tuple(next((a for a in manifest.variants if a in u), highest) for u in used)
        return path, policy.head
    chosen = manifest.variants[0] if precision is None else precision
    if chosen not in manifest.variants:
        raise PolicyError(
            f"prefill precision {chosen!r} is not in this bundle; "
            f"it has {', '.join(manifest.variants)}"
        )
    return (chosen,) * manifest.model.num_layers, manifest.heads[chosen]


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
    try:
        yield from _chunks(codec, steps, prompt_tokens, stop)
    finally:  # a stop string ends the text before the steps end
        if isinstance(steps, Generator):
            steps.close()


def _chunks(
    codec: TextCodec, steps: Iterator[GeneratedToken], prompt_tokens: int, stop: tuple[str, ...]
) -> Iterator[Chunk]:
    detokenizer = Detokenizer(codec)
    held = ""
    for count, step in enumerate(steps, 1):
        reason = step.finish_reason
        if reason != "stop":  # the EOS token itself is no text
            held += detokenizer.add(step.token)
        if reason is not None:
            held += detokenizer.finish()
        cut = min((at for at in (held.find(word) for word in stop) if at >= 0), default=-1)
        if cut >= 0:
            text, held, reason = held[:cut], "", "stop"
        elif reason is not None:
            text, held = held, ""
        else:
            safe = len(held) - _longest_partial(held, stop)
            text, held = held[:safe], held[safe:]
        told = step.token, step.path, step.ms, prompt_tokens, count, reason, step.guess
        yield Chunk(text, *told)
        if reason is not None:
            return


def _longest_partial(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = 0
    for word in stop:
        for size in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:size]):
                longest = size
                break
    return longest
