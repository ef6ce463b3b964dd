"""The K/V of a conversation, kept between its generations."""

from __future__ import annotations

import threading

import numpy as np

from dash_onnx.core.arrays import Ids
from dash_onnx.core.errors import PolicyError
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Sessions


class Cache:
    """The K/V of a conversation, kept between generations. One generation at a time uses it."""

    def __init__(self, sessions: Sessions):
        """Starts empty."""
        self.tokens: list[int] = []
        self._sequence = sessions.new_sequence()
        self._busy = threading.Lock()

    def __len__(self) -> int:
        """Tokens it holds."""
        return self._sequence.length

    def acquire(self, ids: Ids) -> tuple[SequenceState, Ids]:
        """Takes the sequence; returns it with the part of the prompt that it does not hold yet.

        Raises:
            PolicyError: another generation is using it.
        """
        if not self._busy.acquire(blocking=False):
            raise PolicyError("this cache is in use by another generation; give each its own")
        held = np.asarray(self.tokens, np.int64)
        # The last token runs again: it gives the logits.
        shortest = max(min(len(held), len(ids) - 1), 0)
        differs = np.flatnonzero(held[:shortest] != ids[:shortest])
        common = int(differs[0]) if len(differs) else shortest
        self._sequence.truncate(common)
        del self.tokens[common:]
        return self._sequence, ids[common:]

    def release(self) -> None:
        """Gives the sequence back; an interrupted run leaves no half-written token behind."""
        del self.tokens[self._sequence.length :]
        self._sequence.truncate(len(self.tokens))
        self._busy.release()
