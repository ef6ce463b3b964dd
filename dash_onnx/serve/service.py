"""Runs requests on loaded bundles: who may run, at which budget, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client import Counter as Metric

from dash_onnx.core.budget import Budget, reference_ms, resolve
from dash_onnx.core.errors import DashError, DeviceError, PolicyError, SourceError
from dash_onnx.core.policy import ScoredPolicy
from dash_onnx.runtime.batch import Batch, Request
from dash_onnx.runtime.engine import Model, Prompt, load
from dash_onnx.runtime.generate import Chunk
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.ort import Device
from dash_onnx.runtime.prefix import PrefixStore
from dash_onnx.runtime.stream import Stream

_LOG = logging.getLogger(__name__)
_IDLE_S = 0.5  # a thread that has nothing to do looks up
_STEPS = 4  # between the budget of an idle server and that under load


class BusyError(DashError):
    """So many requests wait that another one is refused."""


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        running: generations at once, which share their passes.
        waiting: further requests that wait for one of them to end.
        most_tokens: of an answer.
        seconds: of a request, from when it runs.
        body_bytes: of a request.
        prefix_bytes: of K/V in memory that lost its place to another text.
        prefix_folder: keeps it for the next process.
        budget_under_load: where budgets fall to as the queue fills, of requests that name none.
    """

    running: int = 8
    waiting: int = 32
    most_tokens: int = 4096
    seconds: float = 600.0
    body_bytes: int = 4 << 20
    prefix_bytes: int = 256 << 20
    prefix_folder: Path | None = None
    budget_under_load: Budget | None = None


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.registry = CollectorRegistry()
        latency = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
        given: dict[str, Any] = {"registry": self.registry}
        self.requests = Metric("dash_requests", "by outcome", ["outcome"], **given)
        self.tokens = Metric("dash_tokens", "prompt and generated", ["kind"], **given)
        self.actions = Metric("dash_actions", "decisions by action", ["action"], **given)
        self.guesses = Metric("dash_guesses", "of speculation", ["outcome"], **given)
        self.reused = Gauge("dash_prompt_tokens_reused", "that a row or a prefix held", **given)
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
    """What one answer has cost so far."""

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


class _Running(Protocol):
    """A generation that runs elsewhere."""

    async def next(self) -> Chunk | None:
        """Its next chunk; None after the last."""

    def set_budget(self, budget: Budget) -> None:
        """From the next token on."""

    def close(self) -> None:
        """Ends it."""


class _Alone:
    """A generation of its own, each token in a thread."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self.set_budget, self.close = stream.set_budget, stream.close

    async def next(self) -> Chunk | None:
        return await asyncio.to_thread(next, self._stream, None)


class _Together:
    """A generation in a batch, whose thread delivers chunks to this one's event loop."""

    request: Request

    def __init__(self) -> None:
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[Chunk | Exception]()
        self._ended = False

    def deliver(self, piece: Chunk | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients with it
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self) -> Chunk | None:
        if self._ended:
            return None
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        self._ended = piece.finish_reason is not None
        return piece

    def set_budget(self, budget: Budget) -> None:
        self.request.current.set_budget(budget)

    def close(self) -> None:
        self.request.cancelled.set()


class _BatchThread:
    """Runs the steps of a batch."""

    def __init__(self, batch: Batch):
        self.submit, self._batch, self._closed = batch.submit, batch, False
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed:
            if not self._batch.step():
                self._batch.wait(_IDLE_S)

    @property
    def reused(self) -> int:
        return self._batch.reused

    def close(self) -> None:
        self._closed = True
        self._thread.join()
        self._batch.save()


def _batch(model: Model, limits: Limits) -> _BatchThread | None:
    store = None
    if limits.prefix_bytes:
        store = PrefixStore(model.manifest, limits.prefix_bytes, limits.prefix_folder)
    try:
        return _BatchThread(model.new_batch(limits.running, store))
    except DeviceError:  # each generation runs on its own there
        return None


