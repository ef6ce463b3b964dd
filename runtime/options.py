"""The options of a generation, and their defaults, for the Python API and the tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from dash_onnx.core.actions import Form
from dash_onnx.core.arrays import Logits
from dash_onnx.core.budget import Budget
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.drafts import MAX_DRAFT_TOKENS
from dash_onnx.runtime.grammar import Grammar
from dash_onnx.runtime.sampling import Sampling

LogitsProcessor = Callable[[Sequence[int], Logits], Logits]
"""Takes the ids of prompt and answer so far and the next token's logits `[V]`; returns logits.

It must not modify its arguments. It runs before grammar, penalty and temperature, and is called
once for each token in the text's order, even if several are verified in one pass."""


class Options(TypedDict, total=False):
    """What the generating methods take by keyword: the fields of `GenerationOptions`.

    None is the same as leaving an option out.
    """

    policy: str | Policy | None
    budget: Budget | None
    prefill: Form | None
    max_new_tokens: int | None
    max_thinking_tokens: int | None
    chat_template_kwargs: Mapping[str, Any] | None
    ignore_eos: bool | None
    speculate: bool | int | None
    expected: str | None
    stop: str | Sequence[str] | None
    special_tokens: Sequence[str] | None
    grammar: Grammar | None
    logprobs: int | None
    logits_processor: LogitsProcessor | None
    temperature: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The options of a generation.

    `Sampling` describes the sampling options; None follows the model's generation_config.json, else
    decoding is greedy.

    Attributes:
        policy: how each layer runs; see `dash_onnx.core.policy.make_policy`. Empty uses
            the policy that the model was loaded with.
        budget: fraction of a token's time at the highest exported precision, or a preset; None uses
            the budget that the model was loaded with, for its own policy, `dash` and `static`.
        prefill: precision of the prompt; None: the highest that the policy uses at its budget, or
            the wide form, see `memory` of `dash_onnx.load`; `wide`: that form, whatever it loses.
        max_new_tokens: most tokens to generate, thoughts included.
        max_thinking_tokens: most tokens of thoughts, after which the answer begins. 0 turns them
            off and any other number on, if the chat template supports it (its variable
            `enable_thinking`); None leaves that to the template. It has no effect on raw text, or
            on a model without tags for thoughts.
        chat_template_kwargs: variables of the chat template, such as `enable_thinking`.
        ignore_eos: go on after an end-of-sequence token (benchmarks).
        speculate: speculative decoding: draft tokens from n-grams of the text are verified in one
            pass, where that is faster. The text is the same, up to rounding. It requires a policy
            that uses one path for every token; None turns it on where that holds, on the CPU. A
            number is the most draft tokens in one pass, 0 to 15.
        expected: text that the answer is likely to contain, such as a file before its edit; its
            n-grams are drafted, too.
        stop: strings that end the text; they are not part of it. They do not end thoughts.
        special_tokens: those of the model's special tokens that are part of the text after the
            thoughts, such as `["[TOOL_CALLS]"]`; others are left out.
        grammar: constrains the text after the thoughts.
        logprobs: return each token's log probability, and those of this many most likely tokens.
        logits_processor: changes the logits before the next token is drawn; see `LogitsProcessor`.
    """

    policy: str | Policy = ""
    budget: Budget | None = None
    prefill: Form | None = None
    max_new_tokens: int = 512
    max_thinking_tokens: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = False
    speculate: bool | int | None = None
    expected: str = ""
    stop: str | Sequence[str] = ()
    special_tokens: Sequence[str] = ()
    grammar: Grammar | None = None
    logprobs: int | None = None
    logits_processor: LogitsProcessor | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            check_type(one.name, getattr(self, one.name))
        self.sampling(Sampling())  # checks the ranges
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if "" in stop:
            raise PolicyError("an empty stop string would end every text at once")
        if self.max_new_tokens < 1:
            raise PolicyError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        most = self.max_thinking_tokens
        if most is not None and most < 0:
            raise PolicyError(f"max_thinking_tokens={most} must be at least 0")
        if self.speculate is not None and not 0 <= self.speculate <= MAX_DRAFT_TOKENS:
            raise PolicyError(f"speculate={self.speculate} must be in 0..{MAX_DRAFT_TOKENS}")
        if self.logprobs is not None and not 0 <= self.logprobs <= _MAX_LOGPROBS:
            raise PolicyError(f"logprobs={self.logprobs} must be in 0..{_MAX_LOGPROBS}")

    def sampling(self, own: Sampling) -> Sampling:
        """How tokens are drawn.

        Args:
            own: the model's values for options that are None here.
        """
        names = [one.name for one in dataclasses.fields(Sampling)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(own, **given)

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables that the chat template gets in addition to the messages."""
        most = self.max_thinking_tokens
        thinking = {} if most is None else {"enable_thinking": most > 0}
        return {**thinking, **self.chat_template_kwargs}

    @classmethod
    def of(cls, options: GenerationOptions | None, **given: Any) -> GenerationOptions:
        """Options, or the defaults, with every value that is given and not None.

        Raises:
            PolicyError: a value is out of range.
            TypeError: there is no such option.
        """
        if options is not None and not isinstance(options, cls):
            raise PolicyError(f"options={options!r} must be GenerationOptions")
        chosen = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(options or cls(), **chosen)


