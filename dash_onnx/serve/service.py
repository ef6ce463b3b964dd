"""Runs requests on loaded bundles: queueing, budgets and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector
from prometheus_client import Counter as Metric

from dash_onnx.core.actions import ACTIONS, Action, ActionPath, path_letters
from dash_onnx.core.arrays import Ids
from dash_onnx.core.budget import reference_ms
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.core.text import TextCodec
from dash_onnx.runtime.generate import Request
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.results import Chunk
from dash_onnx.serve.limits import BusyError, Limits
from dash_onnx.serve.pool import ModelPool, ServedModel, Source
from dash_onnx.serve.running import Deliver, until_done

_PATHS = 1 << 10  # cached, as most tokens take one of a few
_letters = lru_cache(_PATHS)(path_letters)


class Metrics:
    """The metrics shown by /metrics."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.registry = CollectorRegistry()
        latency = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
        given: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**given)  # memory, time, open files
        self.requests = Metric("dash_requests", "by outcome", ["outcome"], **given)
        tokens = Metric("dash_tokens", "prompt and generated", ["kind"], **given)
        self.prompted, self.generated = tokens.labels("prompt"), tokens.labels("generated")
        actions = Metric("dash_actions", "decisions by action", ["action"], **given)
        self.by_action = {action: actions.labels(action) for action in ACTIONS}
        self.drafts = Metric("dash_draft_tokens", "draft tokens, by outcome", ["outcome"], **given)
        self.reused = Gauge("dash_prompt_tokens_reused", "from a slot or a prefix", **given)
        self.loaded = Gauge("dash_loaded_bundles", "in memory", **given)
        self.running = Gauge("dash_running", "generations", **given)
        self.waiting = Gauge("dash_waiting", "requests in the queue", **given)
        self.first = Histogram(
            "dash_first_token_seconds", "with the wait", buckets=latency, **given
        )
        self.between = Histogram(
            "dash_between_tokens_seconds", "of one answer", buckets=latency, **given
        )


@dataclass
class Tally:
    """Token counts and costs of one choice of an answer so far."""

    finish_reason: str = "stop"
    prompt_tokens: int = 0
    reused_tokens: int = 0  # part of `prompt_tokens`
    generated_tokens: int = 0
    thinking_tokens: int = 0  # part of `generated_tokens`
    cost: float = 0.0  # sum over tokens, as fractions of the reference's time
    last: float = 0.0  # the same for the last token
    before: float | None = None  # time of the last token or the request, by `time.monotonic`
    budget: float | None = None
    policy: str = ""
    actions: Counter[str] = field(default_factory=Counter)
    accepted: int = 0  # draft tokens of the request's prediction
    rejected: int = 0  # those that were rejected

    def facts_of(self, chunk: Chunk) -> dict[str, Any]:
        """Our additional field in the event of the last token."""
        return {
            "path": _letters(chunk.path),
            "ms": round(chunk.ms, 3),
            "cost": round(self.last, 4),
        }

    def facts(self) -> dict[str, Any]:
        """Our additional field in an answer."""
        total, decoded = self.actions.total(), self.generated_tokens - 1
        return {
            "policy": self.policy,
            "budget": self.budget,
            "actions": {a: round(n / total, 4) for a, n in sorted(self.actions.items())},
            "cost": round(self.cost / decoded, 4) if decoded > 0 else None,
        }


@dataclass
class Job:
    """The generation of a request.

    Attributes:
        name: name of the bundle.
        prompts: token ids of each prompt, `[S]`.
        options: options of the generation; each choice of a prompt is sampled with its own seed.
        tallies: counts and costs of each choice of the first prompt, then of the others.
        until: deadline, by the clock of the event loop.
        raw: whether the prompt is text to continue: reasoning is not detected.
    """

    name: str
    prompts: list[Ids]
    options: GenerationOptions
    tallies: list[Tally]
    until: float = math.inf
    raw: bool = False

    @property
    def choices(self) -> int:
        """Choices of each prompt."""
        return len(self.tallies) // len(self.prompts)

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts, as in OpenAI's API."""
        first = self.tallies[:: self.choices]
        prompt = sum(tally.prompt_tokens for tally in first)
        answered = sum(tally.generated_tokens for tally in self.tallies)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": answered,
            "total_tokens": prompt + answered,
            "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in first)},
        }
        details = {}
        if self.options.expected:
            details = {
                "accepted_prediction_tokens": sum(tally.accepted for tally in self.tallies),
                "rejected_prediction_tokens": sum(tally.rejected for tally in self.tallies),
            }
        if thinking := sum(tally.thinking_tokens for tally in self.tallies):
            details["reasoning_tokens"] = thinking
        return {**usage, "completion_tokens_details": details} if details else usage


