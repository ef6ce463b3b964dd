"""Profiles every action of every layer through the real dispatch, as in decoding.

Parts are timed window by window, some consecutive layers or one LM head, as memory may not hold the
model; if it does, whole tokens are timed, too, see `profile_whole`.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.core.budget import scorer_facts
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import head_path
from dash_onnx.core.facts import Costs
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.progress import Phase
from dash_onnx.runtime.deciders import ScoredDecider
from dash_onnx.runtime.devices import open_backend
from dash_onnx.runtime.machine import machine_name
from dash_onnx.runtime.ort import Device, thread_count
from dash_onnx.runtime.profile_passes import pass_costs
from dash_onnx.runtime.profile_whole import whole_ratios
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Sessions

BUSY = 0.1
"""Spread above which other work disturbed a profile: 0.03 to 0.04 alone on two cores, 0.14 beside
one busy process, 0.24 beside two, when all times are a third too long."""

TAKEN = 0.2
"""Share of the cores' time above which steady work, which slows every run alike, disturbed a
profile: it takes a third beside one process that is busy on two cores, half beside two."""

PROBE_S = 0.3
"""Seconds that `taken_share` keeps the cores busy, before a profile and after it."""

LayerAction = tuple[int, Action]
"""A layer and its action."""

_LOG = logging.getLogger(__name__)

_TOKENS = 96
_WARM_UP = 16  # tokens until every graph has run and memory has settled
_PROMPT = 64  # tokens of context; attention is a small part of a layer at this length
_WINDOW_BYTES = {"cpu": 128 << 20, "cuda": 4 << 30}
"""Weights loaded at a time, by device; a model this small is profiled whole."""
_OTHERS_BYTES = 64 << 20  # read in place of what is not loaded: twice a typical last-level cache


@dataclass(frozen=True)
class _Window:
    """What is loaded at a time.

    Attributes:
        layers: consecutive ones.
        heads: precisions of the LM head.
        whole: whether nothing is left out.
    """

    layers: tuple[int, ...]
    heads: tuple[Action, ...]
    whole: bool = False


@dataclass
class Times:
    """Measured milliseconds."""

    layers: list[dict[Action, list[float]]]
    heads: dict[Action, list[float]]
    embeds: list[float] = field(default_factory=list)


def profile(bundle: Bundle, device: Device) -> Costs:
    """`measure`, with a warning if other work disturbed it."""
    costs, disturbed = checked(bundle, device)
    if disturbed:
        _LOG.warning("%s; run dash-profile when the machine is idle", disturbed)
    return costs


def checked(bundle: Bundle, device: Device) -> tuple[Costs, str]:
    """`measure`, and what disturbed it: empty if nothing did."""
    before = taken_share(thread_count(), PROBE_S)
    costs = measure(bundle, device)
    after = taken_share(thread_count(), PROBE_S)
    taken = min(before, after)  # the steady part: `spread` has the rest
    why = ""
    if costs.spread > BUSY:
        why = f"a typical run took {costs.spread:.0%} longer than the fastest quarter"
    elif taken > TAKEN:
        why = f"it (or a limit of CPU time) took {taken:.0%} of the cores' time"
    return costs, f"other work disturbed the profile: {why}" if why else ""


def taken_share(threads: int, seconds: float) -> float:
    """Share of the time that busy threads did not run, because other work had their cores."""
    text = bytes(1 << 18)

    def busy(_: int) -> float:
        started, ran = time.perf_counter(), time.thread_time()
        while time.perf_counter() - started < seconds:
            hashlib.sha256(text)  # releases the GIL
        return (time.thread_time() - ran) / (time.perf_counter() - started)

    with ThreadPoolExecutor(threads) as pool:
        return 1.0 - sum(pool.map(busy, range(threads))) / threads


def measure(bundle: Bundle, device: Device) -> Costs:
    """Decodes random paths and takes the lower quartile of each part's time.

    The quartile, because other work on the machine only makes times longer: it is the undisturbed
    time of a part, as long as a quarter of its runs were undisturbed.

    Random paths, because a policy mixes actions and then finds their weights as cold in memory as
    here. The highest precision is timed separately: mixed paths that use it are rare, and its
    weights would evict all others from the caches.

    Args:
        bundle: whose graphs run.
        device: where they run.
    """
    with Phase("costs", total=1):
        return _measure(bundle, device)


def _measure(bundle: Bundle, device: Device) -> Costs:
    backend, manifest = open_backend(device), bundle.manifest
    sessions = Sessions(bundle, backend)
    best, *others = manifest.variants
    cheap = (*(others or [best]), SKIP)
    rng = random.Random(0)
    heads, alone = manifest.exported_heads, manifest.model.num_layers == 1
    times = Times([{} for _ in manifest.layers], {head: [] for head in heads})

    def mixed(layer: int) -> Action:
        # Layers run at least as often as they are skipped, as under any useful policy.
        return rng.choice(cheap if layer or alone else cheap[:-1])

    for window in _windows(manifest, (best,), ()):
        _time(sessions, window, lambda _: best, _TOKENS // 4, times, rng)
    for window in _windows(manifest, cheap, heads):
        _time(sessions, window, mixed, _TOKENS, times, rng)
    # Layers mostly have the same shape: the quartile over all of them stands in where one layer
    # never took an action; elsewhere, a layer's own keeps what differs.
    shared = {
        action: _typical([ms for seen in times.layers for ms in seen.get(action, [])])
        for action in manifest.actions
        if any(action in seen for seen in times.layers)
    }
    layers_ms = tuple(
        {
            action: _typical(seen[action]) if action in seen else shared[action]
            for action in manifest.actions
        }
        for seen in times.layers
    )
    # It is a difference of two times: if other work disturbs them, it may exceed what is possible.
    most_saved = min(ms for costs in layers_ms for ms in costs.values()) / 2
    costs = Costs(
        machine=machine_name(),
        threads=thread_count(),
        embed_ms=_typical(times.embeds),
        scorer_ms=_scorer_ms(sessions) if manifest.scorer is not None else 0.0,
        heads_ms={head: _typical(values) for head, values in times.heads.items()},
        layers_ms=layers_ms,
        spread=spread_of(times),
        passes=pass_costs(sessions),
        join_ms=min(_join_ms(sessions), most_saved),
    )
    return replace(costs, whole=whole_ratios(bundle, costs, backend))


def _join_ms(sessions: Sessions) -> float:
    """The time saved by running layers as one graph, for each layer but the first.

    Both ways take turns, as their difference is smaller than the noise of either.
    """
    manifest = sessions.manifest
    cheapest = manifest.variants[-1]
    layers = _windows(manifest, (cheapest,), ())[0].layers
    start, stop = layers[0], layers[-1] + 1
    graph = sessions.joined(range(start, stop), cheapest)
    if graph is None:
        return 0.0
    sequence = SequenceState(sessions)
    sequence.advance(min(_PROMPT, manifest.model.max_length))
    ways = ([(start, stop)], [(layer, layer + 1) for layer in layers])
    saved = []
    for count in range(_WARM_UP + _TOKENS):
        ms = [0.0, 0.0]
        for way in (0, 1) if count % 2 else (1, 0):
            sequence.truncate(sequence.length - 1)
            sequence.advance(1)
            sequence.embed(0)
            started = time.perf_counter()
            for first, last in ways[way]:
                sequence.run(first, cheapest, last)
            ms[way] = (time.perf_counter() - started) * 1e3
        saved.append(ms[1] - ms[0])
    del sequence, graph
    sessions.forget()
    return round(max(float(np.median(saved[_WARM_UP:])) / (len(layers) - 1), 0.0), 5)


def _windows(
    manifest: Manifest, actions: Sequence[Action], heads: tuple[Action, ...]
) -> list[_Window]:
    """Splits what is to be timed into windows."""
    layers = tuple(range(manifest.model.num_layers))
    in_layers = manifest.layer_bytes(actions)
    in_heads = sum(manifest.graph_bytes(head_path(head), head) for head in heads)
    most = _WINDOW_BYTES[manifest.target.device]
    if in_layers + in_heads <= most:
        return [_Window(layers, heads, whole=True)]
    count = min(-(-in_layers // most), len(layers))
    parts = np.array_split(layers, count)  # of equal size: none so small that it stays in caches
    return [
        *(_Window(tuple(part.tolist()), ()) for part in parts),
        *(_Window((), (head,)) for head in heads),
    ]


def _time(
    sessions: Sessions,
    window: _Window,
    choose: Callable[[int], Action],
    tokens: int,
    times: Times,
    rng: random.Random,
) -> None:
    """Decodes tokens on paths of a window's layers, and forgets their graphs."""
    manifest = sessions.manifest
    longest, vocab = manifest.model.max_length, manifest.model.vocab_size
    sequence = SequenceState(sessions)
    prompt = min(_PROMPT, longest - 1)
    sequence.advance(prompt)  # counted, not run: timing does not depend on what the cache holds
    others = _others(window)
    # What runs first after `others` would pay for waking threads and for cold instructions. In
    # decoding, the embedding runs after the head, and all layers but the first after a layer.
    last = manifest.model.num_layers - 1
    before: list[LayerAction] = [] if window.whole else [(last, SKIP)]
    lead: list[LayerAction] = []
    if 0 not in window.layers:
        lead = [(window.layers[0] - 1 if window.layers else last, SKIP)]
    for count in range(_WARM_UP + tokens):
        if sequence.length == longest:  # a short context: restart from the prompt
            sequence.truncate(prompt)
        parts = [(layer, choose(layer)) for layer in window.layers]
        head = rng.choice(window.heads) if window.heads else None
        others.max(initial=0)
        embed, *rest = _time_token(sequence, rng.randrange(vocab), parts, head, before, lead)
        if count < _WARM_UP:
            continue
        if 0 in window.layers:
            times.embeds.append(embed)
        if head is not None:
            times.heads[head].append(rest.pop())
        for (layer, action), ms in zip(parts, rest, strict=True):
            times.layers[layer].setdefault(action, []).append(ms)
    del sequence
    sessions.forget()