_MAX_BITS = 128  # of an integer
_MAX_LOGPROBS = 20  # as in OpenAI's API
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
_NUMBERS = ("temperature", *_PENALTIES, "top_p", "min_p")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(_NUMBERS, ((int, float, type(None)), "a number")),
    "max_new_tokens": ((int,), "an integer"),
    "max_thinking_tokens": ((int, type(None)), "an integer"),
    "chat_template_kwargs": ((Mapping,), "a dict"),
    "top_k": ((int, type(None)), "an integer"),
    "logprobs": ((int, type(None)), "an integer"),
    "grammar": ((Grammar, type(None)), "a Grammar"),
    "logits_processor": ((Callable, type(None)), "a function of ids and logits"),  # type: ignore[dict-item]
    "seed": ((int, type(None)), "an integer"),
    "ignore_eos": ((bool,), "True or False"),
    "policy": ((str, Policy), "a name or a Policy"),
    "budget": ((int, float, str, type(None)), "a number or the name of a preset"),
    "prefill": ((str, type(None)), "the name of a precision, or wide"),
    "speculate": ((bool, int, type(None)), f"True, False, None or in 0..{MAX_DRAFT_TOKENS}"),
    "expected": ((str,), "text"),
    "stop": ((str, list, tuple), "text, or a list of texts"),
    "special_tokens": ((list, tuple), "a list of texts"),
}


def check_type(name: str, value: Any) -> None:
    """Refuses a value of the wrong type; NumPy's numbers are numbers."""
    kinds, what = _KINDS[name]
    plain = value.item() if hasattr(value, "item") else value
    wrong = not isinstance(plain, kinds) or (isinstance(plain, bool) and bool not in kinds)
    if isinstance(plain, int) and plain.bit_length() > _MAX_BITS:
        raise PolicyError(f"{name} is too large a number")
    if name in ("stop", "special_tokens") and not wrong:
        wrong = not all(isinstance(word, str) for word in value)
    if wrong:
        raise PolicyError(f"{name}={value!r} must be {what}")


GREEDY = GenerationOptions(temperature=0.0, repetition_penalty=1.0, speculate=False)
"""The most likely token, one per pass, whatever generation_config.json says: for comparisons."""


def check_count(name: str, value: Any, most: int = 2**31 - 1) -> None:
    """Refuses what is not a count.

    Raises:
        PolicyError: not an integer, less than 1, or more than `most`.
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not 1 <= value <= most:
        raise PolicyError(f"{name}={value!r} must be an integer in 1..{most}")
