"""Profiles every action of every layer through the real dispatch, as decoding meets them."""

from __future__ import annotations

import random

import numpy as np

from dash_onnx.actions import SKIP, Action, Path
from dash_onnx.manifest import Costs
from dash_onnx.runtime.dispatch import Lane
from dash_onnx.runtime.machine import machine_name
from dash_onnx.runtime.ort import thread_count
from dash_onnx.runtime.sessions import Sessions

_TOKENS = 96
_WARM_UP = 16  # tokens until every graph has run and memory has settled
_PROMPT = 64  # tokens of context; attention is a small part of a layer at this length


def profile(sessions: Sessions) -> Costs:
    """Decodes random paths and takes the median of each part's time.

    Random paths, because a policy mixes actions and then finds their weights as cold in memory
    as it finds them here. The highest precision takes turns of its own: mixed paths that use it
    are rare, and its weights would push all others out of the caches.
    """
    manifest = sessions.manifest
    layers, vocab = manifest.model.num_layers, manifest.model.vocab_size
    best, *others = manifest.variants
    cheap = (*(others or [best]), SKIP)
    rng = random.Random(0)
    times: list[dict[Action, list[float]]] = [{} for _ in range(layers)]
    heads: dict[Action, list[float]] = {head: [] for head in manifest.exported_heads}
    embeds = []

    def mixed() -> Path:
        # Layers run at least as often as they are skipped, as under any useful policy.
        return tuple(rng.choice(cheap if layer else cheap[:-1]) for layer in range(layers))

    lane = Lane(sessions)
    prompt = min(_PROMPT, manifest.model.max_length - 1)
    rounds = [((best,) * layers, _TOKENS // 4), (None, _TOKENS)]
    for fixed, tokens in rounds:
        lane.truncate(0)
        if prompt:
            lane.prefill(np.arange(prompt) % vocab, (cheap[0],) * layers, manifest.heads[SKIP])
        for count in range(_WARM_UP + tokens):
            if lane.length == manifest.model.max_length:  # a short context: again from the prompt
                lane.truncate(prompt)
            path = fixed or mixed()
            head = rng.choice(list(heads))
            embed, *layer_ms, head_ms = lane.time_token(rng.randrange(vocab), path, head)
            if count < _WARM_UP:
                continue
            embeds.append(embed)
            heads[head].append(head_ms)
            for seen, action, ms in zip(times, path, layer_ms, strict=True):
                seen.setdefault(action, []).append(ms)
    # Neighbouring layers have the same shape: the median over all of them is the steadier
    # figure where one layer was rarely seen, but a layer's own median keeps what differs.
    shared = {
        action: float(np.median([ms for seen in times for ms in seen.get(action, [])]))
        for action in manifest.actions
        if any(action in seen for seen in times)
    }
    return Costs(
        machine=machine_name(),
        threads=thread_count(),
        embed_ms=_median(embeds),
        scorer_ms=_scorer_ms(lane) if manifest.scorer is not None else 0.0,
        heads_ms={head: _median(values) for head, values in heads.items()},
        layers_ms=tuple(
            {
                action: _median(seen[action]) if action in seen else round(shared[action], 5)
                for action in manifest.actions
            }
            for seen in times
        ),
    )


def _scorer_ms(lane: Lane) -> float:
    """All decisions of one token, each made between two layers, as in decoding."""
    manifest = lane.sessions.manifest
    path = (manifest.variants[-1],) * manifest.model.num_layers
    times = []
    for _ in range(_WARM_UP + _TOKENS // 4):
        lane.truncate(lane.length - 1)
        times.append(lane.time_scorer(0, path))
    return _median(times[_WARM_UP:])


def _median(values: list[float]) -> float:
    return round(float(np.median(values)), 5)
