"""What a generation yields: tokens, pieces of text, and facts about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dash_onnx.core.actions import ActionPath, path_letters
from dash_onnx.core.arrays import Logits
from dash_onnx.core.statistics import log_softmax
from dash_onnx.runtime.drafts import Draft

FinishReason = Literal["stop", "length", "context"]
"""`stop`: EOS or a stop string; `length`: max_new_tokens; `context`: the context is full."""


class Logprobs(NamedTuple):
    """Log probabilities at one token, in nats, before temperature, filters and grammar.

    Attributes:
        token: log probability of the token that was drawn.
        top: ids of the most likely tokens, each with its log probability.
    """

    token: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: Logits, token: int, most: int) -> Logprobs:
        """From logits `[V]`."""
        logs = log_softmax(logits.astype(np.float32))
        likeliest = np.argpartition(-logs, most)[:most]
        ordered = likeliest[np.argsort(-logs[likeliest], kind="stable")]
        top = tuple((int(one), float(logs[one])) for one in ordered)
        return cls(float(logs[token]), top)


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token.

    Attributes:
        token: its id.
        path: the action of each layer in the pass that produced it.
        ms: wall time of that pass and the sampling, in milliseconds (the first: the prefill).
        finish_reason: set on the last token.
        draft: on the first token of a pass with draft tokens, how many there were and how many were
            accepted; the time of the pass is divided among its tokens.
        logprobs: if they were requested.
        thinking: whether it belongs to the thoughts before the answer; their tags do, too.
    """

    token: int
    path: ActionPath
    ms: float
    finish_reason: FinishReason | None = None
    draft: Draft | None = None
    logprobs: Logprobs | None = None
    thinking: bool = False


@dataclass(frozen=True, kw_only=True)
class Chunk(GeneratedToken):
    """A piece of generated text, with the token that completed it: see `GeneratedToken`.

    Attributes:
        text: text of the answer; may be empty while a character or a stop string is incomplete.
        reasoning: text of the thoughts, without their tags.
        prompt_tokens: length of the prompt.
        generated_tokens: how many tokens were generated so far.
    """

    text: str
    reasoning: str = ""
    prompt_tokens: int
    generated_tokens: int

    def __repr__(self) -> str:
        end = f", {self.finish_reason}" if self.finish_reason else ""
        path = path_letters(self.path)
        text = self.reasoning or self.text
        return f"<Chunk {text!r}: token {self.token}, {self.ms:.1f} ms, {path}{end}>"


@dataclass(frozen=True)
class ScoredToken:
    """The model's output for one token of a given text.

    Attributes:
        logits: for the next token, `[V]`; overwritten by the next result.
        path: the action of each layer.
        predicted_kl: predicted KL of each action of each layer, `[L, A]` nats, for the actions of
            `manifest.scorer`, 0 for those that the budget rules out; None if not requested, or if
            no scorer decides.
    """

    logits: Logits
    path: ActionPath
    predicted_kl: npt.NDArray[np.float32] | None = None
