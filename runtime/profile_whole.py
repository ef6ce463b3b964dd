"""Times whole tokens as they decode, against the sum of their parts.

Parts are timed on random paths, where weights are colder than on one path for all tokens, and LM
heads are timed alone; what counts for a plan is the time of a whole token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dash_onnx.core.actions import DECIDED, SKIP, ActionPath
from dash_onnx.core.budget import PRESETS, multiplier_of, reference_ms, scorer_facts
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.facts import Costs
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import Plan, alternatives, margin_of, preset_plans, whole_key, whole_ratio
from dash_onnx.core.policy import ScoredPolicy
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.deciders import Decider, FixedPath, ScoredDecider, decider_of
from dash_onnx.runtime.devices import open_backend
from dash_onnx.runtime.kv import CAPACITY
from dash_onnx.runtime.machine import available_bytes, release_memory, use_huge_pages
from dash_onnx.runtime.ort import Device
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Sessions

STEADY = 0.02
"""Largest standard error of a useful ratio: plans are told apart if they differ by 3 % or more."""

MAX_APART = 0.1
"""A whole token differs from the sum of its parts by less, unless other work disturbed it."""

MIN_MS = 1.0
"""Least time of a token at the reference: for smaller models there is nothing to choose."""

MULTIPLIER = 0.02  # nats per unit, for decisions before a policy has a table: roughly `balanced`

_BLOCK = 8  # tokens that one way runs before the other takes its turn
_SETTLING = 2  # of them, until its weights are back in the caches
_TURNS = (6, 40)  # of each way, at least and at most
_SECONDS = 8.0  # for both, roughly
_PRECISE = 0.01  # standard error at which they end earlier
_MAX_PLANS = 16


@dataclass
class _Way:
    """A way to decode tokens, with its own sessions, so that its layers join as if it ran alone."""

    sequence: SequenceState
    decider: Decider
    costs: Costs
    token: int = 0

    def run(self) -> float:
        """Decodes a block of tokens greedily.

        Returns:
            How long they take, as a multiple of the sum of their parts: the lower quartile.
        """
        sequence, limit = self.sequence, self.sequence.sessions.manifest.model.max_length
        if sequence.length + _BLOCK > min(limit, CAPACITY):  # before the cache grows
            sequence.truncate(0)
        ratios = []
        for _ in range(_BLOCK):
            started = time.perf_counter()
            logits, path = sequence.forward(self.token, self.decider)
            ms = (time.perf_counter() - started) * 1e3
            self.token = int(logits.argmax())
            ratios.append(ms / self.parts_ms(path))
        return float(np.quantile(ratios[_SETTLING:], 0.25))

    def parts_ms(self, path: ActionPath) -> float:
        """The sum of a token's profiled parts."""
        scored = isinstance(self.decider, ScoredDecider)
        graphs = len(self.decider.groups)
        return self.costs.token_ms(path, self.decider.head, scored, graphs=graphs)


def whole_ratios(bundle: Bundle, costs: Costs, backend: Backend) -> dict[str, float]:
    """`Costs.whole` of all layers in each precision, and of the scorer's decisions.

    They are timed alternately with the reference's tokens: only these two are loaded at a time.

    Args:
        bundle: whose tokens are timed.
        costs: costs of the parts.
        backend: where they run.

    Returns:
        Empty if not every precision was timed: it does not fit in memory, other work disturbed it,
        the device is not a CPU, or the model is tiny. Without decisions if those were not timed.
    """
    manifest = replace(bundle.manifest, costs=costs)
    if backend.device != "cpu" or reference_ms(manifest) < MIN_MS:
        return {}
    (best, *others), layers = manifest.variants, manifest.model.num_layers
    paths = [Plan(1.0, 0.0, manifest.heads[a], 1.0, (a,) * layers) for a in others]
    scored = [] if manifest.scorer is None else [Plan(1.0, 0.0, manifest.heads[SKIP], 1.0)]
    timed = _Timed(bundle, costs, backend)
    found: dict[str, float] = {best: 1.0}
    for plan in paths + scored:
        name = DECIDED if plan.path is None else plan.path[0]
        ratio = timed.ratio(plan, MULTIPLIER)
        if ratio is not None:
            found[name] = ratio
        elif plan.path is not None:  # what was timed cannot be compared with what was not
            return {}
    return found


