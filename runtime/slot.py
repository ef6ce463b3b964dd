"""A sequence that requests use one after another, and what they leave in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dash_onnx.core.arrays import Ids, common_length
from dash_onnx.runtime.generate import Generation, Request
from dash_onnx.runtime.prefix import MIN_PREFIX
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import PromptPlan


@dataclass(eq=False)
class Slot:
    """A sequence, what its K/V cache holds, and the request that uses it.

    Attributes:
        number: its row of a batch.
        state: the sequence.
        tokens: tokens that the K/V cache holds.
        cache_key: that of the request that it holds, see `Request.cache_key`; None serves any
            request, as the cache of one conversation does.
        prompt: tokens of the last request's prompt.
        used: when it was last assigned, as a running number.
        request: the request that uses it.
        going: its generation.
        rest: tokens that must run before the next one is drawn.
        plan: how they run.
        started: when its pass began, in seconds.
    """

    number: int
    state: SequenceState
    tokens: list[int] = field(default_factory=list)
    cache_key: str | None = ""
    prompt: int = 0
    used: int = 0
    request: Request[Any] | None = None
    going: Generation | None = None
    rest: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    plan: PromptPlan | None = None
    started: float = 0.0

    def common(self, request: Request[Any]) -> int:
        """How many tokens of a prompt it holds, without the last, which must run for the logits."""
        if self.cache_key not in (None, request.cache_key):
            return 0
        return self._held(request.ids)

    def kept(self, request: Request[Any]) -> int:
        """Tokens of a prompt that are worth its slot: 0 where most of what it holds would go.

        Unless only the last answer does, as where a template leaves out its thoughts.
        """
        common = self.common(request)
        kept = 2 * common >= len(self.lasting) or common + MIN_PREFIX >= self.prompt
        return common if kept else 0

    def _held(self, ids: Ids) -> int:
        common = common_length(np.asarray(self.lasting, np.int64), ids[:-1])
        return self.state.kv.place(common)

    def reuse(self, ids: Ids) -> Ids:
        """Keeps what it holds of a prompt; returns what still has to run."""
        common = self.state.truncate(self._held(ids))
        del self.tokens[common:]
        return ids[common:]

    def exchange(self, other: Slot) -> None:
        """Swaps rows with a slot that has no request; each keeps what its K/V cache holds."""
        try:
            self.state.kv.exchange(other.state.kv)
        except BaseException:  # some layers are swapped
            for slot in (self, other):
                slot.tokens.clear()
                slot.state.truncate(0)
            raise
        self.number, other.number = other.number, self.number
        self.state, other.state = other.state, self.state
        if self.going is not None:
            self.going.move(self.state)

    @property
    def answers(self) -> bool:
        """Whether its prompt has run; from then on, `rest` holds tokens that a grammar forced."""
        return self.going is not None and self.going.count > 0

    def next_tokens(self, ahead: int) -> list[int]:
        """What a pass runs: what is left of `rest`, or the last token, and draft tokens after it.

        Args:
            ahead: most tokens after the first one.
        """
        assert self.going is not None
        certain = self.rest[: ahead + 1].tolist() or self.going.text[-1:]
        more = ahead + 1 - len(certain) if len(certain) >= len(self.rest) else 0
        return certain + self.going.draft(more)

    @property
    def lasting(self) -> list[int]:
        """The tokens whose K/V can serve later requests: none that another budget wrote."""
        request = self.request
        if self.cache_key is None or request is None or not request.current.changed:
            return self.tokens
        return self.tokens[: len(request.ids)]


def longest(slots: Sequence[Slot]) -> int:
    """Tokens of the slot that holds most."""
    return max(slot.state.length for slot in slots)
