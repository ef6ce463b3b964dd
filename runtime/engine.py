"""A loaded bundle: the Python face of the runtime."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from dash_onnx.core.actions import Action, Path
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.budget import Budget
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import BundleError, DashError, DeviceError, PolicyError, printable
from dash_onnx.core.policy import Policy, make_policy
from dash_onnx.core.text import Message, TextCodec
from dash_onnx.runtime.backend import Backend, open_backend
from dash_onnx.runtime.batch import ROWS, Batch, Deliver, Request
from dash_onnx.runtime.cache import Cache
from dash_onnx.runtime.deciders import ScoredDecider, decider_of
from dash_onnx.runtime.generate import (
    Chunk,
    CurrentPolicy,
    GeneratedToken,
    Generation,
    check_prompt,
    generate_tokens,
    prefill_plan,
)
from dash_onnx.runtime.grammar import Constraint, Grammar, guidance_tokenizer
from dash_onnx.runtime.guesses import Learned
from dash_onnx.runtime.kv import CAPACITY
from dash_onnx.runtime.options import GenerationOptions, check_count, check_type
from dash_onnx.runtime.ort import Device, has_device, known_device, use_threads
from dash_onnx.runtime.prefix import PrefixStore
from dash_onnx.runtime.sampling import Sampling
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Memory, Sessions
from dash_onnx.runtime.stream import Completion, Stream, asynchronous, joined
from dash_onnx.runtime.writer import TextWriter, text_of

_MOST_THREADS = 1024
_TARGETS = 16  # whose guesses are remembered

Prompt = str | Sequence[Message] | Sequence[int] | Ids
"""Raw text, the messages of a conversation, or token ids `[S]` in an array or a list."""


@dataclass(frozen=True)
class ScoredToken:
    """The model's output for one token of a given text.

    Attributes:
        logits: for the next token, `[V]`; overwritten by the next result.
        path: the action of each layer.
        predicted_kl: predicted KL of each action of each layer, `[L, A]` nats, for the actions of
            `manifest.scorer`; None if not requested, or if no scorer decides.
    """

    logits: Logits
    path: Path
    predicted_kl: npt.NDArray[np.float32] | None = None


def _as_messages(prompt: Prompt) -> Prompt:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


class Model:
    """A bundle, ready to generate. Safe to use from several threads at once.

    The options of every generating method are those of `GenerationOptions`.

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
        self.text = TextCodec(bundle)
        try:
            self.sampling = Sampling(**self.text.sampling)  # type: ignore[arg-type]
        except PolicyError as error:
            raise BundleError(f"{bundle.folder / 'generation_config.json'}: {error}") from None
        self._sessions = Sessions(bundle, backend, memory)
        self._default = (policy, budget)
        self._guidance: Any = None
        self._learned = functools.lru_cache(_TARGETS)(self._learn)
        self.policy()  # refuses a wrong one now

    def __repr__(self) -> str:
        facts, policy = self.manifest.model, self.policy()
        actions = ", ".join(self.manifest.actions)
        name = printable(facts.name)
        return f"<Model {name}: {facts.num_layers} layers in {actions}; {policy.name}>"

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
        return self._sessions.new_sequence(capacity, batch)

    def new_cache(self) -> Cache:
        """An empty KV cache that successive generations of one conversation share."""
        return Cache(self._sessions)

    def preload(
        self,
        policy: str | Policy | None = None,
        budget: Budget | None = None,
        prefill: Action | None = None,
    ) -> None:
        """Loads graphs now instead of on first use.

        Args:
            policy: the policy whose graphs to load, as in `policy`; None loads every graph of the
                bundle.
            budget: likewise.
            prefill: precision of the prompts, as in `stream`.
        """
        if policy is None:
            self._sessions.preload()
            return
        chosen = self.policy(policy, budget)
        self._sessions.preload(chosen, prefill_plan(self._sessions, chosen, prefill))

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights of layers and LM heads that are loaded."""
        return self._sessions.loaded_bytes

    def bytes_to_load(self, *policies: Policy) -> int:
        """Bytes of weights that policies need and that are not loaded yet.

        Args:
            policies: the model's own if empty.
        """
        used = policies or (self.policy(),)
        return self._sessions.bytes_to_load(*((p, prefill_plan(self._sessions, p)) for p in used))

    def close(self) -> None:
        """Frees every graph and its weights.

        A later generation raises `BundleError`, and a running one may do so, too, when it needs
        another graph or a larger KV cache. A model is also a context manager that closes itself.
        """
        self._sessions.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def policy(self, policy: str | Policy | None = None, budget: Budget | None = None) -> Policy:
        """Resolves a policy; see `dash_onnx.core.policy.make_policy`.

        Args:
            policy: a name or a `Policy`; None or empty uses the policy that the model was loaded
                with.
            budget: fraction of the reference's time per token or a preset; likewise.
        """
        if not policy:
            policy = self._default[0]
            budget = self._default[1] if budget is None else budget
        return make_policy(policy, self.manifest, budget)

    def policy_of(self, options: GenerationOptions) -> Policy:
        """The policy of a generation.

        Raises:
            PolicyError: the bundle cannot do it, or not with guesses, and they are asked for.
        """
        policy = self.policy(options.policy, options.budget)
        if options.speculate and policy.uniform is None:
            raise PolicyError(
                f"guesses are checked on one path for every token, such as int8; policy "
                f"{policy.name!r} has none: leave speculate out"
            )
        return policy

    def logits(
        self,
        ids: Ids | Sequence[int],
        *,
        prompt_tokens: int = 0,
        policy: str | Policy | None = None,
        budget: Budget | None = None,
        prefill: Action | None = None,
    ) -> Logits:
        """Teacher-forced logits of a text.

        A policy whose paths differ between tokens runs token by token; at least the first token is
        a prompt.

        Args:
            ids: token ids `[S]`.
            prompt_tokens: how many are prefilled, as in `score`.
            policy: see `policy`.
            budget: likewise.
            prefill: precision of the prefilled part; None: see `memory` of `load`.

        Returns:
            `[S, V]` float32: row i predicts token i + 1.
        """
        ids = self._checked(ids)
        chosen, sequence = self.policy(policy, budget), self.new_sequence()
        same_path = chosen.uniform is not None
        prompt = ids[: prompt_tokens if same_path else max(prompt_tokens, 1)]
        rest, parts = ids[len(prompt) :], []
        if len(prompt):
            plan = prefill_plan(self._sessions, chosen, prefill)
            parts.append(sequence.prefill(prompt, *plan, every=True))
        if chosen.uniform is not None and len(rest):
            parts.append(sequence.prefill(rest, chosen.uniform, chosen.head, every=True))
        elif len(rest):
            decider = decider_of(chosen, sequence)
            rows = [
                sequence.forward(token, decider)[0].astype(np.float32) for token in rest.tolist()
            ]
            parts.append(np.stack(rows))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)  # they are large

    def score(
        self,
        ids: Ids | Sequence[int],
        *,
        prompt_tokens: int = 1,
        policy: str | Policy | None = None,
        budget: Budget | None = None,
        prefill: Action | None = None,
        cache: Cache | None = None,
        predictions: bool = False,
    ) -> Iterator[ScoredToken]:
        """Prefills part of a text, then decodes the rest under a policy.

        Args:
            ids: token ids `[S]`.
            prompt_tokens: how many are prefilled.
            policy: see `policy`.
            budget: likewise.
            prefill: precision of the prefilled part; None: see `memory` of `load`.
            cache: keeps the KV cache of the prefilled part for the next call.
            predictions: return the scorer's predictions, if a scorer decides.

        Yields:
            One result for each token after the prefilled part.
        """
        ids = self._checked(ids)
        chosen = self.policy(policy, budget)
        cache = self.new_cache() if cache is None else cache  # an empty one is false
        sequence, rest = cache.acquire(ids[:prompt_tokens])
        try:
            if len(rest):
                sequence.prefill(rest, *prefill_plan(self._sessions, chosen, prefill))
                cache.tokens += rest.tolist()
            decider = decider_of(chosen, sequence)
            scorer = decider if predictions and isinstance(decider, ScoredDecider) else None
            for token in ids[prompt_tokens:].tolist():
                logits, path = sequence.forward(token, decider)
                yield ScoredToken(logits, path, scorer.predicted_kl if scorer else None)
        finally:
            cache.release()

    def generate_step(
        self,
        ids: Ids | Sequence[int],
        *,
        options: GenerationOptions | None = None,
        policy: str | Policy | None = None,
        budget: Budget | None = None,
        prefill: Action | None = None,
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        speculate: bool | None = None,
        expected: str | None = None,
        stop: str | Sequence[str] | None = None,
        grammar: Grammar | None = None,
        logprobs: int | None = None,
        cache: Cache | None = None,
        temperature: float | None = None,
        repetition_penalty: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[GeneratedToken]:
        """Generates tokens after a prompt of token ids; the first one comes from the prefill.

        Args:
            ids: the prompt, `[S]`.
            options: the value of whatever is None here; the rest is described there.

        Raises:
            PolicyError: an option is out of range, or not one that the bundle can do.
            ContextLengthError: the prompt does not fit the context.
        """
        chosen = GenerationOptions.of(
            options,
            policy=policy,
            budget=budget,
            prefill=prefill,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            speculate=speculate,
            expected=expected,
            stop=stop,
            grammar=grammar,
            logprobs=logprobs,
            cache=cache,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
        )
        return self._steps(self._checked(ids), self._current(chosen), chosen)

    def _steps(
        self, ids: Ids, current: CurrentPolicy, options: GenerationOptions
    ) -> Iterator[GeneratedToken]:
        return generate_tokens(
            self._sessions,
            ids,
            current,
            options,
            sampling=options.sampling(self.sampling),
            eos=self.text.eos_token_ids,
            constraint=self._constraint(options),
            **self._guessing(options),
        )

    def _guessing(self, options: GenerationOptions) -> dict[str, Any]:
        """What a generation guesses by."""
        wanted = options.speculate
        if wanted is None:
            wanted = self._sessions.backend.device == "cpu"
        if not wanted:
            return {}
        text = options.expected
        expected = self.text.encode(text, add_special_tokens=False).tolist() if text else []
        return {"learn": self._learned_of, "expected": expected}

    def _learned_of(self, policy: Policy) -> Learned | None:
        path = policy.uniform
        return None if path is None else self._learned(path, policy.head)

    def _learn(self, path: Path, head: Action) -> Learned:
        costs, reruns = self.manifest.costs.passes, bool(self.manifest.mixers)
        return Learned(costs, path, head, self._sessions.widened, reruns)

    def _constraint(self, options: GenerationOptions) -> Constraint | None:
        if options.grammar is None:
            return None
        if self._guidance is None:
            self._guidance = guidance_tokenizer(self.text, self.manifest.model.vocab_size)
        return Constraint(options.grammar, self._guidance)

    def stream(
        self,
        prompt: Prompt,
        *,
        options: GenerationOptions | None = None,
        policy: str | Policy | None = None,
        budget: Budget | None = None,
        prefill: Action | None = None,
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        speculate: bool | None = None,
        expected: str | None = None,
        stop: str | Sequence[str] | None = None,
        grammar: Grammar | None = None,
        logprobs: int | None = None,
        cache: Cache | None = None,
        temperature: float | None = None,
        repetition_penalty: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> Stream:
        """Generates text piece by piece; `close()` ends it and frees its cache.

        Args:
            prompt: raw text, chat messages, which the chat template turns into text, or ids.
            options: the value of whatever is None here; the rest is described there.

        Raises:
            PolicyError: an option or a message is not one that the model or the bundle can do.
            ContextLengthError: the prompt does not fit the context.
        """
        chosen = GenerationOptions.of(
            options,
            policy=policy,
            budget=budget,
            prefill=prefill,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            speculate=speculate,
            expected=expected,
            stop=stop,
            grammar=grammar,
            logprobs=logprobs,
            cache=cache,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
        )
        ids, current = self._encoded(prompt), self._current(chosen)
        steps = self._steps(ids, current, chosen)
        chunks = text_of(self.text, steps, len(ids), tuple(chosen.stop))
        first = next(chunks)  # errors surface here, not at the first use
        return Stream(_continued(first, chunks), current)

    generate = joined("generate", "Generates the whole text after a prompt, as it is.", stream)
    """Generates the whole text, a `Completion`; takes what `stream` takes."""

    chat = joined(
        "chat",
        "Generates the assistant's answer to messages, or to a string as the user's message; the "
        "chat template is applied.",
        stream,
        _as_messages,
    )
    """Generates the assistant's answer to messages, or to one message of the user."""

    astream = asynchronous(
        "astream", "Generates text piece by piece for `async for`; threads do the work.", stream
    )
    """Generates text piece by piece for `async for`, each token in a thread; likewise."""

    def new_batch(self, rows: int = ROWS, store: PrefixStore | None = None) -> Batch:
        """Runs several generations together; see `request`.

        Args:
            rows: batch size; each row has a KV cache as long as the longest.
            store: keeps what rows hold that are given to another text.

        Raises:
            DeviceError: the device cannot.
        """
        return Batch(self._sessions, rows, store)

    def request(
        self, prompt: Prompt, deliver: Deliver, options: GenerationOptions | None = None
    ) -> Request:
        """A generation for a batch of this model.

        Args:
            prompt: raw text, or chat messages.
            deliver: takes its chunks.
            options: without a cache, which is for single generations.

        Raises:
            PolicyError: an option or a message is not one that the model or the bundle can do.
            ContextLengthError: the prompt does not fit the context.
        """
        options = GenerationOptions.of(options)
        if options.cache is not None:
            raise PolicyError("generations of a batch have no cache of yours")
        ids, current = self._encoded(prompt), self._current(options)
        generation = functools.partial(
            Generation,
            ids=ids,
            current=current,
            options=options,
            sampling=options.sampling(self.sampling),
            eos=self.text.eos_token_ids,
            constraint=self._constraint(options),
            **self._guessing(options),
        )
        writer = TextWriter(self.text, len(ids), tuple(options.stop))
        plan = prefill_plan(self._sessions, current.policy, options.prefill)
        return Request(ids, current, generation, writer, plan, deliver)

    def batch(
        self,
        prompts: Sequence[Prompt],
        *,
        options: GenerationOptions | None = None,
        rows: int = ROWS,
        on_done: Callable[[int, Completion], None] = lambda index, completion: None,
    ) -> list[Completion]:
        """Generates the texts of many prompts, in batches.

        Args:
            prompts: raw texts or chats.
            options: of all of them; without a cache.
            rows: how many run at once.
            on_done: called with the index and the text of each as it ends.

        Returns:
            A text for each prompt, in their order.

        Raises:
            PolicyError: an option or a message is not one that the model or the bundle can do.
            ContextLengthError: a prompt does not fit the context.
        """
        if isinstance(prompts, str):
            raise PolicyError("prompts must be a list of prompts, not text")
        check_count("rows", rows)
        batch = self.new_batch(max(1, min(rows, len(prompts))))
        chunks: list[list[Chunk]] = [[] for _ in prompts]
        done: dict[int, Completion] = {}

        def deliver(index: int, piece: Chunk | Exception) -> None:
            if isinstance(piece, Exception):
                raise piece
            chunks[index].append(piece)
            if piece.finish_reason is not None:
                done[index] = Completion.of(chunks[index])
                on_done(index, done[index])

        requests = []
        for index, prompt in enumerate(prompts):
            try:
                requests.append(self.request(prompt, functools.partial(deliver, index), options))
            except DashError as error:
                raise type(error)(f"prompt {index}: {error}") from None
        for request in requests:
            batch.submit(request)
        while batch.step():
            pass
        return [done[index] for index in range(len(prompts))]

    def _current(self, options: GenerationOptions) -> CurrentPolicy:
        at = functools.partial(self.policy, options.policy)
        return CurrentPolicy(self.policy_of(options), at)

    def _encoded(self, prompt: Prompt) -> Ids:
        if isinstance(prompt, np.ndarray) or (
            isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], (int, np.integer))
        ):
            return self._checked(prompt)  # type: ignore[arg-type]
        encode = self.text.encode if isinstance(prompt, str) else self.text.encode_chat
        return self._checked(encode(prompt))  # type: ignore[arg-type]

    def _checked(self, ids: Ids | Sequence[int]) -> Ids:
        try:
            array = np.asarray(ids)
        except ValueError:  # lists in the list
            raise PolicyError("token ids must be a flat list of integers") from None
        if array.size and array.dtype.kind not in "iu":
            raise PolicyError(f"token ids must be integers, not {array.dtype}")
        array = array.astype(np.int64, copy=False)
        check_prompt(array, self.manifest.model.max_length, self.manifest.model.vocab_size)
        return array


