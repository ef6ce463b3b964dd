"""The benchmark: alternating rounds over the same prompts, and quality on the same texts."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from dash_onnx.bench.worker import Worker
from dash_onnx.core.arrays import Logits
from dash_onnx.core.budget import PRESETS
from dash_onnx.core.errors import DashError
from dash_onnx.core.progress import Loop
from dash_onnx.core.statistics import kl_divergence, log_softmax, standard_error

_LOG = logging.getLogger(__name__)

_PRESETS = [f"@{name}" for name in PRESETS]


@dataclass(frozen=True)
class AtContext:
    """Speed with a context of some length.

    Attributes:
        tokens: length of the context.
        prefill_ms: milliseconds to the first token, by run.
        decode_ms: median milliseconds of a later token, by run.
        peak_rss_bytes: highest resident memory of its process so far, shorter contexts included.
    """

    tokens: int
    prefill_ms: tuple[float, ...]
    decode_ms: tuple[float, ...]
    peak_rss_bytes: int

    @property
    def prefill_tokens_per_s(self) -> float:
        """Length of the context divided by the median time to the first token."""
        return 1e3 * self.tokens / statistics.median(self.prefill_ms)

    @property
    def tokens_per_s(self) -> float:
        """Speed of decoding after it, median over the runs."""
        return 1e3 / statistics.median(self.decode_ms)


@dataclass(frozen=True)
class Result:
    """The measurements of one contender.

    Attributes:
        name: name of the contender.
        decode_ms: per round, the median over prompts of the median milliseconds of a token.
        ttft_ms: per round, the median over prompts of the milliseconds to the first token.
        load_s: seconds to load, including package imports.
        peak_rss_bytes: highest resident memory of its process, after the rounds.
        weight_bytes: bytes of weights read per token; None if unknown, or if it varies.
        kl: mean KL(reference || contender) in nats; None if it does not expose logits.
        kl_stderr: standard error over the texts.
        contexts: speed by length of the context; without contexts that do not fit.
    """

    name: str
    decode_ms: tuple[float, ...]
    ttft_ms: tuple[float, ...]
    load_s: float
    peak_rss_bytes: int
    weight_bytes: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    contexts: Mapping[int, AtContext] = field(default_factory=dict)

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


@dataclass(frozen=True)
class Reference:
    """The reference's predictions for a text.

    Attributes:
        ids: token ids of the text, `[S]`.
        prompt_tokens: length of the prompt at its start.
        logits: `[S - prompt_tokens, V]`, after each later token.
    """

    ids: list[int]
    prompt_tokens: int
    logits: Logits


def ratio(of: Result, to: Result) -> tuple[float, float, float]:
    """Speed of one contender relative to another, per round: median, minimum, maximum."""
    ratios = [b / a for a, b in zip(of.decode_ms, to.decode_ms, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def is_preset(result: Result) -> bool:
    """Whether a contender is one of our presets."""
    kind, _, variant = result.name.partition(" ")
    return kind.startswith("dash") and variant.removeprefix("dash") in _PRESETS


def dominated(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Our presets that another contender beats in both speed and KL, with the fastest such one.

    A preset is dominated if it is more than 3 % slower within the rounds and its KL is higher by
    more than a standard error.
    """
    found = []
    for preset in filter(is_preset, results):
        better = [
            other
            for other in results
            if ratio(preset, other)[0] < 0.97 and _loses_more(preset, other)
        ]
        if better:
            found.append((preset, max(better, key=lambda other: other.tokens_per_s)))
    return found


def _loses_more(one: Result, other: Result) -> bool:
    if one.kl is None or other.kl is None:
        return False
    return one.kl - other.kl > max(one.kl_stderr or 0.0, other.kl_stderr or 0.0)


