"""Perplexity of a text under a policy, its divergence from the reference, and its speed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dash_onnx.core.actions import ActionPath
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.facts import Costs
from dash_onnx.core.policy import Policy
from dash_onnx.core.progress import Loop
from dash_onnx.core.statistics import kl_divergence, log_softmax, standard_error
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.results import ScoredToken

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
_COMPARED = 64  # rows at once: log-probabilities take several times the memory of logits


@dataclass(frozen=True)
class Evaluation:
    """Measurements of a policy, over the tokens that were decoded under it.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the text.
        kl: mean KL(reference || policy) of the next-token distribution, in nats.
        kl_stderr: its standard error over windows; None for a single one.
        top1: share of tokens where policy and reference have the same most likely token.
        ms_per_token: median wall time of one decoded token in milliseconds; None if not timed.
        cost_ms: mean cost of one decoded token by the bundle's profile, in milliseconds.
        tokens: number of predictions.
        actions: share of each action among all decisions.
        reference_perplexity: perplexity of the reference, every layer at the highest exported
            precision.
    """

    perplexity: float
    kl: float
    kl_stderr: float | None
    top1: float
    ms_per_token: float | None
    cost_ms: float
    tokens: int
    actions: dict[str, float]
    reference_perplexity: float


def evaluate_policies(
    model: Model,
    text: str,
    policies: Sequence[Policy],
    *,
    window: int = 512,
    prompt_tokens: int = 128,
    max_windows: int | None = None,
    reference: Model | None = None,
    timed: bool = True,
) -> list[Evaluation]:
    """Runs policies over consecutive windows of a text.

    In each window the first `prompt_tokens` are prefilled, and the rest is decoded token by token
    under each policy.

    Args:
        max_windows: None takes every whole window.
        reference: another bundle of the same model, to whose highest precision the policies are
            compared; None takes `model`.
        timed: whether every policy decodes token by token. If False, policies that take the same
            path for every token run several tokens at once: the same predictions, but faster.

    Raises:
        PolicyError: the text is shorter than one window, or the sizes do not fit.
    """
    manifest, other = model.manifest, reference or model
    tallies = [_Tally(policy) for policy in policies]
    for ids in Loop("windows", _windows(model, text, window, prompt_tokens)[:max_windows]):
        best = other.logits(ids, policy=other.manifest.variants[0])
        wanted, targets = best[prompt_tokens:-1], ids[prompt_tokens + 1 :, None]
        for tally in tallies:
            policy = tally.policy
            path = None if timed else policy.uniform
            if path is None:
                tokens = model.score(ids[:-1], prompt_tokens=prompt_tokens, policy=policy)
                rows = tally.decoded(tokens)
            else:
                rows = model.logits(ids[:-1], prompt_tokens=prompt_tokens, policy=policy)
                rows = rows[prompt_tokens:]
                tally.paths += [path] * len(rows)
            tally.compare(rows, wanted, targets)
    return [tally.evaluation(manifest.costs) for tally in tallies]


def _compared(ours: Logits, wanted: Logits, targets: Ids) -> tuple[Floats, ...]:
    """By row: NLL of the text, that of the reference, KL, and whether the top-1 tokens agree."""
    q, p = log_softmax(ours), log_softmax(wanted)
    nll, reference_nll = (-np.take_along_axis(one, targets, 1) for one in (q, p))
    return nll, reference_nll, kl_divergence(p, q), p.argmax(1) == q.argmax(1)


class _Tally:
    """The results of one policy so far."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.paths: list[ActionPath] = []  # per token
        self._ms: list[float] = []
        self._nll: list[Floats] = []  # per window, [window - prompt_tokens - 1]
        self._reference_nll: list[Floats] = []
        self._kl: list[Floats] = []
        self._agree: list[Floats] = []

    def decoded(self, tokens: Iterator[ScoredToken]) -> Logits:
        """Collects the logits of all tokens, `[tokens, V]`, and times them."""
        rows, started = [], time.perf_counter()
        for token in tokens:
            self._ms.append((time.perf_counter() - started) * 1e3)
            rows.append(token.logits.astype(np.float32))  # copied: the next one overwrites it
            self.paths.append(token.path)
            started = time.perf_counter()
        return np.stack(rows)

    def compare(self, ours: Logits, wanted: Logits, targets: Ids) -> None:
        """Adds a window: logits `[tokens, V]`, the text's own tokens `[tokens, 1]`."""
        starts = range(0, len(targets), _COMPARED)
        parts = [slice(start, start + _COMPARED) for start in starts]
        found = zip(*(_compared(ours[p], wanted[p], targets[p]) for p in parts), strict=True)
        kept = (self._nll, self._reference_nll, self._kl, self._agree)
        for windows, values in zip(kept, found, strict=True):
            windows.append(np.concatenate(values))

    def evaluation(self, costs: Costs) -> Evaluation:
        """The means."""
        counts = Counter(action for path in self.paths for action in path)
        return Evaluation(
            perplexity=float(np.exp(np.mean(self._nll))),
            kl=float(np.mean(self._kl)),
            kl_stderr=standard_error([float(part.mean()) for part in self._kl]) or None,
            top1=float(np.mean(self._agree)),
            ms_per_token=float(np.median(self._ms)) if self._ms else None,
            cost_ms=float(np.mean([self.policy.cost_ms(path, costs) for path in self.paths])),
            tokens=len(self.paths),
            actions={action: n / counts.total() for action, n in sorted(counts.items())},
            reference_perplexity=float(np.exp(np.mean(self._reference_nll))),
        )


def _windows(model: Model, text: str, window: int, prompt_tokens: int) -> list[Ids]:
    """Consecutive whole windows of a text, `[window]` ids each, all beginning as texts do (BOS)."""
    limit = model.manifest.model.max_length
    if not 1 <= prompt_tokens <= window - 2 or window > limit:
        raise PolicyError(
            f"window {window} with {prompt_tokens} prompt tokens does not work: the prompt must "
            f"leave at least 2 tokens of the window, and the context is {limit}"
        )
    begin, ids = model.text.begin, model.text.encode(text, add_special_tokens=False)
    own = window - len(begin)
    if len(ids) < own:
        raise PolicyError(
            f"the text has {len(ids)} tokens, fewer than one window of {own}: give more text, or a "
            "smaller --window"
        )
    parts = (ids[end - own : end] for end in range(own, len(ids) + 1, own))
    return [np.concatenate([begin, part]) for part in parts]
