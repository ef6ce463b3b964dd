"""From a prompt and options to a request: policy, sampling, grammar and drafts resolved."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dash_onnx.core.actions import Action, ActionPath
from dash_onnx.core.arrays import Ids
from dash_onnx.core.budget import Budget
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.conversation import Message, begun_answer, checked_messages
from dash_onnx.core.errors import BundleError, ContextLengthError, PolicyError
from dash_onnx.core.facts import ModelFacts
from dash_onnx.core.policy import Policy, make_policy
from dash_onnx.core.text import TextCodec
from dash_onnx.core.thoughts import Thoughts
from dash_onnx.runtime.drafts import DraftStats
from dash_onnx.runtime.generate import CurrentPolicy, Piece, Request, prefill_plan
from dash_onnx.runtime.grammar import Constraint, guidance_tokenizer
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.results import Chunk, GeneratedToken
from dash_onnx.runtime.sampling import Sampling
from dash_onnx.runtime.sessions import Sessions
from dash_onnx.runtime.writer import TextWriter

_TARGETS = 16  # whose draft statistics are kept

Prompt = str | Sequence[Message] | Sequence[int] | Ids
"""Raw text, the messages of a conversation, or token ids `[S]` in an array or a list."""


def checked_ids(ids: Ids | Sequence[int], model: ModelFacts) -> Ids:
    """Ids as an array `[S]` int64.

    Raises:
        PolicyError: they are not valid ids of this model.
        ContextLengthError: they do not fit the context.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # nested lists
        raise PolicyError("token ids must be a flat list of integers") from None
    if array.size and array.dtype.kind not in "iu":
        raise PolicyError(f"token ids must be integers, not {array.dtype}")
    array = array.astype(np.int64, copy=False)
    if array.ndim != 1 or len(array) == 0:
        if array.size == 0:
            raise PolicyError("the prompt is empty, and no token precedes it")
        raise PolicyError(f"the prompt is of shape {array.shape}, not a list of token ids")
    least, most = int(array.min()), int(array.max())
    if least < 0 or most >= model.vocab_size:
        raise PolicyError(f"token ids must be in 0..{model.vocab_size - 1}; found {least}..{most}")
    if len(array) > model.max_length:
        raise ContextLengthError(
            f"this model's maximum context length is {model.max_length} tokens, the prompt has "
            f"{len(array)}; shorten it, or export with a longer --max-length"
        )
    return array