class Service:
    """The queue before the bundles.

    Attributes:
        pool: the bundles.
        limits: limits on load and requests.
        metrics: the metrics it updates.
        draining: whether it only finishes requests in progress.
        requests: requests in progress.
    """

    def __init__(self, bundles: Mapping[str, Source], limits: Limits):
        """Takes the bundles by name."""
        self.pool, self.limits, self.metrics = ModelPool(bundles, limits), limits, Metrics()
        self.draining, self.requests = False, 0
        self._slots = asyncio.Semaphore(limits.parallel)
        self._waiting = 0
        self.metrics.reused.set_function(lambda: self.pool.reused)
        self.metrics.loaded.set_function(lambda: self.pool.loaded)
        self.metrics.waiting.set_function(lambda: self._waiting)

    @contextlib.asynccontextmanager
    async def slot(self, *, further: bool = False) -> AsyncIterator[None]:
        """The right to run one generation.

        Args:
            further: whether it is for a request that already runs, and so does not queue again.

        Raises:
            BusyError: the queue is full.
        """
        queued = not further
        if queued and self._slots.locked() and self._waiting >= self.limits.waiting:
            raise BusyError(f"{self._waiting} requests are already waiting; try again later")
        self._waiting += queued
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= queued
        try:
            with self.metrics.running.track_inprogress():
                yield
        finally:
            self._slots.release()

    async def generate(
        self, job: Job, left: Coroutine[Any, Any, None]
    ) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Yields the chunks of all choices of a request, each with the index of its choice.

        The first choice of a prompt runs it; the others reuse its K/V.

        Args:
            job: the generation to run.
            left: raises once the client disconnects.

        Raises:
            DashError: the prompt or an option is refused.
            TimeoutError: the request took longer than allowed.
        """
        manifest = self.pool.sources[job.name].manifest
        whole = reference_ms(manifest)

        @lru_cache(_PATHS)
        def cost(policy: Policy, path: ActionPath) -> float:
            return policy.cost_ms(path, manifest.costs) / whole

        queue = asyncio.Queue[tuple[int, Chunk] | Exception]()
        runs: dict[int, Request[Chunk]] = {}
        begun = [asyncio.Event() for _ in job.prompts]
        ended = [asyncio.Event() for _ in job.tallies]

        def put(index: int, piece: Chunk | Exception) -> None:
            queue.put_nowait(piece if isinstance(piece, Exception) else (index, piece))
            begun[index // job.choices].set()
            if isinstance(piece, Exception) or piece.finish_reason is not None:
                ended[index].set()

        async def run(index: int) -> None:
            number, choice = divmod(index, job.choices)
            async with contextlib.AsyncExitStack() as needed:
                if index == 0:
                    await needed.enter_async_context(self.slot())
                    job.until = asyncio.get_running_loop().time() + self.limits.seconds
                else:
                    await begun[number if choice else 0].wait()
                async with asyncio.timeout_at(job.until):
                    served = await needed.enter_async_context(self.pool.using(job.name))
                    if index >= self.limits.parallel:  # other requests wait for one round at most
                        await ended[index - self.limits.parallel].wait()
                    if index:
                        await needed.enter_async_context(self.slot(further=True))
                    runs[index] = await self._begun(served, job, index, partial(put, index))
                    needed.callback(runs[index].cancelled.set)
                    await ended[index].wait()

        async def guarded(work: Coroutine[Any, Any, None]) -> None:
            try:
                await work
            except TimeoutError:
                seconds = f"{self.limits.seconds:g} s"
                queue.put_nowait(TimeoutError(f"it took longer than {seconds}"))
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # whatever it is, the request must not wait for ever
                told = error if isinstance(error, Exception) else RuntimeError(repr(error))
                queue.put_nowait(told)

        works = left, *(run(index) for index in range(len(job.tallies)))
        tasks = [asyncio.create_task(guarded(work)) for work in works]
        running = len(job.tallies)
        try:
            while running:
                piece = await queue.get()
                if isinstance(piece, Exception):
                    raise piece
                index, chunk = piece
                tally = job.tallies[index]
                tally.last = cost(runs[index].first, chunk.path)
                tally.reused_tokens = runs[index].reused
                self._count(tally, chunk)
                running -= chunk.finish_reason is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await until_done(*tasks)

    async def _begun(
        self, served: ServedModel, job: Job, index: int, put: Deliver
    ) -> Request[Chunk]:
        """Starts a choice in the batch of its bundle."""
        model, batch, options = served.model, served.batch, job.options
        assert batch is not None
        policy = model.policy_of(options)
        await self.pool.prepare(served, policy)
        job.tallies[index].policy, job.tallies[index].budget = policy.name, policy.budget
        number, choice = divmod(index, job.choices)
        if options.seed is not None:
            options = replace(options, seed=options.seed + choice)
        made = await asyncio.to_thread(
            model.request, job.prompts[number], put, options, raw=job.raw
        )
        batch.run(made)
        return made

    def _count(self, tally: Tally, chunk: Chunk) -> None:
        metrics, now = self.metrics, time.monotonic()
        if tally.before is not None:
            waited = metrics.between if tally.generated_tokens else metrics.first
            waited.observe(now - tally.before)
        if not tally.generated_tokens:
            tally.prompt_tokens = chunk.prompt_tokens
            if tally.before is not None:  # from the first choice
                metrics.prompted.inc(chunk.prompt_tokens)
        else:  # the first token comes from the prompt
            tally.cost += tally.last
            for action, count in _counts(chunk.path):
                tally.actions[action] += count
                metrics.by_action[action].inc(count)
        if (draft := chunk.draft) is not None:
            rejected = draft.tokens - draft.accepted
            metrics.drafts.labels("accepted").inc(draft.accepted)
            metrics.drafts.labels("rejected").inc(rejected)
            if draft.source == "expected":
                tally.accepted += draft.accepted
                tally.rejected += rejected
        tally.generated_tokens += 1
        tally.thinking_tokens += chunk.thinking
        tally.before = now
        metrics.generated.inc()
        if chunk.finish_reason is not None:
            tally.finish_reason = "stop" if chunk.finish_reason == "stop" else "length"


@lru_cache(_PATHS)
def _counts(path: ActionPath) -> list[tuple[Action, int]]:
    return [*Counter(path).items()]


def check_words(text: TextCodec, given: list[dict[str, Any]]) -> None:
    """Refuses text that could end a message and begin another one in any role.

    Args:
        text: codec of the model, whose template takes the text.
        given: messages and tools; every string in them is checked, at any depth.

    Raises:
        PolicyError: one of them contains a control token of the model.
    """
    left: list[Any] = [*given]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and (found := [word for word in text.control if word in value]):
            raise PolicyError(
                f"a message holds {found[0]!r}, a control token of this model: write it differently"
            )