def _time_token(
    sequence: SequenceState,
    token: int,
    parts: Sequence[LayerAction],
    head: Action | None,
    before: Sequence[LayerAction],
    lead: Sequence[LayerAction],
) -> list[float]:
    """Runs a token as `SequenceState.forward` does, except for what is left out.

    Args:
        sequence: whose next token it is.
        token: its id.
        parts: the layers that are timed.
        head: precision of the LM head; None leaves it out.
        before: layers that run before the embedding and are not timed.
        lead: layers that run after it and are not timed.

    Returns:
        Milliseconds of the embedding, each layer, and the head if there is one.
    """

    def timed(part: Callable[[], object]) -> float:
        started = time.perf_counter()
        part()
        sequence.sessions.backend.synchronize()
        return (time.perf_counter() - started) * 1e3

    sequence.advance(1)
    for layer, action in before:
        sequence.run(layer, action)
    sequence.sessions.backend.synchronize()
    times = [timed(lambda: sequence.embed(token))]
    if lead:
        # The first timed layer may read either: neither may accumulate over the tokens.
        even, odd = sequence.hidden
        odd.write(even.array)
        for layer, action in lead:
            sequence.run(layer, action)
        sequence.sessions.backend.synchronize()
    times += [timed(partial(sequence.run, layer, action)) for layer, action in parts]
    if head is not None:
        times.append(timed(lambda: sequence.head(head)))
    return times


