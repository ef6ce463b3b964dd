"""The rows of one K/V cache: sequences of different lengths whose tokens run in shared passes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby

import numpy as np

from dash_onnx.core.actions import SKIP, Action, ActionPath, LayerGroup, each_alone
from dash_onnx.core.arrays import Logits
from dash_onnx.runtime.deciders import Decider
from dash_onnx.runtime.kv import CAPACITY
from dash_onnx.runtime.part import Part
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Sessions

_MOST_PARTS = 256  # each has bindings of its own, of some 0.3 MB


class Rows:
    """Several sequences, and the passes that they share.

    Attributes:
        states: the sequences; each may run alone, as for its prompt.
        together: whether a pass of some rows also runs over the rows between them.
        ragged: whether a pass may have several tokens per row, and different numbers of them.
    """

    def __init__(self, whole: SequenceState):
        """Takes a batch of sequences, or a single one."""
        self._whole, self._parts = whole, dict[tuple[int, int], Part]()  # of several rows
        self.together, self._moves = whole.batch > 1, whole.kv.moves
        self._singles = [Part(whole, row, row + 1) for row in range(whole.batch * self.together)]
        self.states: Sequence[SequenceState] = self._singles or [whole]
        manifest = whole.sessions.manifest
        # A state would absorb padding as tokens; attention over shared K/V does not support any.
        plain = not manifest.recurrence and "shared_attention" not in manifest.mixers
        self.ragged = self.together and manifest.target.ragged and plain

    @classmethod
    def new(cls, sessions: Sessions, rows: int, capacity: int = CAPACITY) -> Rows:
        """Empty sequences in one K/V cache.

        Args:
            sessions: sessions of the bundle.
            rows: how many.
            capacity: tokens that each has room for at first; it grows in steps when one is full.
        """
        return cls(SequenceState(sessions, capacity, rows))

    def forward(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        deciders: Sequence[Decider],
        wanted: Sequence[int] = (),
    ) -> tuple[list[Logits], list[ActionPath]]:
        """Runs tokens of some rows.

        Args:
            rows: row numbers, ascending.
            tokens: ids for each; several only if `ragged`, or if one row runs alone.
            deciders: one for each; several tokens of a row take the same path.
            wanted: for how many of the last tokens of each logits are returned; empty: for all.

        Returns:
            Logits `[S, V]` of each row (the next call overwrites them), and paths.

        Raises:
            ContextLengthError: a row's context is full.
        """
        wanted = wanted or [len(ids) for ids in tokens]
        if len(rows) == 1:
            alone, path = self._alone(rows[0], tokens[0], deciders[0], wanted[0])
            return [alone], [path]
        with self.states[0].sessions.backend.lock:
            seq, first, stop = max(map(len, tokens)), rows[0], rows[-1] + 1
            together = self._place(rows, tokens, seq)
            self._layers(together, tuple(rows), deciders, seq)
            if seq == 1:
                key, heads = tuple(rows), tuple([decider.head for decider in deciders])
                for low, high, head in calls(key, heads):
                    part = self._part(low, high)
                    part.follow(seq)
                    part.head(head)
                logits = [self.states[row].logits[None] for row in rows]
            else:
                hidden = together.output.reshape(stop - first, seq, -1)
                each = [
                    hidden[row - first, len(ids) - count : len(ids)]
                    for row, ids, count in zip(rows, tokens, wanted, strict=True)
                ]
                logits = self._heads(each, deciders)
            return logits, [decider.end() for decider in deciders]

    def follow(self) -> None:
        """Lets rows that did not run use the cache that has grown: they hold the former one."""
        if self._moves != (moves := self._whole.kv.moves):
            self._moves = moves
            for part in (*self._singles, *self._parts.values()):
                part.reserve(0)

    def _alone(
        self, row: int, ids: Sequence[int], decider: Decider, wanted: int
    ) -> tuple[Logits, ActionPath]:
        one, state = ids[0] if len(ids) == 1 else np.array(ids, np.int64), self.states[row]
        if 1 < wanted < len(ids):
            path = state.layers(one, decider)
            return state.head_of(state.output[0, -wanted:], decider.head), path
        logits, path = state.forward(one, decider, every=wanted > 1)
        logits = logits.reshape(-1, logits.shape[-1])
        return logits[len(logits) - wanted :], path

    def _place(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], seq: int) -> Part:
        """Sets the positions of a pass, and embeds its tokens; returns the part that runs it."""
        for row, ids in zip(rows, tokens, strict=True):
            self._part(row, row + 1).join(len(ids), seq)
        first, stop = rows[0], rows[-1] + 1
        longest = max(self.states[row].length for row in rows)
        for row in set(range(first, stop)).difference(rows):
            self._part(row, row + 1).rest(seq)
            longest = max(longest, self.states[row].length + 1)
        padded = np.zeros((stop - first, seq), np.int64)
        for row, ids in zip(rows, tokens, strict=True):
            padded[row - first, : len(ids)] = ids
        together = self._part(first, stop)
        together.agree(longest, seq)
        together.embed(padded)
        return together

    def _layers(
        self, together: Part, rows: tuple[int, ...], deciders: Sequence[Decider], seq: int
    ) -> None:
        """Runs the layers; in each, rows with the same action run together.

        Where plans differ in their groups, layers run one by one. If that would load some of them
        again, the rows of each plan run separately.
        """
        for decider in deciders:
            decider.begin()
        apart = len({decider.groups for decider in deciders}) == 1 or self._again(deciders)
        cut = () if apart else each_alone(together.num_layers)
        pairs = [*zip(rows, deciders, strict=True)]
        for groups, members in groupby(pairs, lambda pair: cut or pair[1].groups):
            own, chosen = zip(*members, strict=True)
            self._run_groups(groups, own, chosen, seq)

    def _again(self, deciders: Sequence[Decider]) -> bool:
        """Whether layers of one graph would be loaded again to run one by one."""
        sessions = self.states[0].sessions
        return any(
            sessions.loads_again(range(*group), decider.action(group.start))
            for decider in deciders
            for group in decider.groups
            if group.stop > group.start + 1
        )

    def _run_groups(
        self,
        groups: Sequence[LayerGroup],
        rows: tuple[int, ...],
        deciders: Sequence[Decider],
        seq: int,
    ) -> None:
        """Runs the layers for rows that follow each other in the pass."""
        for layer, end in groups:
            for decider in deciders:
                decider.before(layer)
            actions = tuple([decider.action(layer) for decider in deciders])
            for low, high, action in calls(rows, actions, again=end == layer + 1):
                part = self._part(low, high)
                part.follow(seq)
                part.run(layer, action, end)
            for decider in deciders:
                decider.after(layer)

    def _heads(self, hidden: Sequence[Logits], deciders: Sequence[Decider]) -> list[Logits]:
        """Logits `[S, V]` of rows `[S, D]`: rows of the same precision run together, unpadded."""
        groups = defaultdict(list)
        for index, decider in enumerate(deciders):
            groups[decider.head].append(index)
        result: list[Logits] = [hidden[0][:0]] * len(hidden)
        for head, indices in groups.items():
            logits = self.states[0].head_of(np.concatenate([hidden[i] for i in indices]), head)
            if len(groups) > 1:
                logits = logits.copy()  # another group of as many rows would overwrite them
            stops = accumulate(len(hidden[i]) for i in indices)
            for index, stop in zip(indices, stops, strict=True):
                result[index] = logits[stop - len(hidden[index]) : stop]
        return result

    def _part(self, start: int, stop: int) -> Part:
        if stop == start + 1:
            part = self._singles[start]
        else:  # the latest one last
            known = (start, stop) in self._parts
            part = self._parts.pop((start, stop)) if known else Part(self._whole, start, stop)
            self._parts[start, stop] = part
            if len(self._parts) > _MOST_PARTS:
                del self._parts[next(iter(self._parts))]
        part.reserve(0)  # follows the cache if it has moved
        return part


@lru_cache(1 << 10)
def calls(
    rows: tuple[int, ...], actions: tuple[Action, ...], again: bool = True
) -> list[tuple[int, int, Action]]:
    """Ranges of rows that run together, in order, so that each row's own action comes last.

    The most common action runs on all rows from its first to its last: rows of other actions in
    between run again with their own, which costs less than another call. A skipped row runs alone:
    it costs little, and in bundles of format 3 its graph rotates the keys of all rows by the
    position of the first.

    Args:
        rows: row numbers, ascending.
        actions: one for each.
        again: whether rows may run again; not in a group of several layers, which overwrites its
            own input.
    """
    pairs = [*zip(rows, actions, strict=True)]
    counts, ranges, most = Counter(action for action in actions if action != SKIP), [], SKIP
    if counts and again:
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