def measure(
    starts: Sequence[Callable[[], Worker]],
    prompts: Sequence[list[int]],
    *,
    new_tokens: int,
    rounds: int,
    processes: int,
    contexts: Sequence[list[int]] = (),
    quality: Callable[[Worker], tuple[float, float] | None] | None = None,
) -> list[Result]:
    """Measures contenders in alternating rounds, so that drift of the machine affects all equally.

    Args:
        starts: functions that load each contender.
        prompts: token ids of the prompts.
        new_tokens: tokens decoded after each prompt, at least 2.
        rounds: rounds over all prompts, after a warm-up round with a single prompt.
        processes: how often all contenders restart, each time for all rounds. A process keeps an
            advantage of up to 8 % for its whole life, depending on where its memory lies.
        contexts: token ids of longer prompts, on which all take turns after the rounds of each
            process; a repeated one is measured repeatedly.
        quality: returns KL and its standard error, or None; called once per contender.

    Returns:
        One result per contender, over all of its processes.

    Raises:
        DashError: a prompt and its answer exceed the context of a contender.
    """
    generations: list[list[Result]] = []
    for _ in range(processes):
        with ExitStack() as stack:
            workers = []
            for start in Loop("load", starts):
                workers.append(start())
                stack.callback(workers[-1].close)
            results = _rounds(workers, prompts, new_tokens, rounds)
            for index, speeds in enumerate(_in_contexts(workers, contexts, new_tokens)):
                results[index] = replace(results[index], contexts=speeds)
            if quality and not generations:
                for index, worker in enumerate(Loop("quality", workers)):
                    with _reported():
                        if kl := quality(worker):
                            results[index] = replace(results[index], kl=kl[0], kl_stderr=kl[1])
            generations.append(results)
    return [
        replace(
            same[0],
            decode_ms=sum((one.decode_ms for one in same), ()),
            ttft_ms=sum((one.ttft_ms for one in same), ()),
            load_s=statistics.median(one.load_s for one in same),
            peak_rss_bytes=max(one.peak_rss_bytes for one in same),
            contexts={
                length: _joined([one.contexts[length] for one in same])
                for length in same[0].contexts
                if all(length in one.contexts for one in same)
            },
        )
        for same in zip(*generations, strict=True)
    ]


def _rounds(
    workers: Sequence[Worker], prompts: Sequence[list[int]], new_tokens: int, count: int
) -> list[Result]:
    decode: list[list[float]] = [[] for _ in workers]
    first: list[list[float]] = [[] for _ in workers]
    for worker in workers:
        _decoded(worker, prompts[0], new_tokens)
    for turn in Loop("turns", range(count * len(workers))):
        index = turn % len(workers)
        runs = [_decoded(workers[index], prompt, new_tokens) for prompt in prompts]
        decode[index].append(statistics.median(statistics.median(run[1:]) for run in runs))
        first[index].append(statistics.median(run[0] for run in runs))
    return [
        Result(w.name, tuple(decode[i]), tuple(first[i]), w.load_s, w.peak_rss_bytes())
        for i, w in enumerate(workers)
    ]


def _decoded(worker: Worker, prompt: list[int], new_tokens: int) -> list[float]:
    if times := worker.decode(prompt, new_tokens):
        return times
    raise DashError(
        f"{worker.name}: a prompt of {len(prompt)} tokens and an answer of {new_tokens} exceed its "
        "context; lower --max-tokens, or leave out the prompt or the peer"
    )


def _in_contexts(
    workers: Sequence[Worker], contexts: Sequence[list[int]], new_tokens: int
) -> list[dict[int, AtContext]]:
    """Measures long contexts after the rounds, so that the memory of the rounds excludes them."""
    found: list[dict[int, AtContext]] = [{} for _ in workers]
    turns = [(ids, index) for ids in contexts for index in range(len(workers))]
    for ids, index in Loop("contexts", turns):
        with _reported():
            if times := workers[index].decode(ids, new_tokens):
                later = statistics.median(times[1:])
                run = AtContext(len(ids), (times[0],), (later,), workers[index].peak_rss_bytes())
                found[index][len(ids)] = _joined([*filter(None, [found[index].get(len(ids))]), run])
    return found


@contextmanager
def _reported() -> Iterator[None]:
    """After the rounds: a contender that fails loses its own figures, not those of all."""
    try:
        yield
    except DashError as error:
        _LOG.warning("%s", error)


def _joined(runs: Sequence[AtContext]) -> AtContext:
    return AtContext(
        runs[0].tokens,
        sum((run.prefill_ms for run in runs), ()),
        sum((run.decode_ms for run in runs), ()),
        max(run.peak_rss_bytes for run in runs),
    )


def divergence(worker: Worker, texts: Sequence[Reference]) -> tuple[float, float] | None:
    """Mean KL(reference || worker) over texts, and its standard error; None without logits."""
    means = []
    for text in texts:
        ours = worker.logits(text.ids, text.prompt_tokens)
        if ours is None:
            return None
        vocab = min(ours.shape[1], text.logits.shape[1])  # some pad their LM head
        p, q = log_softmax(text.logits[:, :vocab]), log_softmax(ours[:, :vocab])
        means.append(float(kl_divergence(p, q).mean()))
    return float(np.mean(means)), standard_error(means)
