"""The options of a generation."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dash_onnx.core.actions import Action
from dash_onnx.core.budget import Budget
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.sampling import Sampling

if TYPE_CHECKING:
    from dash_onnx.runtime.generate import Cache


@dataclass(frozen=True)
class Options:
    """What a user may choose per generation.

    Attributes:
        policy: which action each layer takes; see `dash_onnx.core.policy.make_policy`.
        budget: fraction of the full time per token, or a preset; None takes the model's own.
        prefill: precision of the prompt; None takes the highest exported.
        max_new_tokens: most tokens to generate.
        ignore_eos: go on after an end-of-sequence token (benchmarks).
        stop: strings that end the text; they are not part of it.
        cache: a `Cache` from `Model.new_cache`: the prompt's common prefix with what it
            holds is not computed again.
        sampling: how the next token is drawn.
    """

    policy: str | Policy = ""
    budget: Budget | None = None
    prefill: Action | None = None
    max_new_tokens: int = 512
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    cache: Cache | None = None
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(cls, **options: Any) -> Options:
        """Builds options from keywords; those of `Sampling` may be given directly.

        Raises:
            PolicyError: a value is out of range.
            TypeError: an unknown option.
        """
        own = {f.name for f in dataclasses.fields(cls)}
        drawn = {f.name for f in dataclasses.fields(Sampling)}
        for name in options:
            if name not in own | drawn:
                close = difflib.get_close_matches(name, own | drawn, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"unknown option {name!r}{hint}")
        sampling = {name: value for name, value in options.items() if name in drawn}
        if sampling and "sampling" in options:
            raise TypeError(f"give either sampling= or {', '.join(sampling)}, not both")
        if sampling:
            options = {n: v for n, v in options.items() if n not in drawn}
            options["sampling"] = Sampling(**sampling)
        if isinstance(options.get("stop"), str):
            options["stop"] = (options["stop"],)
        result = cls(**options)
        if "" in result.stop:
            raise PolicyError("an empty stop string would end every text at once")
        if result.max_new_tokens < 1:
            raise PolicyError(f"max_new_tokens={result.max_new_tokens} must be at least 1")
        return result
