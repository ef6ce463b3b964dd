"""Some sequences of a batch, with their own length, and their part in its passes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dash_onnx.runtime.kv import KVPart
from dash_onnx.runtime.passes import Pass
from dash_onnx.runtime.sequence import SequenceState


class Part(SequenceState):
    """Sequences of a batch, in the batch's memory.

    A row may run alone, like any sequence. In a pass of several rows, each row sets the positions
    of its tokens (`join` or `rest`); the part that covers all of them then calls `agree` and runs.
    """

    def __init__(self, whole: SequenceState, start: int, stop: int):
        """Takes the sequences `start` to `stop`."""
        self._whole, self._range, self.batch = whole, (start, stop), stop - start
        self.sessions, self._lock, self.num_layers = whole.sessions, whole._lock, whole.num_layers
        self._logits_of, self._widened, self._plain = whole._logits_of, whole._widened, whole._plain
        self.kv = KVPart(whole.kv, start, stop)
        self._moves = self.kv.moves
        self._lengths = whole._lengths.part(start, stop)
        mine = whole._passes[1]
        mine.logits = mine.logits or whole._logits(1)
        self._now = mine.part(self.kv, self._lengths, start, stop)
        self._now.logits = mine.logits.part(start, stop)
        self._passes = {1: self._now}
        self._shared: dict[int, Pass] = {}  # of several tokens of each sequence

    def _bound(self) -> Iterable[Pass]:
        return (*self._passes.values(), *self._shared.values())

    def join(self, count: int, seq: int) -> None:
        """Takes part in a pass of the batch.

        Args:
            count: tokens of this sequence; room is made for them as in `advance`.
            seq: tokens per sequence in the pass; sequences that have fewer are padded.

        Raises:
            ContextLengthError: they do not fit the context.
        """
        if seq == 1:
            self.advance(1)
            return
        first = self.kv.length
        self._check_room(first + seq)
        self.reserve(first + seq)
        self.kv.begin(count)
        self._join(first, count, seq)

    def rest(self, seq: int) -> None:
        """Lets a pass of `seq` tokens run over this part; what it writes here is ignored.

        It writes to the positions after the valid tokens, which stay as they are.
        """
        self.reserve(self.length + seq)
        self.kv.rest()
        self._join(self.length, 1, seq)
        if seq == 1:
            self.kv.show(self.length + 1)

    def _join(self, first: int, count: int, seq: int) -> None:
        self._lengths.write(first, count)
        self._pass_of(seq).positions.write(np.arange(first, first + seq))

    def _pass_of(self, seq: int) -> Pass:
        """This part of the pass of `seq` tokens of each sequence."""
        if seq == 1:
            return self._passes[1]
        found = self._shared.get(seq)
        if found is None:
            whole = self._whole._passes.get(seq) or self._whole._pass(seq)
            found = self._shared[seq] = whole.part(self.kv, self._lengths, *self._range)
        return found

    def agree(self, longest: int, seq: int) -> None:
        """Prepares a pass of `seq` tokens per row at the positions that the rows have set.

        Args:
            longest: tokens of the longest sequence.
            seq: tokens of each sequence in the pass.
        """
        self.reserve(longest)
        self._whole.reserve(longest)  # its passes rebind if the cache has moved
        self._lengths.total.write(self.sessions.backend.longest(longest, seq, self.kv.capacity))
        if seq == 1:
            self.kv.settle(longest)
        else:
            self._pass_of(seq)
            self._whole._passes[seq].see(longest, self._plain)
        self.follow(seq)

    def follow(self, seq: int) -> None:
        """Uses the pass of `seq` tokens that a larger part of the batch has prepared."""
        self._now = self._pass_of(seq)
        if seq > 1:
            self._now.see_as(self._whole._passes[seq], *self._range)