class Requests:
    """Makes the requests of a model.

    Attributes:
        text: tokenizer and chat template.
        sampling: the defaults of the model's generation_config.json.
    """

    def __init__(
        self, bundle: Bundle, sessions: Sessions, policy: str | Policy, budget: Budget | None
    ):
        """Takes the model's own policy and budget, for requests that name none."""
        self.text = TextCodec(bundle)
        try:
            self.sampling = Sampling(**self.text.sampling)  # type: ignore[arg-type]
        except PolicyError as error:
            raise BundleError(f"{bundle.folder / 'generation_config.json'}: {error}") from None
        self._sessions, self._manifest = sessions, sessions.manifest
        self._default = (policy, budget)
        self._draft_stats = functools.lru_cache(_TARGETS)(functools.partial(_new_stats, sessions))

    def policy(self, policy: str | Policy | None = None, budget: Budget | None = None) -> Policy:
        """See `Model.policy`."""
        own, default = self._default
        if budget is None and (not policy or policy in ("dash", "static")):
            budget = default
        return make_policy(policy or own, self._manifest, budget)

    def policy_of(self, options: GenerationOptions) -> Policy:
        """See `Model.policy_of`."""
        policy = self.policy(options.policy, options.budget)
        if options.speculate and policy.uniform is None:
            raise PolicyError(
                f"draft tokens are verified on one path for every token, such as int8; policy "
                f"{policy.name!r} has none: leave speculate out"
            )
        return policy

    def of_text(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        deliver: Callable[[Chunk | Exception], None],
        raw: bool = False,
    ) -> Request[Chunk]:
        """A request whose pieces are text.

        Args:
            prompt: raw text, which is continued as it is, chat messages, which the chat template
                turns into text, or ids of such a text. A last message from the assistant is
                continued, too.
            options: options of the generation.
            deliver: see `Request`.
            raw: treat ids as raw text, in which no thoughts are looked for, as in a `str`.

        Raises:
            PolicyError: the model or the bundle does not support an option or a message.
            ContextLengthError: the prompt does not fit the context.
        """
        ids = self._encoded(prompt, options)
        raw = raw or isinstance(prompt, str) or _continued(prompt)
        before = self.text.end(ids.tolist()) if raw else ()
        shown = self._control(options.special_tokens)
        writer = TextWriter(self.text, len(ids), tuple(options.stop), before, shown)
        return self.make(ids, options, writer.add, deliver, raw=raw)

    def make(
        self,
        ids: Ids,
        options: GenerationOptions,
        write: Callable[[GeneratedToken], Piece],
        deliver: Callable[[Piece | Exception], None],
        *,
        raw: bool = False,
    ) -> Request[Piece]:
        """Makes a request.

        Args:
            ids: the prompt `[S]`, checked.
            options: options of the generation.
            write: see `Request`.
            deliver: see `Request`.
            raw: whether no thoughts are looked for.

        Raises:
            PolicyError: the model or the bundle does not support an option.
        """

        def at(budget: Budget) -> Policy:
            policy = self.policy_of(dataclasses.replace(options, budget=budget))
            self._sessions.check_memory(
                policy, prefill_plan(self._sessions, policy, options.prefill)
            )
            return policy

        current = CurrentPolicy(self.policy_of(options), at)
        drafts = options.speculate
        if drafts is None:
            drafts = self._sessions.backend.device == "cpu"
        likely = options.expected if drafts else ""
        return Request(
            ids=ids,
            current=current,
            options=options,
            sampling=options.sampling(self.sampling),
            plan=prefill_plan(self._sessions, current.policy, options.prefill),
            eos=self.text.eos_token_ids,
            stops=self._control(options.stop),
            constraint=Constraint(options.grammar, self._guidance) if options.grammar else None,
            thoughts=Thoughts() if raw else self.text.thoughts(ids, options.max_thinking_tokens),
            stats_of=self._stats_of if drafts else lambda policy: None,
            expected=self.text.encode(likely, add_special_tokens=False).tolist() if likely else (),
            write=write,
            deliver=deliver,
        )

    def _encoded(self, prompt: Prompt, options: GenerationOptions) -> Ids:
        if isinstance(prompt, np.ndarray) or (
            isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], (int, np.integer))
        ):
            return self.checked(prompt)  # type: ignore[arg-type]
        if isinstance(prompt, str):
            return self.checked(self.text.encode(prompt))
        variables = options.template_variables
        return self.checked(self.text.encode_chat(prompt, variables=variables))  # type: ignore[arg-type]

    def checked(self, ids: Ids | Sequence[int]) -> Ids:
        """See `checked_ids`."""
        return checked_ids(ids, self._manifest.model)

    def _control(self, words: Sequence[str]) -> frozenset[int]:
        """Ids of those of the words that are control tokens."""
        control = self.text.control
        return frozenset(control[word] for word in words if word in control)

    def _stats_of(self, policy: Policy) -> DraftStats | None:
        path = policy.uniform
        return None if path is None else self._draft_stats(path, policy.head)

    @functools.cached_property
    def _guidance(self) -> Any:
        return guidance_tokenizer(self.text, self._manifest.model.vocab_size)


def _continued(prompt: Prompt) -> bool:
    """Whether a prompt is a conversation whose last message is to be continued."""
    if not isinstance(prompt[-1], Mapping):
        return False
    return begun_answer(checked_messages(prompt)) != ""  # type: ignore[arg-type]


def _new_stats(sessions: Sessions, path: ActionPath, head: Action) -> DraftStats:
    manifest = sessions.manifest
    reruns = manifest.recurrence is not None
    return DraftStats(
        manifest.costs.passes, path, head, sessions.widened, reruns, sessions.has_wide_head
    )