class Service:
    """Bundles by name, and the queue before them."""

    def __init__(self, models: dict[str, Model], limits: Limits):
        """Takes loaded bundles.

        Raises:
            PolicyError: a bundle cannot meet the budget under load.
        """
        self.models, self.limits, self.metrics = models, limits, Metrics()
        self.draining = False
        self._batches = {name: _batch(model, limits) for name, model in models.items()}
        self._slots = asyncio.Semaphore(limits.running)
        self._waiting = 0
        self._under_load: dict[str, float] = {}
        if limits.budget_under_load is not None:
            for name, model in models.items():
                self._under_load[name] = resolve(limits.budget_under_load, model.manifest)

    @property
    def pressure(self) -> float:
        """How full the queue is, 0 to 1, in steps."""
        full = min(self._waiting / max(self.limits.running, 1), 1.0)
        return round(full * _STEPS) / _STEPS

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """The right to run one generation.

        Raises:
            BusyError: the queue is full.
        """
        if self._slots.locked() and self._waiting >= self.limits.waiting:
            raise BusyError(f"{self._waiting} requests wait already; try again later")
        self._waiting += 1
        self._show()
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
            self._show()
        self.metrics.running.inc()
        try:
            yield
        finally:
            self.metrics.running.dec()
            self._slots.release()
            self._show()

    async def run(
        self, name: str, prompt: Prompt, options: GenerationOptions, arrived: float, tally: Tally
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of one generation, counted.

        Args:
            name: of the bundle.
            prompt: text or messages.
            options: of the generation.
            arrived: when its request did, by `time.monotonic`.
            tally: what it costs is added here.

        Raises:
            DashError: the prompt or an option is refused.
            TimeoutError: it took longer than a request may.
        """
        model, metrics = self.models[name], self.metrics
        policy = model.policy_of(options)
        usual = policy.budget if isinstance(policy, ScoredPolicy) else None
        flexible = name in self._under_load and options.budget is None
        pressure = -1.0
        tally.policy, tally.budget = policy.name, usual
        whole = reference_ms(model.manifest)
        before = arrived
        async with asyncio.timeout(self.limits.seconds):
            running = await self._begun(name, prompt, options)
            try:
                while True:
                    if flexible and usual is not None and self.pressure != pressure:
                        pressure = self.pressure
                        least = min(self._under_load[name], usual)
                        tally.budget = usual + (least - usual) * pressure
                        running.set_budget(tally.budget)
                    chunk = await running.next()
                    if chunk is None:
                        break
                    now = time.monotonic()
                    waited = metrics.between if tally.generated_tokens else metrics.first
                    waited.observe(now - before)
                    before = now
                    cost = policy.cost_ms(chunk.path, model.manifest.costs) / whole
                    self._count(chunk, tally, cost)
                    yield chunk
            finally:
                running.close()

    async def _begun(self, name: str, prompt: Prompt, options: GenerationOptions) -> _Running:
        """A generation among the others of its bundle, or one of its own that guesses."""
        model, batch = self.models[name], self._batches[name]
        if batch is None or options.speculate != "off":
            return _Alone(await asyncio.to_thread(model.stream, prompt, options=options))
        pieces = _Together()
        pieces.request = await asyncio.to_thread(model.request, prompt, pieces.deliver, options)
        batch.submit(pieces.request)
        return pieces

    def close(self) -> None:
        """Ends the threads; what runs ends after its next token."""
        for batch in self._batches.values():
            if batch is not None:
                batch.close()

    def _count(self, chunk: Chunk, tally: Tally, cost: float) -> None:
        metrics = self.metrics
        tally.last = cost
        if not tally.generated_tokens:
            tally.prompt_tokens = chunk.prompt_tokens
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
        self.metrics.reused.set(sum(batch.reused for batch in self._batches.values() if batch))
        self.metrics.waiting.set(self._waiting)
        self.metrics.pressure.set(self.pressure)


def load_models(
    folders: Sequence[str | Path],
    *,
    device: Device = "cpu",
    threads: int | None = None,
    policy: str = "",
    budget: Budget | None = None,
) -> dict[str, Model]:
    """Loads bundles and what their policy runs; each is called by its folder's name.

    Raises:
        SourceError: two have the same name.
        DashError: a bundle cannot be loaded; see `dash_onnx.load`.
    """
    names = [Path(folder).resolve().name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise SourceError(f"two bundles are called {name!r}: rename one of the folders")
    models = {}
    for name, folder in zip(names, folders, strict=True):
        models[name] = load(folder, device=device, threads=threads, policy=policy, budget=budget)
        models[name].preload(models[name].policy())
        _LOG.info("%s: %r", name, models[name])
    return models


def check_words(model: Model, given: list[dict[str, Any]]) -> None:
    """Refuses text that would end a message and begin another one: it could take any role.

    Args:
        model: whose template takes it.
        given: messages and tools; every text in them counts, however deep it stands.

    Raises:
        PolicyError: one of them holds a control token of the model.
    """
    added = model.text.tokenizer.get_added_tokens_decoder().values()
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
