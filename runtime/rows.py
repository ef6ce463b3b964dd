"""The rows of one K/V cache: sequences of different lengths whose tokens run in shared passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np

from dash_onnx.core.actions import SKIP, Action, Path, each_alone
from dash_onnx.core.arrays import Logits
from dash_onnx.runtime.deciders import Decider
from dash_onnx.runtime.kv import CAPACITY
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Sessions


class BatchDecoder:
    """The decode loop of several rows.

    Attributes:
        rows: the sequences; each may run alone, as for its prompt.
    """

    def __init__(self, sessions: Sessions, rows: int, capacity: int = CAPACITY):
        """Allocates an empty cache for them.

        Args:
            sessions: of the bundle.
            rows: how many.
            capacity: tokens that each has room for at first; it grows in steps when one is full.

        Raises:
            DeviceError: the device runs no batches.
        """
        self._whole = sessions.new_sequence(capacity, rows)
        self.rows = [self._whole.part(row, row + 1) for row in range(rows)]
        self._parts = {(row, row + 1): state for row, state in enumerate(self.rows)}

    def forward(
        self, rows: Sequence[int], tokens: Sequence[int], deciders: Sequence[Decider]
    ) -> tuple[list[Logits], list[Path]]:
        """Runs one token of each of some rows.

        Args:
            rows: numbers, ascending.
            tokens: an id for each.
            deciders: likewise.

        Returns:
            Logits `[V]` of each (the next call overwrites them), and paths.

        Raises:
            ContextLengthError: a row's context is full.
        """
        for row in rows:
            self.rows[row].advance(1)
        first, stop = rows[0], rows[-1] + 1
        for row in set(range(first, stop)).difference(rows):
            self.rows[row].rest()
        whole = self._part(first, stop)
        ids = np.zeros((stop - first, 1), np.int64)
        ids[np.array(rows) - first, 0] = tokens
        whole.agree(max(self.rows[row].length for row in rows))
        whole.embed(ids)
        for decider in deciders:
            decider.begin()
        key = tuple(rows)
        same = {decider.segments for decider in deciders}
        segments = same.pop() if len(same) == 1 else each_alone(whole.num_layers)
        for layer, end in segments:
            for decider in deciders:
                decider.before(layer)
            actions = tuple([decider.action(layer) for decider in deciders])
            for low, high, action in calls(key, actions):
                self._part(low, high).run(layer, action, end)
            for decider in deciders:
                decider.after(layer)
        for low, high, head in calls(key, tuple([decider.head for decider in deciders])):
            self._part(low, high).head(head)
        paths = [decider.end() for decider in deciders]
        return [self.rows[row].logits for row in rows], paths

    def _part(self, start: int, stop: int) -> SequenceState:
        part = self._parts.get((start, stop))
        if part is None:
            part = self._parts[start, stop] = self._whole.part(start, stop)
        part.reserve(0)  # follows the cache where it has moved
        return part


@lru_cache(1 << 14)
def calls(rows: tuple[int, ...], actions: tuple[Action, ...]) -> list[tuple[int, int, Action]]:
    """Ranges of rows that run together, in order, so that each row's own action comes last.

    The action of most rows runs on all from their first to their last one: others between them are
    run again, which costs less than another call. A skipped row runs alone: it costs little, and
    its graph rotates the keys of all rows by the position of the first.

    Args:
        rows: numbers, ascending.
        actions: of each.
    """
    pairs = [*zip(rows, actions, strict=True)]
    counts, ranges, most = Counter(action for action in actions if action != SKIP), [], SKIP
    if counts:
        most, _ = counts.most_common(1)[0]
        own = [row for row, action in pairs if action == most]
        ranges.append((own[0], own[-1] + 1, most))
    for action, group in groupby(pairs, lambda pair: pair[1]):
        members = [row for row, _ in group]
        if action == SKIP:
            ranges += [(row, row + 1, SKIP) for row in members]
        elif action != most:
            ranges.append((members[0], members[-1] + 1, action))
    return ranges