def _scorer_ms(sessions: Sessions) -> float:
    """Milliseconds of all decisions of one token, each made between two layers, as in decoding."""
    manifest = sessions.manifest
    cheapest = manifest.variants[-1]
    read = {layer - 1 for layer in scorer_facts(manifest).decision_points}
    total = 0.0
    for window in _windows(manifest, (cheapest,), ()):
        sequence = SequenceState(sessions)
        sequence.advance(min(_PROMPT, manifest.model.max_length))
        decider = ScoredDecider(sequence, cheapest, 1.0)
        others = _others(window)
        times = []
        for _ in range(_WARM_UP + _TOKENS // 4):
            sequence.truncate(sequence.length - 1)
            others.max(initial=0)
            sequence.advance(1)
            sequence.embed(0)
            decider.begin()
            seconds = 0.0
            for layer in window.layers:
                if layer not in read:
                    sequence.run(layer, cheapest)
                    continue
                started = time.perf_counter()
                decider.before(layer)
                seconds += time.perf_counter() - started
                sequence.run(layer, cheapest)
                started = time.perf_counter()
                decider.after(layer)
                seconds += time.perf_counter() - started
            times.append(seconds * 1e3)
        total += _typical(times[_WARM_UP:])
        del sequence, decider
        sessions.forget()
    return round(total, 5)


def _others(window: _Window) -> npt.NDArray[np.uint64]:
    """Data to read before each token in place of the weights that a window leaves out.

    Otherwise the caches would still hold this window's weights from the previous token.
    """
    return np.ones(0 if window.whole else _OTHERS_BYTES // 8, np.uint64)


def spread_of(times: Times) -> float:
    """By what share the median run of a typical part is longer than its lower quartile."""
    parts = [*(ms for layer in times.layers for ms in layer.values()), *times.heads.values()]
    shares = [float(np.median(ms)) / max(_typical(ms), 1e-6) - 1 for ms in parts]
    return round(float(np.median(shares)), 4)


def _typical(values: list[float]) -> float:
    """The lower quartile, in milliseconds."""
    return round(float(np.quantile(values, 0.25)), 5)
