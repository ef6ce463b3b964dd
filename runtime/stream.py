"""A running generation, and the text of a finished one."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial

from dash_onnx.core.actions import Action
from dash_onnx.core.budget import Budget
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.generate import Request
from dash_onnx.runtime.results import Chunk, FinishReason, Logprobs
from dash_onnx.runtime.scheduler import Scheduler


class Stream(Iterator[Chunk]):
    """The chunks of a generation, one for each token; the first one runs the prompt.

    One thread iterates; any thread can call `close` and `set_budget`. It is also a context manager
    that closes the stream.
    """

    def __init__(self, chunks: Generator[Chunk], request: Request[Chunk]):
        """Takes the chunks of a request, of which none has run."""
        self._chunks, self._request = chunks, request
        self._running = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Stream: {'closed' if self._closed else self.policy.name}>"

    def __next__(self) -> Chunk:
        with self._running:
            chunk = None if self._closed else next(self._chunks, None)
        if self._closed:  # perhaps meanwhile, by a thread that could not wait
            self.join()
            chunk = None
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Ends the generation and frees its cache, after the pass in progress at the latest."""
        self._closed = True
        self._request.cancelled.set()
        if self._running.acquire(blocking=False):
            try:
                self._chunks.close()
            finally:
                self._running.release()

    def join(self) -> None:
        """Waits until no pass is in progress; after `close`, its cache is free then."""
        with self._running:
            if self._closed:
                self._chunks.close()

    @property
    def policy(self) -> Policy:
        """The policy of the next token."""
        return self._request.current.policy

    def set_budget(self, budget: Budget) -> None:
        """Changes the budget from the next token on.

        Args:
            budget: a fraction of the time of the highest exported precision, or a preset.

        Raises:
            PolicyError: the generation's policy has no budget, or not this one.
            DeviceError: memory has no room for what it would load; the budget stays.
        """
        self._request.current.set_budget(budget)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
        """The text of all chunks; a stream that was closed during its prompt has none."""
        chunks = [*chunks]
        last = chunks[-1] if chunks else None
        completion = cls("".join(chunk.text for chunk in chunks))
        completion.reasoning = "".join(chunk.reasoning for chunk in chunks)
        counts = Counter(action for chunk in chunks[1:] for action in chunk.path)
        completion.finish_reason = last.finish_reason if last else None
        completion.prompt_tokens = last.prompt_tokens if last else 0
        completion.generated_tokens = last.generated_tokens if last else 0
        drafts = [chunk.draft for chunk in chunks if chunk.draft is not None]
        completion.draft_tokens = sum(draft.tokens for draft in drafts)
        completion.accepted_tokens = sum(draft.accepted for draft in drafts)
        completion.ms = tuple(chunk.ms for chunk in chunks)
        completion.actions = {action: n / counts.total() for action, n in sorted(counts.items())}
        completion.logprobs = tuple(chunk.logprobs for chunk in chunks if chunk.logprobs)
        return completion


def completions(
    scheduler: Scheduler,
    requests: Sequence[Request[Chunk]],
    on_done: Callable[[int, Completion], None],
) -> list[Completion]:
    """Runs requests together; returns their texts, in their order.

    Args:
        scheduler: runs nothing else.
        requests: whose pieces go into the texts, and are not delivered.
        on_done: called with the index and the text of each as it ends.
    """
    chunks: list[list[Chunk]] = [[] for _ in requests]
    pieces = deque[tuple[int, Chunk | Exception]]()
    for index, request in enumerate(requests):
        request.deliver = partial(lambda n, piece: pieces.append((n, piece)), index)
        scheduler.submit(request)
    while scheduler.step():
        while pieces:
            index, piece = pieces.popleft()
            if isinstance(piece, Exception):
                raise piece
            chunks[index].append(piece)
            if piece.finish_reason is not None:
                on_done(index, Completion.of(chunks[index]))
    return [Completion.of(one) for one in chunks]
