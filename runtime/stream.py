"""A running generation, the text of a finished one, and methods that return them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

from dash_onnx.core.actions import Action
from dash_onnx.core.budget import Budget
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.generate import CurrentPolicy
from dash_onnx.runtime.results import Chunk, FinishReason, Logprobs

M = TypeVar("M")
P = ParamSpec("P")


class Stream(Iterator[Chunk]):
    """The chunks of a generation, one for each token.

    One thread iterates; any thread can call `close` and `set_budget`. It is also a context manager
    that closes the stream.
    """

    def __init__(self, chunks: Generator[Chunk], current: CurrentPolicy):
        """Takes what `Model.stream` made."""
        self._chunks, self._current = chunks, current
        self._running = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Stream: {'closed' if self._closed else self.policy.name}>"

    def __next__(self) -> Chunk:
        with self._running:
            chunk = None if self._closed else next(self._chunks, None)
            if self._closed:  # perhaps closed meanwhile
                self._chunks.close()
                chunk = None
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Ends the generation and frees its cache, after the token in progress at the latest."""
        self._closed = True
        if self._running.acquire(blocking=False):
            try:
                self._chunks.close()
            finally:
                self._running.release()

    @property
    def policy(self) -> Policy:
        """The policy of the next token."""
        return self._current.policy

    def set_budget(self, budget: Budget) -> None:
        """Changes the budget from the next token on.

        Args:
            budget: a fraction of the time of the highest exported precision, or a preset.

        Raises:
            PolicyError: the generation's policy has no budget, or not this one.
            DeviceError: memory has no room for what it would load; the budget stays.
        """
        self._current.set_budget(budget)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def begun(chunks: Generator[Chunk]) -> Generator[Chunk]:
    """The same chunks, the first one already computed: errors surface now, not at first use."""
    return _continued(next(chunks), chunks)


def _continued(first: Chunk, rest: Generator[Chunk]) -> Generator[Chunk]:
    try:
        yield first
        yield from rest
    finally:
        rest.close()


class Completion(str):
    """The text of a generation: a `str` with facts about the generation.

    Attributes:
        reasoning: text of the thoughts before it, without their tags.
        finish_reason: why it ended.
        prompt_tokens: length of the prompt.
        generated_tokens: how many tokens were generated.
        draft_tokens: how many draft tokens were verified.
        accepted_tokens: how many of these were accepted.
        ms: wall time of each generated token in milliseconds; the first includes the prompt.
        actions: share of each action in the layers of all tokens except the first, which comes from
            the prefill.
        logprobs: those of each token, if requested.
    """

    reasoning: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    generated_tokens: int
    draft_tokens: int
    accepted_tokens: int
    ms: tuple[float, ...]
    actions: dict[Action, float]
    logprobs: tuple[Logprobs, ...]

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Completion:
        """The text of all chunks, of which there is at least one."""
        chunks = [*chunks]
        completion = cls("".join(chunk.text for chunk in chunks))
        completion.reasoning = "".join(chunk.reasoning for chunk in chunks)
        counts = Counter(action for chunk in chunks[1:] for action in chunk.path)
        completion.finish_reason = chunks[-1].finish_reason
        completion.prompt_tokens = chunks[-1].prompt_tokens
        completion.generated_tokens = chunks[-1].generated_tokens
        drafts = [chunk.draft for chunk in chunks if chunk.draft is not None]
        completion.draft_tokens = sum(draft.tokens for draft in drafts)
        completion.accepted_tokens = sum(draft.accepted for draft in drafts)
        completion.ms = tuple(chunk.ms for chunk in chunks)
        completion.actions = {action: n / counts.total() for action, n in sorted(counts.items())}
        completion.logprobs = tuple(chunk.logprobs for chunk in chunks if chunk.logprobs)
        return completion


def joined(
    name: str,
    told: str,
    stream: Callable[Concatenate[M, P], Stream],
    prepare: Callable[[Any], Any] = lambda prompt: prompt,
) -> Callable[Concatenate[M, P], Completion]:
    """A method that takes what `stream` takes and returns the text of all chunks.

    Args:
        name: name of the method.
        told: first line of its docstring; the rest is that of `stream`.
        stream: yields the chunks.
        prepare: applied to the prompt.
    """
    signature = inspect.signature(stream)

    @functools.wraps(stream)
    def joined(model: M, /, *args: P.args, **options: P.kwargs) -> Completion:
        bound = signature.bind(model, *args, **options)
        bound.arguments["prompt"] = prepare(bound.arguments["prompt"])
        return Completion.of(stream(*bound.args, **bound.kwargs))

    what = "the text, a `str` with `finish_reason`, counts, times and actions"
    return _named(joined, name, told, "Completion", what)


def asynchronous(
    name: str, told: str, stream: Callable[Concatenate[M, P], Stream]
) -> Callable[Concatenate[M, P], AsyncIterator[Chunk]]:
    """A method that takes what `stream` takes and leaves the event loop free."""

    @functools.wraps(stream)
    async def asynchronous(model: M, /, *args: P.args, **options: P.kwargs) -> AsyncIterator[Chunk]:
        chunks = await asyncio.to_thread(stream, model, *args, **options)
        try:
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk
        finally:
            chunks.close()

    return _named(asynchronous, name, told, "AsyncIterator[Chunk]", "pieces of text")


def _named(
    method: Callable[..., Any], name: str, told: str, returns: str, what: str
) -> Callable[..., Any]:
    """Gives a method the parameters of the one that it wraps, and their description."""
    signature = inspect.signature(method).replace(return_annotation=returns)
    method.__name__, method.__signature__ = name, signature  # type: ignore[attr-defined]
    _, _, rest = (method.__doc__ or "").partition("\n\n")
    given, raises, errors = rest.partition("        Raises:")
    given += f"        Returns:\n            {returns}: {what}.\n\n"
    method.__doc__ = f"{told}\n\n{given}{raises}{errors}"
    return method
