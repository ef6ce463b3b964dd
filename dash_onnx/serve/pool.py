"""Bundles by name, loaded at startup or when a request needs them, as far as memory allows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dash_onnx.core.budget import Budget
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import DashError, SourceError
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import Policy, make_policy
from dash_onnx.core.text import TextCodec
from dash_onnx.runtime.devices import device_of
from dash_onnx.runtime.load import load
from dash_onnx.runtime.machine import release_memory
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.ort import Device
from dash_onnx.runtime.prefix import PrefixStore
from dash_onnx.serve.limits import BusyError, Limits
from dash_onnx.serve.running import BatchThread

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a bundle comes from.

    Attributes:
        manifest: manifest of the bundle.
        policy: policy of requests that name none.
        text: reads its tokenizer and template.
        open: loads the model.
        loaded: whether the model belongs to the app, is already loaded and stays loaded.
    """

    manifest: Manifest
    policy: Policy
    text: Callable[[], TextCodec]
    open: Callable[[], Model]
    loaded: bool = False

    @classmethod
    def of_model(cls, model: Model) -> Source:
        """A model that the app has already loaded."""
        return cls(model.manifest, model.policy(), lambda: model.text, lambda: model, loaded=True)

    @classmethod
    def of_folder(
        cls,
        folder: str | Path,
        *,
        device: Device | None = None,
        policy: str = "",
        budget: Budget | None = None,
        sha256: str | None = None,
        **options: Any,
    ) -> Source:
        """A bundle on disk; the options are those of `dash_onnx.load`.

        Raises:
            BundleError: the folder is not a bundle.
            DeviceError: the bundle is for another device.
            PolicyError: the bundle does not support the policy or the budget.
        """
        bundle = Bundle(folder, sha256=sha256)
        device_of(bundle, device)
        options |= {"device": device, "policy": policy, "budget": budget, "sha256": sha256}
        usual = make_policy(policy, bundle.manifest, budget)
        text, model = partial(TextCodec, bundle), partial(load, folder, **options)
        return cls(bundle.manifest, usual, text, model)


class ServedModel:
    """A bundle that the server offers, loaded or not.

    Attributes:
        name: name of the bundle.
        source: source of the bundle.
        users: number of requests that need it now.
        used: when the last of them ended, by `time.monotonic`.
        loading: task that loads it, or did.
        batch: runs its generations together; None while not loaded.
    """

    def __init__(self, name: str, source: Source):
        """Does not load anything yet."""
        self.name, self.source = name, source
        self.users, self.used = 0, 0.0
        self.loading: asyncio.Task[None] | None = None
        self.batch: BatchThread | None = None
        self._model: Model | None = None
        self._text: TextCodec | None = None
        self._reused = 0  # until it was last unloaded

    @property
    def reused(self) -> int:
        """Number of prompt tokens reused from a slot or a prefix."""
        return self._reused + (self.batch.reused if self.batch else 0)

    @property
    def model(self) -> Model:
        """The loaded bundle."""
        assert self._model is not None, "it is loaded while it has users"
        return self._model

    @property
    def loaded(self) -> bool:
        """Whether the bundle is loaded."""
        return self._model is not None

    @property
    def bytes(self) -> int:
        """Bytes of loaded weights; requests may load more than the bundle's policy needs."""
        return 0 if self._model is None else self._model.loaded_bytes

    def text(self) -> TextCodec:
        """Its tokenizer and template, which stay loaded."""
        if self._text is None:
            self._text = self.source.text()
        return self._text

    def start(self, model: Model, limits: Limits) -> None:
        """Loads what the model's policy uses, and starts the batch."""
        try:
            model.preload(model.policy())
            store = None
            if limits.prefix_bytes:
                store = PrefixStore(model.manifest, limits.prefix_bytes, limits.prefix_folder)
            self.batch = BatchThread(model.new_scheduler(limits.parallel, store))
        except BaseException:
            self._close(model)
            raise
        self._text, self._model = model.text, model

    def unload(self) -> Callable[[], None]:
        """Detaches the model; the returned function frees its memory, which takes one step."""
        batch, model = self.batch, self._model
        self._reused = self.reused
        self.batch, self._model = None, None

        def free() -> None:
            nonlocal batch, model
            try:
                if batch is not None:
                    batch.close()
            finally:
                if model is not None:
                    self._close(model)
                batch = model = None  # these hold the memory to release
                release_memory()

        return free

    def _close(self, model: Model) -> None:
        if not self.source.loaded:
            model.close()


