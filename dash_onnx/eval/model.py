"""A bundle as a model of lm-evaluation-harness, under the name `dash`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import dash_onnx
from dash_onnx.core.budget import Budget
from dash_onnx.core.errors import ContextLengthError, DashError
from dash_onnx.core.policy import Policy
from dash_onnx.core.progress import Loop
from dash_onnx.core.statistics import log_softmax
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GREEDY, GenerationOptions

T = TypeVar("T")

_ARGUMENTS = ("policy", "budget", "threads", "max_gen_toks", "speculate")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@register_model("dash")
class DashLM(TemplateLM):
    """Scores and generates token by token under a policy.

    Every context token but the last is prefilled; the last one and the scored tokens are decoded.
    The choices of a question share the K/V cache of its context.

    Attributes:
        model: the loaded bundle.
        policy: the policy that chooses each token's path.
        max_length: tokens of the context; a longer request loses its beginning.
        truncated: number of requests that were truncated this way.
    """

    def __init__(
        self,
        bundle: str | Model = "",
        policy: str | Policy = "",
        budget: Budget | None = None,
        threads: int | None = None,
        max_gen_toks: int = 256,
        speculate: bool | int | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
        **others: object,
    ):
        """Loads a bundle, for the device that it was exported for.

        Args:
            bundle: its folder, or a loaded one.
            policy: see `dash_onnx.core.policy.make_policy`.
            budget: see `dash_onnx.core.policy.make_policy`.
            threads: see `dash_onnx.load`.
            max_gen_toks: most tokens to generate for tasks that set no limit.
            speculate: used for generated texts; see `GenerationOptions`.
            batch_size: ignored; the harness passes it to every model. Sequences run one by one.
            max_batch_size: ignored, like `batch_size`.
            device: ignored, like `batch_size`.
            others: none; a mistyped name is refused.

        Raises:
            DashError: `bundle` is missing or cannot be used, or an argument is not known.
        """
        super().__init__()
        if not bundle or others:
            told = f"unknown: {', '.join(others)}" if others else "bundle=FOLDER is missing"
            raise DashError(f"--model_args: {told}; known are bundle, {', '.join(_ARGUMENTS)}")
        # The harness forks to compute standard errors: with ONNX Runtime's threads that can hang.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        if not isinstance(bundle, Model):
            bundle = dash_onnx.load(bundle, threads=threads)
        self.model = bundle
        chosen = GenerationOptions(policy=policy, budget=budget, speculate=speculate)
        self.policy, self._speculate = bundle.policy_of(chosen), speculate
        self.max_length = bundle.manifest.model.max_length
        self.truncated = 0
        self._max_gen_toks = max_gen_toks
        self._cache = bundle.new_cache()
        self._costs: list[float] = []

    def get_model_info(self) -> dict[str, Any]:
        """Entries added to the harness's results, such as the mean profiled cost per token."""
        cost_ms = float(np.mean(self._costs)) if self._costs else None
        return {"policy": self.policy.name, "cost_ms": cost_ms, "truncated": self.truncated}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self.model.text.end_token_id
        return min(self.model.text.eos_token_ids, default=0) if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        start = self.model.text.start_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """Key that separates requests in the harness's cache."""
        return self.model.manifest.model.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The bundle's own chat template."""
        return self.model.text.chat_template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to the next answer or inside the last message."""
        return self.model.text.render_chat(chat_history)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Token ids; None adds special tokens unless the text begins with them, as chats do."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.model.text.token(self.prefix_token_id))
        return self.model.text.encode(string, add_special_tokens=add_special_tokens).tolist()

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts in nats, in windows of the context's length."""
        totals = []
        for (text,) in _shown([request.args for request in requests], disable_tqdm):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            total = sum(self._score(*make_disjoint_window(window))[0] for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        answers = []
        for texts, context, continuation in _shown(requests, disable_tqdm):
            answers.append(self._score(context, continuation))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of a continuation in nats, and whether it is the most likely one."""
        if not continuation:  # its characters were merged into the context's last token
            return 0.0, True
        ids = self._fitting((context + continuation)[:-1], self.max_length)
        targets = continuation[-len(ids) :]
        total, greedy = 0.0, True
        prompt_tokens = len(ids) - len(targets)
        scored = self.model.score(
            ids, prompt_tokens=prompt_tokens, policy=self.policy, cache=self._cache
        )
        for target, token in zip(targets, scored, strict=True):
            total += float(log_softmax(token.logits)[target])
            greedy &= int(token.logits.argmax()) == target
            self._costs.append(self.policy.cost_ms(token.path, self.model.manifest.costs))
        return total, greedy

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to a stop string, the end of the text, or `max_gen_toks`."""
        answers = []
        for context, options in _shown([r.args for r in requests], disable_tqdm):
            normal = normalize_gen_kwargs(options, self._max_gen_toks)
            answers.append(self._generate(context, normal))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        return answers

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise ContextLengthError(
                f"max_gen_toks={options['max_gen_toks']} leaves no room for a prompt: the context "
                f"of this bundle is {self.max_length}"
            )
        text, until = self.model.text, [word for word in options["until"] if word]
        tokens: list[int] = []
        for step in self.model.generate_step(
            self._fitting(self.tok_encode(context) or [self.prefix_token_id], room),
            options=dataclasses.replace(GREEDY, speculate=self._speculate),
            policy=self.policy,
            max_new_tokens=options["max_gen_toks"],
            **{name: options[name] for name in _SAMPLING if name in options},
        ):
            if tokens:  # the first token comes from the prompt's pass
                self._costs.append(self.policy.cost_ms(step.path, self.model.manifest.costs))
            if step.finish_reason == "stop":
                break
            tokens.append(step.token)
            so_far = text.tokenizer.decode(tokens, skip_special_tokens=False)
            if any(word in so_far for word in until):
                break
        answer: str = postprocess_generated_text(text.decode(tokens), until, None)
        return answer

    def _fitting(self, ids: list[int], length: int) -> list[int]:
        self.truncated += len(ids) > length
        return ids[-length:]


def _shown(requests: Sequence[T], silent: bool) -> Iterable[T]:
    """Yields requests in order and shows progress, since tasks take minutes."""
    return requests if silent else Loop("requests", requests)
