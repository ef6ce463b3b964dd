"""A loaded bundle: the Python face of the runtime."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from dash_onnx.core.actions import Action, Path
from dash_onnx.core.budget import Budget
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import DeviceError
from dash_onnx.core.policy import Policy, make_policy
from dash_onnx.core.text import Message, TextCodec
from dash_onnx.runtime.decoding import decoding
from dash_onnx.runtime.dispatch import Lane, Logits
from dash_onnx.runtime.generate import (
    Cache,
    Chunk,
    Step,
    check_prompt,
    generate_step,
    prefill_plan,
    stream,
)
from dash_onnx.runtime.options import Options
from dash_onnx.runtime.ort import Device, check_device, use_threads
from dash_onnx.runtime.sessions import Memory, Sessions
from dash_onnx.runtime.span import Ids

Prompt = str | Sequence[Message]
"""Raw text, or the messages of a conversation."""


class Model:
    """A bundle, ready to generate. Safe to use from several threads at once.

    Keyword options of every generating method are those of `runtime.options.Options` and
    `runtime.sampling.Sampling`.

    Attributes:
        manifest: what `dash.json` says.
        text: tokenizer and chat template.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        threads: int | None,
        policy: str | Policy = "",
        budget: Budget | None = None,
        memory: Memory = "high",
        cuda_graphs: bool = False,
    ):
        """See `load`."""
        check_device(device)
        use_threads(threads)
        self.manifest = bundle.manifest
        self.text = TextCodec(bundle)
        self._sessions = Sessions(bundle, device, memory, cuda_graphs)
        self._default = (policy, budget)
        self.policy()  # refuses a wrong one now

    def new_cache(self) -> Cache:
        """An empty K/V cache that several generations of one conversation share, in turn."""
        return Cache(self._sessions)

    def preload(
        self,
        policy: str | Policy | None = None,
        budget: Budget | None = None,
        prefill: Action | None = None,
    ) -> None:
        """Loads graphs now instead of when they are first used.

        Args:
            policy: whose graphs, as in `policy`; None loads every graph of the bundle.
            budget: likewise.
            prefill: precision of the prompts, as in `stream`.
        """
        if policy is None:
            self._sessions.preload()
            return
        chosen = self.policy(policy, budget)
        self._sessions.preload(chosen, prefill_plan(self._sessions, chosen, prefill))

    def close(self) -> None:
        """Frees every graph and its weights.

        A later generation raises `BundleError`, and so may one that still runs, as soon as it needs
        another graph or a larger K/V cache. A model is also a context manager that closes it.
        """
        self._sessions.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def policy(self, policy: str | Policy = "", budget: Budget | None = None) -> Policy:
        """Resolves a policy; see `dash_onnx.core.policy.make_policy`.

        Args:
            policy: a name or a `Policy`; empty takes the one that the model was loaded with.
            budget: fraction of the full time per token or a preset; likewise.
        """
        if not policy:
            policy = self._default[0]
            budget = self._default[1] if budget is None else budget
        return make_policy(policy, self.manifest, budget)

    def logits(
        self, ids: Ids | Sequence[int], *, policy: str | Policy = "", budget: Budget | None = None
    ) -> Logits:
        """Teacher-forced logits of a text.

        A policy whose paths differ between tokens is run token by token, its first token at
        the highest exported precision.

        Args:
            ids: 1-D token ids, `[S]`.

        Returns:
            `[S, V]` float32: row i predicts token i + 1.
        """
        ids = self._checked(ids)
        chosen, lane = self.policy(policy, budget), Lane(self._sessions)
        if chosen.uniform is not None:
            return lane.prefill_all(ids, chosen.uniform, chosen.head)
        first = lane.prefill_all(ids[:1], *prefill_plan(self._sessions, chosen))
        decode = decoding(lane, chosen)
        rows = [decode(token)[0].astype(np.float32)[None] for token in ids[1:].tolist()]
        return np.concatenate([first, *rows])

    def teacher_forced(
        self,
        ids: Ids | Sequence[int],
        policy: str | Policy,
        prompt_tokens: int,
        prefill: Action | None = None,
        cache: Cache | None = None,
    ) -> Iterator[tuple[Logits, Path]]:
        """Prefills a part of a text, then decodes the rest of it under a policy.

        Args:
            ids: 1-D token ids.
            prompt_tokens: how many are prefilled.
            prefill: at which precision; None takes the highest exported.
            cache: keeps the K/V of the prefilled part for the next call.

        Yields:
            For each later token, the logits `[V]` after it (overwritten by the next step) and
            its path.
        """
        ids = self._checked(ids)
        chosen = self.policy(policy)
        if cache is None:  # an empty one is false
            cache = self.new_cache()
        lane, rest = cache.acquire(ids[:prompt_tokens])
        try:
            if len(rest):
                lane.prefill(rest, *prefill_plan(self._sessions, chosen, prefill))
                cache.tokens += rest.tolist()
            yield from map(decoding(lane, chosen), ids[prompt_tokens:].tolist())
        finally:
            cache.release()

    def generate_step(self, ids: Ids | Sequence[int], **options: Any) -> Iterator[Step]:
        """Generates tokens after a prompt of token ids; the first step is the prefill."""
        chosen = Options.of(**options)
        policy = self.policy(chosen.policy, chosen.budget)
        eos = self.text.eos_token_ids
        return generate_step(self._sessions, self._checked(ids), policy, eos, chosen)

    def stream(self, prompt: Prompt, **options: Any) -> Generator[Chunk]:
        """Generates text piece by piece; `close()` ends it and frees its cache.

        Args:
            prompt: raw text, or chat messages, which the chat template turns into text.
        """
        chosen = Options.of(**options)
        text = isinstance(prompt, str)
        ids = self.text.encode(prompt) if text else self.text.encode_chat(prompt)  # type: ignore[arg-type]
        steps = self.generate_step(ids, **options)
        chunks = stream(self.text, steps, len(ids), chosen.stop)
        first = next(chunks)  # errors surface here, not at the first use
        return _continued(first, chunks)

    def generate(self, prompt: Prompt, **options: Any) -> str:
        """Generates the whole text."""
        return "".join(chunk.text for chunk in self.stream(prompt, **options))

    def chat(self, messages: Sequence[Message], **options: Any) -> str:
        """Generates the assistant's answer to a conversation."""
        return self.generate(list(messages), **options)

    def _checked(self, ids: Ids | Sequence[int]) -> Ids:
        array = np.asarray(ids, np.int64)
        check_prompt(array, self.manifest.model.max_length, self.manifest.model.vocab_size)
        return array


