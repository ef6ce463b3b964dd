"""A loaded bundle: the Python interface of the runtime."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dash_onnx.core.actions import Form
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.budget import Budget
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import DashError, PolicyError, printable
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.cache import Cache
from dash_onnx.runtime.deciders import ScoredDecider, decider_of
from dash_onnx.runtime.generate import Request, prefill_plan
from dash_onnx.runtime.kv import CAPACITY
from dash_onnx.runtime.options import GenerationOptions, check_count
from dash_onnx.runtime.prefix import PrefixStore
from dash_onnx.runtime.requests import Prompt, Requests
from dash_onnx.runtime.results import Chunk, GeneratedToken, ScoredToken
from dash_onnx.runtime.rows import Rows
from dash_onnx.runtime.scheduler import MAX_SLOTS, SLOTS, Scheduler
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Memory, Sessions
from dash_onnx.runtime.stream import Completion, Stream, completions

if TYPE_CHECKING:
    from typing import Unpack

    from dash_onnx.runtime.options import Options


class Model:
    """A bundle, ready to generate. Safe to use from several threads at once.

    `GenerationOptions` describes the options of every generating method.

    Attributes:
        manifest: the content of `dash.json`.
        text: tokenizer and chat template.
        sampling: the defaults of the model's generation_config.json.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        policy: str | Policy = "",
        budget: Budget | None = None,
        memory: Memory = "high",
    ):
        """See `load`."""
        self.manifest = bundle.manifest
        self._sessions = Sessions(bundle, backend, memory)
        self._requests = Requests(bundle, self._sessions, policy, budget)
        self.text, self.sampling = self._requests.text, self._requests.sampling
        self.policy()  # refuses a wrong one now

    def __repr__(self) -> str:
        facts, actions = self.manifest.model, ", ".join(self.manifest.actions)
        name, policy = printable(facts.name), self.policy().name
        return f"<Model {name}: {facts.num_layers} layers in {actions}; {policy}>"

    @property
    def loaded(self) -> frozenset[str]:
        """The graphs that are loaded, by their path in the bundle."""
        return self._sessions.loaded

    def new_sequence(self, capacity: int = CAPACITY, batch: int = 1) -> SequenceState:
        """An empty sequence, for callers that run the decode loop with their own deciders.

        Args:
            capacity: initial size of its KV cache in tokens; it grows in steps of 256.
            batch: number of sequences, which have one length and one path.
        """
        for name, count in (("capacity", capacity), ("batch", batch)):
            check_count(name, count)
        return SequenceState(self._sessions, capacity, batch)

    def new_cache(self) -> Cache:
        """An empty KV cache that successive generations of one conversation share."""
        return Cache(self._sessions)

    def preload(
        self,
        policy: str | Policy | None = None,
        budget: Budget | None = None,
        prefill: Form | None = None,
        *,
        batches: bool = True,
    ) -> None:
        """Loads graphs now instead of on first use.

        Args:
            policy: the policy whose graphs to load, as in `policy`; None loads every graph of the
                bundle, except the wide form with `memory="low"`.
            budget: see `policy`.
            prefill: precision of the prompts, as in `stream`.
            batches: also load the wide LM head, which otherwise loads with the first batch.
        """
        chosen = None if policy is None else self.policy(policy, budget)
        plan = None if chosen is None else prefill_plan(self._sessions, chosen, prefill)
        self._sessions.preload(chosen, plan, batches=batches)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights of layers and LM heads that are loaded."""
        return self._sessions.loaded_bytes

    def bytes_to_load(self, policy: Policy | None = None) -> int:
        """Bytes of weights that a policy, by default the model's, needs and that are not loaded."""
        chosen = policy or self.policy()
        return self._sessions.bytes_to_load(chosen, prefill_plan(self._sessions, chosen))

    def close(self) -> None:
        """Frees every graph and its weights.

        Later generations raise `DashError`, and so do running ones. A model is also a context
        manager that closes itself.
        """
        self._sessions.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def policy(self, policy: str | Policy | None = None, budget: Budget | None = None) -> Policy:
        """Resolves a policy; see `dash_onnx.core.policy.make_policy`.

        Args:
            policy: a name or a `Policy`; if empty, that of `load`.
            budget: fraction of the reference's time per token, or a preset. None: that of `load` if
                the policy is empty, `dash` or `static`.
        """
        return self._requests.policy(policy, budget)

    def policy_of(self, options: GenerationOptions) -> Policy:
        """The policy of a generation.

        Raises:
            PolicyError: the bundle does not support it, or cannot speculate with it as requested.
        """
        return self._requests.policy_of(options)

    def logits(
        self,
        ids: Ids | Sequence[int],
        *,
        prompt_tokens: int = 0,
        policy: str | Policy | None = None,
        budget: Budget | None = None,
        prefill: Form | None = None,
    ) -> Logits:
        """Teacher-forced logits of a text.

        A policy whose paths differ between tokens runs token by token; at least the first token is
        prefilled.

        Args:
            ids: token ids `[S]`.
            prompt_tokens: how many are prefilled, as in `score`.
            policy: see `policy`.
            budget: see `policy`.
            prefill: precision of the prefilled part; None: see `memory` of `load`.

        Returns:
            `[S, V]` float32: row i predicts token i + 1.
        """
        ids = self._requests.checked(ids)
        chosen, sequence = self.policy(policy, budget), self.new_sequence()
        prompt = ids[: prompt_tokens if chosen.uniform else max(prompt_tokens, 1)]
        rest, parts = ids[len(prompt) :], []
        if len(prompt):
            plan = prefill_plan(self._sessions, chosen, prefill)
            parts.append(sequence.prefill(prompt, *plan, every=True))
        if chosen.uniform is not None and len(rest):
            parts.append(sequence.prefill(rest, chosen.uniform, chosen.head, every=True))
        elif len(rest):
            decider = decider_of(chosen, sequence)
            rows = (sequence.forward(token, decider)[0] for token in rest.tolist())
            parts.append(np.stack([row.astype(np.float32) for row in rows]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)  # they are large

    def score(
        self,
        ids: Ids | Sequence[int],
        *,
        prompt_tokens: int = 1,
        policy: str | Policy | None = None,
        budget: Budget | None = None,
        prefill: Form | None = None,
        cache: Cache | None = None,
        predictions: bool = False,
    ) -> Iterator[ScoredToken]:
        """Prefills part of a text, then decodes the rest under a policy.

        Args:
            ids: token ids `[S]`.
            prompt_tokens: how many are prefilled.
            policy: see `policy`.
            budget: see `policy`.
            prefill: precision of the prefilled part; None: see `memory` of `load`.
            cache: keeps the KV cache of the prefilled part for the next call.
            predictions: return the scorer's predictions, if a scorer decides.

        Yields:
            One result for each token after the prefilled part.
        """
        ids = self._requests.checked(ids)
        chosen = self.policy(policy, budget)
        with self._cache(cache).taken() as slot:
            sequence, rest = slot.state, slot.reuse(ids[:prompt_tokens])
            if len(rest):
                sequence.prefill(rest, *prefill_plan(self._sessions, chosen, prefill))
                slot.tokens += rest.tolist()
            decider = decider_of(chosen, sequence)
            scorer = decider if predictions and isinstance(decider, ScoredDecider) else None
            for token in ids[prompt_tokens:].tolist():
                logits, path = sequence.forward(token, decider)
                yield ScoredToken(logits, path, scorer.predicted_kl if scorer else None)

    def generate_step(
        self,
        ids: Ids | Sequence[int],
        *,
        options: GenerationOptions | None = None,
        cache: Cache | None = None,
        **given: Unpack[Options],
    ) -> Iterator[GeneratedToken]:
        """Generates tokens after a prompt of token ids; the first one comes from the prefill.

        Only stop strings that are control tokens end it: there is no text.

        Args:
            ids: the prompt, `[S]`.
            options: base options, which `given` overrides.
            cache: see `stream`.
            given: see `Options`.

        Raises:
            PolicyError: an option is out of range, or the bundle does not support it.
            ContextLengthError: the prompt does not fit the context.
        """
        chosen = GenerationOptions.of(options, **given)
        ids = self._requests.checked(ids)
        request = self._requests.make(ids, chosen, lambda token: token, lambda piece: None)
        return self._cache(cache).generation(request)

    def stream(
        self,
        prompt: Prompt,
        *,
        options: GenerationOptions | None = None,
        cache: Cache | None = None,
        **given: Unpack[Options],
    ) -> Stream:
        """Generates text piece by piece, from its first piece on; `close()` ends it, anywhere.

        Args:
            prompt: raw text; chat messages, of which the assistant's last one is continued; or ids.
            options: base options, which `given` overrides.
            cache: from `new_cache`; the prefix that it shares with the prompt is not computed
                again.
            given: see `Options`.

        Raises:
            PolicyError: the model or the bundle does not support an option or a message.
            ContextLengthError: the prompt does not fit the context.
        """
        chosen = GenerationOptions.of(options, **given)
        request = self.request(prompt, lambda piece: None, chosen)
        return Stream(self._cache(cache).generation(request), request)

    def _cache(self, cache: Cache | None) -> Cache:
        cache = self.new_cache() if cache is None else cache  # an empty one is falsy
        if isinstance(cache, Cache) and cache.of(self._sessions):
            return cache
        raise PolicyError(f"cache={cache!r} must be from new_cache() of this model")

    def generate(
        self,
        prompt: Prompt,
        *,
        options: GenerationOptions | None = None,
        cache: Cache | None = None,
        **given: Unpack[Options],
    ) -> Completion:
        """Generates the whole text after a prompt, as it is; takes what `stream` takes."""
        return Completion.of(self.stream(prompt, options=options, cache=cache, **given))

    def chat(
        self,
        prompt: Prompt,
        *,
        options: GenerationOptions | None = None,
        cache: Cache | None = None,
        **given: Unpack[Options],
    ) -> Completion:
        """Answers messages, or a string as a user's message; takes what `stream` takes."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return self.generate(prompt, options=options, cache=cache, **given)

    async def astream(
        self,
        prompt: Prompt,
        *,
        options: GenerationOptions | None = None,
        cache: Cache | None = None,
        **given: Unpack[Options],
    ) -> AsyncIterator[Chunk]:
        """Generates text piece by piece for `async for`, in threads; takes what `stream` takes."""
        chunks = await asyncio.to_thread(self.stream, prompt, options=options, cache=cache, **given)
        try:
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk
        finally:
            chunks.close()
            await asyncio.to_thread(chunks.join)

    def new_scheduler(self, slots: int = SLOTS, store: PrefixStore | None = None) -> Scheduler:
        """Runs several generations together; see `request`.

        Args:
            slots: how many run at once; all their KV caches are as long as the longest.
            store: keeps the K/V of slots that are given to another text.

        Raises:
            PolicyError: `slots` is out of range.
        """
        check_count("slots", slots, MAX_SLOTS)
        return Scheduler(Rows.new(self._sessions, slots), store)

    def request(
        self,
        prompt: Prompt,
        deliver: Callable[[Chunk | Exception], None],
        options: GenerationOptions | None = None,
        *,
        raw: bool = False,
    ) -> Request[Chunk]:
        """A generation for a scheduler of this model.

        Args:
            prompt: see `stream`.
            deliver: called with each chunk, or with an error.
            options: those of the generation.
            raw: treat ids as raw text, in which no thoughts are looked for.

        Raises:
            PolicyError, ContextLengthError: see `stream`.
        """
        return self._requests.of_text(prompt, GenerationOptions.of(options), deliver, raw)

    def batch(
        self,
        prompts: Sequence[Prompt],
        *,
        options: GenerationOptions | None = None,
        parallel: int = SLOTS,
        on_done: Callable[[int, Completion], None] = lambda index, completion: None,
        **given: Unpack[Options],
    ) -> list[Completion]:
        """Generates the texts of many prompts, in batches.

        Args:
            prompts: raw texts or chats.
            options: base options of all of them, which `given` overrides; see `Options`.
            parallel: how many run at once.
            on_done: called with the index and the text of each as it ends.

        Returns:
            The text for each prompt, in their order.

        Raises:
            PolicyError, ContextLengthError: see `stream`.
        """
        if isinstance(prompts, str):
            raise PolicyError("prompts must be a list of prompts, not text")
        check_count("parallel", parallel, MAX_SLOTS)
        options = GenerationOptions.of(options, **given)
        scheduler = self.new_scheduler(max(1, min(parallel, len(prompts))))
        requests = []
        for index, prompt in enumerate(prompts):
            try:
                requests.append(self.request(prompt, lambda piece: None, options))
            except DashError as error:
                raise type(error)(f"prompt {index}: {error}") from None
        return completions(scheduler, requests, on_done)