def _continued(first: Chunk, rest: Generator[Chunk]) -> Generator[Chunk]:
    try:
        yield first
        yield from rest
    finally:
        rest.close()


def device_of(bundle: Bundle, device: Device | None = None) -> Device:
    """The device that a bundle was exported for.

    Args:
        bundle: to be loaded.
        device: that it must be; None takes any that this ONNX Runtime has.

    Raises:
        DeviceError: it is another one, or not available.
    """
    built_for = bundle.manifest.target.device
    if device is not None:
        known_device(device)
    if device not in (None, built_for):
        raise DeviceError(
            f"{bundle.folder} was exported for device {built_for!r}, not {device!r}; "
            f"export again with --device {device}"
        )
    if not has_device(built_for):
        raise DeviceError(
            f"{bundle.folder} was exported for device {built_for!r}, which this ONNX Runtime does "
            "not have: for cuda, install the extra `[gpu]` and an NVIDIA driver"
        )
    return built_for


def load(
    folder: str | os.PathLike[str],
    *,
    device: Device | None = None,
    threads: int | None = None,
    share_pool: bool = True,
    policy: str | Policy = "",
    budget: Budget | None = None,
    memory: Memory = "high",
    cuda_graphs: bool = False,
    sha256: str | None = None,
) -> Model:
    """Opens a bundle; graphs load on first use.

    All sessions share ORT's global thread pool. While it exists, ORT refuses sessions with their
    own threads, so `InferenceSession` is made to give the app's later sessions the pool, too. With
    `threads=1` there is no pool, and with `share_pool=False` the app's sessions are not changed.

    Args:
        folder: what `dash-export` wrote.
        device: `cpu` or `cuda`, to refuse a bundle for another device; None uses the bundle's
            device.
        threads: size of ORT's thread pool, shared by the whole process; None uses all cores.
        share_pool: False leaves `InferenceSession` as it is; the app's later sessions must then set
            `use_per_session_threads = False` themselves. The first `load` that creates the pool
            decides.
        policy: default of all generations; see `dash_onnx.core.policy.make_policy`.
        budget: default of all generations: a fraction of a token's time at the highest exported
            precision, or a preset.
        memory: `high` runs passes of many rows (prompts, batches) in the wide form where it is
            accurate enough: faster, at about one more byte per weight. `low` loads only the
            policy's own graphs.
        cuda_graphs: captures each layer and action as a CUDA graph and replays it. Generations on
            several threads then take turns, and other CUDA work of the process must not use the
            default stream.
        sha256: required checksum of `dash.json`, which has the checksums of all other files.

    Raises:
        PolicyError: an option is out of range, or the bundle cannot do the policy or the budget.
        BundleError: the bundle is missing, damaged or of another format version.
        DeviceError: ORT or the device is not available, or the bundle is for another one.
    """
    if memory not in get_args(Memory):
        raise PolicyError(f"memory={memory!r} must be one of {', '.join(get_args(Memory))}")
    if threads is not None:
        check_count("threads", threads, _MOST_THREADS)
    check_type("policy", policy)
    check_type("budget", budget)
    for name, value, other in (
        ("folder", folder, os.PathLike),
        ("device", device, NoneType),
        ("sha256", sha256, NoneType),
    ):
        if not isinstance(value, (str, other)):
            raise PolicyError(f"{name}={value!r} must be text")
    bundle = Bundle(folder, sha256=sha256)
    backend = open_backend(device_of(bundle, device), cuda_graphs=cuda_graphs)
    use_threads(threads, share=share_pool)
    return Model(bundle, backend, policy=policy, budget=budget, memory=memory)
