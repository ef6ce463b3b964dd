"""The options of a generation, and their defaults: the Python API and the tools take them here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dash_onnx.core.actions import Action
from dash_onnx.core.budget import Budget
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.sampling import Sampling

if TYPE_CHECKING:
    from dash_onnx.runtime.cache import Cache


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(Sampling):
    """What a user may choose for a generation, `Sampling` included.

    Attributes:
        policy: which action each layer takes; see `dash_onnx.core.policy.make_policy`. Empty takes
            the one that the model was loaded with.
        budget: fraction of the time that a token takes at the highest exported precision, or a
            preset; None takes the model's own.
        prefill: precision of the prompt; None: see `memory` of `dash_onnx.load`.
        max_new_tokens: most tokens to generate.
        ignore_eos: go on after an end-of-sequence token (benchmarks).
        stop: strings that end the text; they are not part of it.
        cache: from `Model.new_cache`: what it shares with the beginning of the prompt is not
            computed again.
    """

    policy: str | Policy = ""
    budget: Budget | None = None
    prefill: Action | None = None
    max_new_tokens: int = 512
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    cache: Cache | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name))
        super().__post_init__()
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if "" in stop:
            raise PolicyError("an empty stop string would end every text at once")
        if self.max_new_tokens < 1:
            raise PolicyError(f"max_new_tokens={self.max_new_tokens} must be at least 1")

    @classmethod
    def of(cls, options: GenerationOptions | None, **given: Any) -> GenerationOptions:
        """Options, or the defaults, with every value that is given and not None.

        Raises:
            PolicyError: a value is out of range.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(options or cls(), **chosen)


_NUMBERS = ("temperature", "repetition_penalty", "top_p", "min_p")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(_NUMBERS, ((int, float), "a number")),
    "max_new_tokens": ((int,), "an integer"),
    "top_k": ((int,), "an integer"),
    "seed": ((int, type(None)), "an integer"),
    "ignore_eos": ((bool,), "True or False"),
    "policy": ((str, Policy), "a name or a Policy"),
    "budget": ((int, float, str, type(None)), "a number or the name of a preset"),
    "prefill": ((str, type(None)), "the name of a precision"),
    "stop": ((str, list, tuple), "text, or a list of texts"),
}


def _check_type(name: str, value: Any) -> None:
    """Refuses what no caller can mean; NumPy's numbers are numbers."""
    if name == "cache":
        wrong, what = value is not None and not hasattr(value, "acquire"), "from Model.new_cache()"
    else:
        kinds, what = _KINDS[name]
        plain = value.item() if hasattr(value, "item") else value
        wrong = not isinstance(plain, kinds) or (isinstance(plain, bool) and bool not in kinds)
        if name == "stop" and not wrong:
            wrong = not all(isinstance(word, str) for word in value)
    if wrong:
        raise PolicyError(f"{name}={value!r} must be {what}")