class ModelPool:
    """The bundles of a server.

    Attributes:
        sources: where each comes from, by its name.
    """

    def __init__(self, bundles: Mapping[str, Source], limits: Limits):
        """Starts the loaded models, and loads the others unless memory is limited.

        Raises:
            DashError: a bundle cannot be loaded.
        """
        self.sources = bundles
        self._served = {name: ServedModel(name, source) for name, source in bundles.items()}
        self._limits, self._closed = limits, False
        self._lock = asyncio.Lock()  # for loading: each checks what the others take
        for name, source in bundles.items():
            if source.loaded or limits.memory_bytes is None:
                model = source.open()
                self._served[name].start(model, limits)
                _LOG.info("%s: %r", name, model)

    async def text(self, name: str) -> TextCodec:
        """Tokenizer and template of a bundle, loaded or not."""
        return await asyncio.to_thread(self._served[name].text)

    @property
    def alive(self) -> bool:
        """Whether all loaded bundles are running."""
        return all(served.batch.alive for served in self._served.values() if served.batch)

    @property
    def loaded(self) -> int:
        """Number of loaded bundles."""
        return sum(served.loaded for served in self._served.values())

    @property
    def reused(self) -> int:
        """Number of prompt tokens reused from a slot or a prefix."""
        return sum(served.reused for served in self._served.values())

    @contextlib.asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[ServedModel]:
        """Yields a bundle that stays loaded meanwhile.

        Raises:
            BusyError: other bundles are using the memory it needs.
            DashError: the bundle cannot be loaded.
        """
        served = self._served[name]
        served.users += 1
        try:
            if not served.loaded:
                if served.loading is None or served.loading.done():
                    served.loading = asyncio.create_task(self._load(name, served))
                    # Nobody may be waiting any more when it fails.
                    served.loading.add_done_callback(lambda one: one.cancelled() or one.exception())
                await asyncio.shield(served.loading)  # others may be waiting for it
            yield served
        finally:
            served.users -= 1
            served.used = time.monotonic()

    async def prepare(self, served: ServedModel, policy: Policy) -> None:
        """Loads what a request needs before it runs, so that no answer in progress waits for it.

        Args:
            served: its bundle, in use.
            policy: policy of the request.

        Raises:
            BusyError: other bundles are using the memory it needs.
            DashError: the bundle cannot be loaded.
        """
        if not served.model.bytes_to_load(policy):
            return
        async with self._lock:
            needed = served.model.bytes_to_load(policy)
            await self._make_room(f"{policy.name} of {served.name}", needed, served.bytes)
            await asyncio.to_thread(served.model.preload, policy)

    async def _load(self, name: str, served: ServedModel) -> None:
        async with self._lock:
            started = time.monotonic()
            model = await asyncio.to_thread(served.source.open)
            await self._make_room(name, model.bytes_to_load())
            await asyncio.to_thread(served.start, model, self._limits)
            if self._closed:
                await asyncio.to_thread(served.unload())
        _LOG.info("%s: %r in %.1f s", name, model, time.monotonic() - started)

    async def _make_room(self, name: str, needed: int, held: int = 0) -> None:
        """Unloads other bundles; `held` bytes are already in memory for the same request."""
        most = self._limits.memory_bytes
        if most is None:
            return
        if needed + held > most:
            remedy = "ask for another policy or budget, or " if held else ""
            raise DashError(
                f"{name} needs {needed / 1e6:.0f} MB, more than the {(most - held) / 1e6:.0f} that "
                f"--max-weights-mb leaves for it; {remedy}start with more"
            )
        while needed + (taken := sum(served.bytes for served in self._served.values())) > most:
            idle = {n: one for n, one in self._served.items() if one.loaded and not one.users}
            if not idle:
                raise BusyError(
                    f"{name} needs {needed / 1e6:.0f} MB, and bundles in use leave "
                    f"{(most - taken) / 1e6:.0f} of {most / 1e6:.0f}; try again later"
                )
            oldest = min(idle, key=lambda name: idle[name].used)
            _LOG.info("%s: unloaded, %s needs its memory", oldest, name)
            await asyncio.to_thread(idle[oldest].unload())

    def close(self) -> None:
        """Ends the threads; generations in progress end after their next token."""
        self._closed = True
        for name, served in self._served.items():
            try:
                served.unload()()
            except Exception:
                _LOG.exception("%s: not closed cleanly", name)


def check_names(names: Sequence[str]) -> None:
    """Refuses two bundles with the same name.

    Raises:
        SourceError: there are two such bundles.
    """
    for name in names:
        if names.count(name) > 1:
            raise SourceError(f"two bundles are called {name!r}: rename one of the folders")


def open_bundles(
    folders: Sequence[str | Path],
    *,
    names: Sequence[str] = (),
    sha256: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Source]:
    """Bundles for a pool, each named after its folder unless names are given.

    The options are those of `load`.

    Raises:
        SourceError: two have the same name, or the numbers of checksums and folders differ.
        DashError: a folder is not a bundle, or does not support these options.
    """
    names = names or [Path(folder).resolve().name for folder in folders]
    check_names(names)
    checksums: Sequence[str | None] = sha256 or [None] * len(names)
    if len(checksums) != len(names):
        raise SourceError(f"give a checksum for each bundle: {len(names)}, not {len(checksums)}")
    return {
        name: Source.of_folder(folder, sha256=checksum, **options)
        for name, folder, checksum in zip(names, folders, checksums, strict=True)
    }
