"""Runs requests on loaded bundles: who may run, at which budget, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector
from prometheus_client import Counter as Metric

from dash_onnx.core.arrays import Ids
from dash_onnx.core.budget import multiplier_of, reference_ms, resolve, scorer_facts
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.text import TextCodec
from dash_onnx.runtime.engine import Model
from dash_onnx.runtime.generate import Chunk
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.serve.limits import STEPS, BusyError, Limits, lowered
from dash_onnx.serve.running import Alone, Running, Together, until_done
from dash_onnx.serve.shelf import Place, Shelf, Unloaded

_Piece = tuple[int, Chunk | Exception | None]
"""Of the choice of a number: a chunk, or what ended it, None in good order."""


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.registry = CollectorRegistry()
        latency = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
        given: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**given)  # memory, time, open files
        self.requests = Metric("dash_requests", "by outcome", ["outcome"], **given)
        self.tokens = Metric("dash_tokens", "prompt and generated", ["kind"], **given)
        self.actions = Metric("dash_actions", "decisions by action", ["action"], **given)
        self.guesses = Metric("dash_guesses", "of speculation", ["outcome"], **given)
        self.reused = Gauge("dash_prompt_tokens_reused", "that a row or a prefix held", **given)
        self.loaded = Gauge("dash_loaded_bundles", "in memory", **given)
        self.running = Gauge("dash_running", "generations", **given)
        self.waiting = Gauge("dash_waiting", "requests in the queue", **given)
        self.pressure = Gauge("dash_pressure", "0 to 1: how far budgets have fallen", **given)
        self.first = Histogram(
            "dash_first_token_seconds", "with the wait", buckets=latency, **given
        )
        self.between = Histogram(
            "dash_between_tokens_seconds", "of one answer", buckets=latency, **given
        )


@dataclass
class Tally:
    """What one answer has cost so far.

    Attributes:
        arrived: when its request did, by `time.monotonic`; None of its second choice and later.
        until: when its request must have ended, by the clock of the event loop.
    """

    arrived: float | None = None
    until: float = math.inf
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cost: float = 0.0  # the sum over tokens, as shares of the reference's time
    last: float = 0.0  # of the last token likewise
    budget: float | None = None
    policy: str = ""
    actions: Counter[str] = field(default_factory=Counter)

    def facts(self) -> dict[str, Any]:
        """Our field of an answer."""
        total, decoded = self.actions.total(), self.generated_tokens - 1
        return {
            "policy": self.policy,
            "budget": self.budget,
            "actions": {a: round(n / total, 4) for a, n in sorted(self.actions.items())},
            "cost": round(self.cost / decoded, 4) if decoded > 0 else None,
        }


class Service:
    """The queue before the bundles.

    Attributes:
        shelf: the bundles.
        limits: what it takes on.
        metrics: what it counts.
        draining: whether it only ends what it has begun.
        requests: in progress.
    """

    def __init__(self, models: Mapping[str, Model | Unloaded], limits: Limits):
        """Takes bundles by name.

        Raises:
            PolicyError: a bundle cannot meet the budget under load.
        """
        self.shelf, self.limits, self.metrics = Shelf(models, limits), limits, Metrics()
        self.draining, self.requests = False, 0
        self._slots = asyncio.Semaphore(limits.running)
        self._waiting = 0
        self._under_load: dict[str, float] = {}
        if limits.budget_under_load is not None:
            for name, model in models.items():
                least = resolve(limits.budget_under_load, model.manifest)
                multiplier_of(least, scorer_facts(model.manifest).points)  # refuses it now
                self._under_load[name] = least

    @property
    def pressure(self) -> float:
        """How full the queue is, 0 to 1, in steps."""
        full = min(self._waiting / max(self.limits.running, 1), 1.0)
        return round(full * STEPS) / STEPS

    @contextlib.asynccontextmanager
    async def slot(self, *, further: bool = False) -> AsyncIterator[None]:
        """The right to run one generation.

        Args:
            further: it belongs to a request that runs, which has stood in the queue once.

        Raises:
            BusyError: the queue is full.
        """
        queued = not further
        if queued and self._slots.locked() and self._waiting >= self.limits.waiting:
            raise BusyError(f"{self._waiting} requests are already waiting; try again later")
        self._waiting += queued
        self._show()
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= queued
            self._show()
        self.metrics.running.inc()
        try:
            yield
        finally:
            self.metrics.running.dec()
            self._slots.release()
            self._show()

    async def choices(
        self, name: str, prompt: Ids, options: GenerationOptions, tallies: Sequence[Tally]
    ) -> AsyncGenerator[tuple[int, Chunk], None]:
        """The chunks of all choices of a request as they come, each with the choice's number.

        The first one runs the prompt, whose K/V the others take. With `speculate` there is no
        batch to share it in, and they run one after the other.

        Args:
            name: of the bundle.
            prompt: its tokens.
            options: of the generation; each choice draws with a seed of its own.
            tallies: for each choice, where what it costs is added.

        Raises:
            DashError: the prompt or an option is refused.
            TimeoutError: it took longer than a request may.
        """
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[_Piece]()
        begun, ended = asyncio.Event(), [asyncio.Event() for _ in tallies]

        async def put(index: int) -> None:
            end: Exception | None = None
            try:
                async with contextlib.AsyncExitStack() as needed:
                    if index == 0:
                        await needed.enter_async_context(self.slot())
                        until = loop.time() + self.limits.seconds
                        for tally in tallies:
                            tally.until = until
                    else:
                        alone = options.speculate != "off"
                        await (ended[index - 1] if alone else begun).wait()
                        async with asyncio.timeout_at(tallies[index].until):
                            await needed.enter_async_context(self.slot(further=True))
                    chosen = options
                    if options.seed is not None:
                        chosen = replace(options, seed=options.seed + index)
                    chunks = self._run(name, prompt, chosen, tallies[index])
                    async with contextlib.aclosing(chunks):
                        async for chunk in chunks:
                            pieces.put_nowait((index, chunk))
                            begun.set()
            except Exception as error:
                end = error
            finally:
                pieces.put_nowait((index, end))
                begun.set()
                ended[index].set()

        tasks = [asyncio.create_task(put(index)) for index in range(len(tallies))]
        running = len(tasks)
        try:
            while running:
                index, piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    running -= 1
                else:
                    yield index, piece
        finally:
            for task in tasks:
                task.cancel()
            await until_done(*tasks)

    async def _run(
        self, name: str, prompt: Ids, options: GenerationOptions, tally: Tally
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of one generation, counted."""
        async with contextlib.AsyncExitStack() as needed:
            # Not around the chunks: who takes them may be another task.
            async with asyncio.timeout_at(tally.until):
                place = await needed.enter_async_context(self.shelf.using(name))
                running = await self._begun(place, prompt, options)
            chunks = self._counted(name, place.model, running, options, tally)
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    yield chunk

    async def _counted(
        self,
        name: str,
        model: Model,
        running: Running,
        options: GenerationOptions,
        tally: Tally,
    ) -> AsyncGenerator[Chunk, None]:
        """Its chunks; while others wait, its budget falls."""
        metrics, policy = self.metrics, running.policy
        usual = policy.budget
        flexible = name in self._under_load and options.budget is None
        pressure = 0.0
        tally.policy, tally.budget = policy.name, usual
        whole, before = reference_ms(model.manifest), tally.arrived
        try:
            while True:
                if flexible and usual is not None and self.pressure != pressure:
                    pressure = self.pressure
                    tally.budget = lowered(usual, self._under_load[name], pressure)
                    running.set_budget(tally.budget)
                policy = running.policy
                async with asyncio.timeout_at(tally.until):
                    chunk = await running.next()
                if chunk is None:
                    break
                now = time.monotonic()
                waited = metrics.between if tally.generated_tokens else metrics.first
                if before is not None:
                    waited.observe(now - before)
                before = now
                cost = policy.cost_ms(chunk.path, model.manifest.costs) / whole
                self._count(chunk, tally, cost)
                yield chunk
        finally:
            running.close()

    async def _begun(self, place: Place, prompt: Ids, options: GenerationOptions) -> Running:
        """A generation among the others of its bundle, or one of its own that guesses."""
        model, batch = place.model, place.batch
        policy = model.policy_of(options)
        await self.shelf.prepare(place, policy, model.draft_of(policy, options.speculate))
        if batch is None or options.speculate != "off":
            return await Alone.begun(functools.partial(model.stream, prompt, options=options))
        pieces = Together()
        pieces.request = await asyncio.to_thread(model.request, prompt, pieces.deliver, options)
        batch.submit(pieces.request)
        return pieces

    def _count(self, chunk: Chunk, tally: Tally, cost: float) -> None:
        metrics = self.metrics
        tally.last = cost
        if not tally.generated_tokens:
            tally.prompt_tokens = chunk.prompt_tokens
            if tally.arrived is not None:
                metrics.tokens.labels("prompt").inc(chunk.prompt_tokens)
        else:  # the first token comes from the prompt
            tally.actions.update(chunk.path)
            tally.cost += cost
            for action, count in Counter(chunk.path).items():
                metrics.actions.labels(action).inc(count)
        if chunk.guess is not None:
            metrics.guesses.labels("right").inc(chunk.guess.right)
            metrics.guesses.labels("wrong").inc(chunk.guess.tokens - chunk.guess.right)
        tally.generated_tokens += 1
        metrics.tokens.labels("generated").inc()
        if chunk.finish_reason is not None:
            tally.finish_reason = "stop" if chunk.finish_reason == "stop" else "length"

    def _show(self) -> None:
        self.metrics.reused.set(self.shelf.reused)
        self.metrics.loaded.set(self.shelf.loaded)
        self.metrics.waiting.set(self._waiting)
        self.metrics.pressure.set(self.pressure)


def check_words(text: TextCodec, given: list[dict[str, Any]]) -> None:
    """Refuses text that would end a message and begin another one: it could take any role.

    Args:
        text: whose template takes it.
        given: messages and tools; every text in them counts, however deep it stands.

    Raises:
        PolicyError: one of them holds a control token of the model.
    """
    added = text.tokenizer.get_added_tokens_decoder().values()
    control = [token.content for token in added if token.special]
    left: list[Any] = [*given]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and (found := [word for word in control if word in value]):
            raise PolicyError(f"a message holds {found[0]!r}, a control token of this model")
