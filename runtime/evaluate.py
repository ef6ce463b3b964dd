"""Quality and speed of a policy on a text, teacher-forced through the runtime."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_onnx.core.actions import Action
from dash_onnx.core.arrays import Ids
from dash_onnx.core.budget import Budget
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.engine import Model


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, over the tokens that were decoded under the policy.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the text.
        kl: mean KL(reference || policy) of the next-token distribution, in nats.
        kl_stderr: its standard error over windows (0 for a single one).
        top1: share of tokens where policy and reference find the same token most likely.
        ms_per_token: median wall time of one decoded token in milliseconds.
        cost_ms: mean cost of one decoded token by the bundle's profile, in milliseconds.
        tokens: number of predictions.
        actions: share of each action among all decisions.
        reference_perplexity: of the reference, every layer at the highest exported precision.
    """

    perplexity: float
    kl: float
    kl_stderr: float
    top1: float
    ms_per_token: float
    cost_ms: float
    tokens: int
    actions: dict[str, float]
    reference_perplexity: float


def evaluate(
    model: Model,
    text: str,
    policy: str | Policy,
    budget: Budget | None = None,
    *,
    window: int = 512,
    prompt_tokens: int = 128,
    max_windows: int | None = None,
    prefill: Action | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Runs a policy over windows of a text.

    Of each window the first `prompt_tokens` are prefilled and the rest is decoded token by token
    under the policy.

    Args:
        max_windows: None takes every whole window.
        prefill: precision of the prompt; None takes the highest exported.
        on_window: called after each window.

    Raises:
        PolicyError: the text is shorter than one window, or the sizes do not fit.
    """
    windows = text_windows(model, text, window, prompt_tokens, max_windows)
    chosen = model.policy(policy, budget)
    costs = model.manifest.costs
    spent = []
    nll, reference_nll, kl, agree, times = [], [], [], [], []
    counts: Counter[str] = Counter()
    for ids in windows:
        best = model.manifest.variants[0]
        reference = log_softmax(model.logits(ids, policy=best)[prompt_tokens:-1])
        rows = []
        started = time.perf_counter()
        for token in model.score(
            ids[:-1], prompt_tokens=prompt_tokens, policy=chosen, prefill=prefill
        ):
            times.append((time.perf_counter() - started) * 1e3)
            rows.append(token.logits.astype(np.float32))  # a copy: the next one overwrites it
            counts.update(token.path)
            spent.append(chosen.cost_ms(token.path, costs))
            started = time.perf_counter()
        ours = log_softmax(np.stack(rows))
        targets = ids[prompt_tokens + 1 :, None]
        nll.append(-np.take_along_axis(ours, targets, 1))
        reference_nll.append(-np.take_along_axis(reference, targets, 1))
        kl.append(kl_divergence(reference, ours))
        agree.append(reference.argmax(1) == ours.argmax(1))
        on_window()
    decisions = sum(counts.values())
    return Evaluation(
        perplexity=float(np.exp(np.mean(nll))),
        kl=float(np.mean(kl)),
        kl_stderr=stderr([float(part.mean()) for part in kl]),
        top1=float(np.mean(agree)),
        ms_per_token=float(np.median(times)),
        cost_ms=float(np.mean(spent)),
        tokens=sum(len(part) for part in kl),
        actions={action: count / decisions for action, count in sorted(counts.items())},
        reference_perplexity=float(np.exp(np.mean(reference_nll))),
    )


def text_windows(
    model: Model, text: str, window: int, prompt_tokens: int, max_windows: int | None
) -> list[Ids]:
    """Consecutive windows of token ids, `[window]` each.

    Raises:
        PolicyError: the text is shorter than one window, or the sizes do not fit.
    """
    limit = model.manifest.model.max_length
    if not 1 <= prompt_tokens <= window - 2 or window > limit:
        raise PolicyError(
            f"window {window} with {prompt_tokens} prompt tokens does not work: the prompt must "
            f"leave at least 2 tokens of the window, and the context is {limit}"
        )
    ids = model.text.encode(text)
    count = len(ids) // window
    if count == 0:
        raise PolicyError(f"the text has {len(ids)} tokens, fewer than one window of {window}")
    count = min(count, max_windows or count)
    return [ids[i * window : (i + 1) * window] for i in range(count)]


def stderr(means: list[float]) -> float:
    """Standard error of the mean of independent values; 0 for a single one."""
    if len(means) < 2:
        return 0.0
    return float(np.std(means, ddof=1) / np.sqrt(len(means)))


def kl_divergence(p: npt.NDArray, q: npt.NDArray) -> npt.NDArray[np.float64]:
    """KL(p || q) in nats from log-probabilities over the last axis."""
    result: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return result


def log_softmax(logits: npt.NDArray) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return result
