"""The benchmark: alternating rounds over the same prompts, and the quality on the same texts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from dash_onnx.bench.worker import Worker
from dash_onnx.core.statistics import kl_divergence, log_softmax, standard_error


@dataclass(frozen=True)
class Result:
    """What one contender did.

    Attributes:
        name: of the contender.
        decode_ms: per round, the median over prompts of the median milliseconds of a token.
        ttft_ms: per round, the median over prompts of the milliseconds to the first token.
        load_s: seconds to load, packages included.
        peak_rss_bytes: highest resident memory of its process, after the rounds.
        weight_bytes: what a token reads of the weights; None where it is not known.
        kl: mean KL(reference || contender) in nats; None where it shows no logits.
        kl_stderr: standard error over the texts.
    """

    name: str
    decode_ms: tuple[float, ...]
    ttft_ms: tuple[float, ...]
    load_s: float
    peak_rss_bytes: int
    weight_bytes: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Median over the rounds."""
        return 1e3 / statistics.median(self.decode_ms)

    @property
    def gigabytes_per_s(self) -> float | None:
        """Weights read per second of decoding."""
        if self.weight_bytes is None:
            return None
        return self.weight_bytes * self.tokens_per_s / 1e9


def ratio(of: Result, to: Result) -> tuple[float, float, float]:
    """Speed of one contender in units of another's, within each round: median, least, most."""
    ratios = [b / a for a, b in zip(of.decode_ms, to.decode_ms, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def restarted(
    starts: Sequence[Callable[[], Worker]],
    count: int,
    measure: Callable[[list[Worker]], list[Result]],
    quality: Callable[[Worker], tuple[float, float] | None] = lambda _: None,
) -> list[Result]:
    """Measures contenders whose processes start anew several times.

    A process keeps an advantage of up to 8 % for as long as it lives, by where its memory lies.

    Args:
        starts: load each contender.
        count: of generations of processes.
        measure: all of them, loaded.
        quality: KL and its standard error, of the first generation alone; None where not known.

    Returns:
        What was found of the first generation, with the times of all.
    """
    turns: list[list[Result]] = []
    for _ in range(count):
        with ExitStack() as stack:
            workers = []
            for start in tqdm(starts, desc="load", disable=None):
                workers.append(start())
                stack.callback(workers[-1].close)
            results = measure(workers)
            if not turns:
                for index, worker in enumerate(tqdm(workers, desc="quality", disable=None)):
                    if kl := quality(worker):
                        results[index] = replace(results[index], kl=kl[0], kl_stderr=kl[1])
            turns.append(results)
    return [
        replace(
            same[0],
            decode_ms=sum((one.decode_ms for one in same), ()),
            ttft_ms=sum((one.ttft_ms for one in same), ()),
            load_s=statistics.median(one.load_s for one in same),
            peak_rss_bytes=max(one.peak_rss_bytes for one in same),
        )
        for same in zip(*turns, strict=True)
    ]


def rounds(
    workers: Sequence[Worker],
    prompts: Sequence[list[int]],
    count: int,
    new_tokens: int,
    on_turn: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Contenders take turns round by round: a machine that drifts drifts for all of them.

    Args:
        workers: loaded.
        prompts: token ids.
        count: of rounds, after one round of a single prompt that warms up.
        new_tokens: decoded after each prompt, at least 2.
        on_turn: called after each turn.
    """
    decode: list[list[float]] = [[] for _ in workers]
    first: list[list[float]] = [[] for _ in workers]
    for worker in workers:
        worker.decode(prompts[0], new_tokens)
        on_turn()
    for _ in range(count):
        for index, worker in enumerate(workers):
            runs = [worker.decode(prompt, new_tokens) for prompt in prompts]
            decode[index].append(statistics.median(statistics.median(run[1:]) for run in runs))
            first[index].append(statistics.median(run[0] for run in runs))
            on_turn()
    return [
        Result(
            worker.name, tuple(decode[i]), tuple(first[i]), worker.load_s, worker.peak_rss_bytes()
        )
        for i, worker in enumerate(workers)
    ]


def divergence(
    worker: Worker, reference: Sequence[np.ndarray], texts: Sequence[tuple[list[int], int]]
) -> tuple[float, float] | None:
    """Mean KL(reference || worker) over texts, and its standard error.

    Args:
        worker: loaded.
        reference: per text, logits `[S - prompt, V]`.
        texts: token ids and the length of the prompt in them.

    Returns:
        None where the worker shows no logits.
    """
    means = []
    for theirs, (ids, prompt_tokens) in zip(reference, texts, strict=True):
        ours = worker.logits(ids, prompt_tokens)
        if ours is None:
            return None
        vocab = min(ours.shape[1], theirs.shape[1])  # some pad their head
        p, q = log_softmax(theirs[:, :vocab]), log_softmax(ours[:, :vocab])
        means.append(float(kl_divergence(p, q).mean()))
    return float(np.mean(means)), standard_error(means)