def _continued(first: Chunk, rest: Generator[Chunk]) -> Generator[Chunk]:
    try:
        yield first
        yield from rest
    finally:
        rest.close()


def load(
    folder: str | os.PathLike[str],
    *,
    device: Device = "cpu",
    threads: int | None = None,
    policy: str | Policy = "",
    budget: Budget | None = None,
    memory: Memory = "high",
    cuda_graphs: bool = False,
) -> Model:
    """Opens a bundle; graphs load when they are first used.

    All sessions share ORT's global thread pool. While it exists ORT refuses other sessions of the
    process that do not set `SessionOptions.use_per_session_threads = False`. An app that cannot
    change its other sessions passes `threads=1`: then there is no pool.

    Args:
        folder: what `dash-export` wrote.
        device: `cpu` or `cuda`; must be what the bundle was exported for.
        threads: size of ORT's thread pool, shared by the whole process; None takes all cores.
        policy: of generations that name none; see `dash_onnx.core.policy.make_policy`.
        budget: likewise, a fraction of the full time per token or a preset.
        memory: `low` runs prompts in the precisions that the policy uses, so that no others are
            loaded; `high` runs them at the highest exported.
        cuda_graphs: records what a token runs as CUDA graphs, one per layer and action, and
            launches those. Generations on several threads then take turns, and other CUDA work of
            the process must keep off the default stream.

    Raises:
        PolicyError: the policy or the budget is not one that the bundle can do.
        BundleError: the bundle is missing, damaged or of another format version.
        DeviceError: ORT or the device is not available, or the bundle is for another one.
    """
    bundle = Bundle(folder)
    built_for = bundle.manifest.target.device
    if device != built_for and device in ("cpu", "cuda"):
        raise DeviceError(
            f"{folder} was exported for device {built_for!r}, not {device!r}; "
            f"export again with --device {device}"
        )
    return Model(bundle, device, threads, policy, budget, memory, cuda_graphs)
