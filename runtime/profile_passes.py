"""Profiles the time of a layer and of the LM head, by rows of a pass, form and context."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from dash_onnx.core.actions import WIDE, Form
from dash_onnx.core.block import ATTENTIONS
from dash_onnx.core.facts import PassCosts
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Sessions

ROWS = (1, 2, 4, 8, 16, 64, 512)
CONTEXTS = (0, 1000, 3500)
PLAIN_ROWS = 16
"""Most rows that attention from plain operators is tried for: its scores take memory for each."""

HEAD_ROWS = (1, 4, 16)

Table = npt.NDArray[np.float64]
"""Milliseconds `[contexts, rows]`."""

_LAYERS = 2  # in turn, so that neither finds its weights in the nearest caches
_SMALL_BYTES = 64 << 20  # of weights: those of a smaller model stay in the caches anyway
_RUNS, _MIN_RUNS, _ROWS_TIMED = 12, 3, 96  # fewer runs where each has many rows


def pass_costs(sessions: Sessions) -> PassCosts | None:
    """Times each form of some layers in the middle, both attentions, and each LM head.

    Returns:
        None if the bundle leaves nothing to choose.
    """
    manifest = sessions.manifest
    limit = manifest.model.max_length
    chooses = manifest.target.attention == "both"
    if manifest.wide is None and not chooses:
        return None
    rows = tuple(count for count in ROWS if count <= limit)
    contexts = tuple(context for context in CONTEXTS if context + rows[-1] <= limit)
    every = manifest.model.num_layers
    own, shared, others = manifest.attending, list[int](), list[int]()
    for layer in set(range(every)).difference(own):
        (shared if manifest.mixer_of(layer) in ATTENTIONS else others).append(layer)
    kinds = [(_Times(sessions, k), len(k) / every) for k in (own, shared, others) if k]
    attend, times = kinds[: 2 if shared else 1], kinds[0][0]
    wide: tuple[Form, ...] = () if manifest.wide is None else (WIDE,)
    forms: tuple[Form, ...] = (*reversed(manifest.variants), *wide)  # the cheapest one first
    heads: tuple[Form, ...] = (*manifest.exported_heads, *wide)
    plain_rows = tuple(count for count in rows if chooses and count <= PLAIN_ROWS)
    head_rows = tuple(count for count in HEAD_ROWS if count <= limit)
    layers = [(t.layers(forms, rows, contexts), share) for t, share in kinds]
    plain = [(t.plain(forms[0], plain_rows, contexts), n) for t, n in attend if plain_rows]
    return PassCosts(
        rows=rows,
        contexts=contexts,
        layers_ms={
            form: _mean([(tables[form], share) for tables, share in layers])
            for form in (*manifest.variants, *wide)
        },
        plain_rows=plain_rows,
        plain_ms=_mean(plain) if plain else (),
        head_rows=head_rows,
        heads_ms={form: times.head(form, head_rows) for form in heads},
    )


def _mean(tables: Sequence[tuple[Table, float]]) -> tuple[tuple[float, ...], ...]:
    """The mean over layers of several kinds, weighted by the share of each."""
    total = np.asarray(sum(share * table for table, share in tables))
    return tuple(tuple(round(float(ms), 5) for ms in row) for row in total)


class _Times:
    """Times parts of passes, with weights as cold as in decoding."""

    def __init__(self, sessions: Sessions, kind: Sequence[int]):
        """Takes some of the layers of a kind."""
        manifest, first = sessions.manifest, max(len(kind) // 2 - 1, 0)
        self._sessions, self._layers = sessions, kind[first : first + _LAYERS]
        weights = manifest.layer_bytes(manifest.variants)
        self._others = np.ones(_SMALL_BYTES // 8 if weights > _SMALL_BYTES else 0, np.uint64)

    def layers(
        self, forms: Sequence[Form], rows: tuple[int, ...], contexts: tuple[int, ...]
    ) -> dict[Form, Table]:
        """Times a layer with grouped attention.

        All forms take turns at the start of a context. What a longer one adds comes from attention,
        which is the same in each form, so it is timed only in the first. If each form were timed
        there, one after another, noise would decide which is the fastest.
        """

        def measured(chosen: Sequence[Form], sequence: SequenceState, count: int) -> list[float]:
            sequence.attend(plain=False)
            return self._typical_ms([partial(self._run, sequence, one) for one in chosen], count)

        start = self._timed(partial(measured, forms), rows, contexts[:1])
        behind = self._timed(partial(measured, forms[:1]), rows, contexts)[..., 0]
        more = np.maximum(behind - behind[0], 0)
        return {form: start[0, :, index] + more for index, form in enumerate(forms)}

    def plain(self, form: Form, rows: tuple[int, ...], contexts: tuple[int, ...]) -> Table:
        """What attention from plain operators adds to a layer, alternating with the other one."""

        def measured(sequence: SequenceState, count: int) -> list[float]:
            flag = sequence.attend(plain=True)

            def run(plain: bool) -> None:
                flag.write(plain)
                self._run(sequence, form)

            return self._typical_ms([partial(run, True), partial(run, False)], count)

        ours, others = np.moveaxis(self._timed(measured, rows, contexts), -1, 0)
        return ours - others

    def _timed(
        self,
        measured: Callable[[SequenceState, int], list[float]],
        rows: tuple[int, ...],
        contexts: tuple[int, ...],
    ) -> npt.NDArray[np.float64]:
        """Milliseconds of a layer `[contexts, rows, n]`, for n measured variants."""
        result = []
        for context in contexts:
            sequence, times = SequenceState(self._sessions, context + rows[-1]), []
            for count in rows:
                sequence.truncate(0)
                if context:
                    sequence.advance(context)  # counted, not run: no time depends on what is there
                sequence.advance(count)
                sequence.embed(np.zeros(count, np.int64))
                times.append(measured(sequence, count))
            result.append(times)
            del sequence
        self._sessions.forget()
        return np.array(result) / len(self._layers)

    def _run(self, sequence: SequenceState, form: Form) -> None:
        for layer in self._layers:
            sequence.run_form(layer, form)

    def head(self, form: Form, rows: tuple[int, ...]) -> tuple[float, ...]:
        """Milliseconds of an LM head, for each number of rows."""
        sequence, asked = SequenceState(self._sessions), self._sessions.manifest.exported_heads[0]
        result = []
        for count in rows:
            sequence.truncate(0)
            sequence.advance(count)
            run = partial(sequence.head, asked, every=True, form=form)
            result.append(round(self._typical_ms([run], count)[0], 5))
        del sequence, run
        self._sessions.forget()
        return tuple(result)

    def _typical_ms(self, runs: Sequence[Callable[[], object]], rows: int) -> list[float]:
        """The lower quartile of each run; they take turns."""
        for run in runs:
            run()
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(min(max(_ROWS_TIMED // rows, _MIN_RUNS), _RUNS)):
            for run, seen in zip(runs, times, strict=True):
                self._others.max(initial=0)
                started = time.perf_counter()
                run()
                seen.append((time.perf_counter() - started) * 1e3)
        return [float(np.quantile(seen, 0.25)) for seen in times]