def plan_times(bundle: Bundle, device: Device) -> Costs:
    """The costs of a bundle, with the times of the plans that presets choose between.

    Times the plans that presets would run, until every plan that they run has been timed.

    Args:
        bundle: with plans. If its profile has no times of whole tokens, no plans are timed.
        device: where they run.
    """
    manifest = bundle.manifest
    if not manifest.costs.whole:
        return manifest.costs
    timed = _Timed(bundle, manifest.costs, open_backend(device))
    for _ in range(_MAX_PLANS):
        whole = manifest.costs.whole
        left = [plan for plan in _rivals(manifest) if whole_key(plan, manifest) not in whole]
        if not left:
            break
        plan = left[0]
        multiplier = None
        if plan.path is None and plan.budget > 1:  # which policies have only by a preset's name
            multiplier, _ = multiplier_of(plan.budget, scorer_facts(manifest).points)
        ratio = timed.ratio(plan, multiplier)
        whole = {**whole, whole_key(plan, manifest): ratio or whole_ratio(plan, manifest)}
        manifest = replace(manifest, costs=replace(manifest.costs, whole=whole))
    return manifest.costs


def _rivals(manifest: Manifest) -> Iterator[Plan]:
    """The plans that presets run, and the fastest plan of each kind that keeps their promises."""
    yield from preset_plans(manifest).values()
    for limit in PRESETS.values():
        yield from filter(None, alternatives(limit / margin_of(manifest), manifest))


class _Timed:
    """Times plans beside the reference, which stays loaded."""

    def __init__(self, bundle: Bundle, costs: Costs, backend: Backend):
        """Loads nothing yet."""
        self._bundle, self._costs, self._backend = bundle, costs, backend
        manifest = bundle.manifest
        best = manifest.variants[0]
        path = (best,) * manifest.model.num_layers
        self._reference = self._way(Plan(1.0, 0.0, manifest.heads[best], 1.0, path))

    def ratio(self, plan: Plan, multiplier: float | None = None) -> float | None:
        """How much longer a plan's tokens take than their parts, relative to the reference's.

        Args:
            plan: what is timed.
            multiplier: multiplier of its decisions; None takes the policy at its budget.

        Returns:
            None if it does not fit in memory, or other work disturbed it.
        """
        loaded = self._reference.sequence.sessions.loaded_bytes
        if not _fits(self._bundle.manifest, plan, loaded):
            return None
        found = _compared(self._reference, self._way(plan, multiplier))
        release_memory()
        return found

    def _way(self, plan: Plan, multiplier: float | None = None) -> _Way:
        sequence = SequenceState(Sessions(self._bundle, self._backend))
        decider: Decider
        if plan.path is not None:
            decider = FixedPath(plan.path, plan.head)
        elif multiplier is not None:
            decider = ScoredDecider(sequence, plan.head, multiplier)
        else:
            decider = decider_of(ScoredPolicy(self._bundle.manifest, plan.budget), sequence)
        return _Way(sequence, decider, self._costs)


def _compared(first: _Way, other: _Way) -> float | None:
    """How much longer one takes than the first; None where other work disturbed it."""
    for way in (first, other):
        way.sequence.truncate(0)  # the first has compared others: both attend to as many tokens
        way.run()  # loads
    use_huge_pages()
    (least, most), started, ratios = _TURNS, time.perf_counter(), list[float]()
    for turn in range(-1, most):  # the first touches the pages that have moved
        if turn >= least:
            spent = time.perf_counter() - started
            if error_of(ratios) <= _PRECISE or spent > _SECONDS:
                break
        if turn % 2:
            theirs = first.run()
            ours = other.run()
        else:
            ours = other.run()
            theirs = first.run()
        if turn >= 0:
            ratios.append(ours / theirs)
    ratio = float(np.median(ratios))
    steady = error_of(ratios) <= STEADY and abs(ratio - 1) <= MAX_APART
    return round(ratio, 4) if steady else None


def error_of(values: Sequence[float]) -> float:
    """Standard error of the median of roughly normal values."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(0.93 * (high - low) / np.sqrt(len(values)))


def _fits(manifest: Manifest, plan: Plan, loaded: int) -> bool:
    """Whether memory has room for a plan beside the reference, of which some may be loaded."""
    room, reference = available_bytes(), manifest.variants[0]
    path = (reference,) * manifest.model.num_layers
    needed = manifest.weight_bytes(path, manifest.heads[reference]) - loaded
    if plan.path:
        needed += manifest.weight_bytes(plan.path, plan.head)
    else:
        needed += manifest.weight_bytes((), plan.head) + manifest.layer_bytes(manifest.actions)
    return room is None or needed < room
