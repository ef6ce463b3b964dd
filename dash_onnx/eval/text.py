"""Perplexity of a text under a policy, its divergence from the reference, and its speed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dash_onnx.core.actions import Action
from dash_onnx.core.arrays import Ids
from dash_onnx.core.budget import Budget
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.core.statistics import kl_divergence, log_softmax, standard_error
from dash_onnx.runtime.engine import Model


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_text` measured, over the tokens that were decoded under the policy.

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


def evaluate_text(
    model: Model,
    text: str,
    policy: str | Policy,
    budget: Budget | None = None,
    *,
    window: int = 512,
    prompt_tokens: int = 128,
    max_windows: int | None = None,
    prefill: Action | None = None,
    reference: Model | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Runs a policy over consecutive windows of a text.

    Of each window the first `prompt_tokens` are prefilled and the rest is decoded token by token
    under the policy.

    Args:
        max_windows: None takes every whole window.
        prefill: precision of the prompt; None takes what the policy loads.
        reference: another bundle of the same model; its highest precision is what the policy is
            compared with, and None takes that of `model`.
        on_window: called after each window.

    Raises:
        PolicyError: the text is shorter than one window, or the sizes do not fit.
    """
    manifest, chosen = model.manifest, model.policy(policy, budget)
    other = reference or model
    spent, times = [], []
    nll, reference_nll, kl, agree = [], [], [], []  # of each window, [window - prompt_tokens - 1]
    counts: Counter[str] = Counter()
    for ids in _windows(model, text, window, prompt_tokens)[:max_windows]:
        best = other.logits(ids, policy=other.manifest.variants[0])
        wanted = log_softmax(best[prompt_tokens:-1])
        rows = []
        started = time.perf_counter()
        for token in model.score(
            ids[:-1], prompt_tokens=prompt_tokens, policy=chosen, prefill=prefill
        ):
            times.append((time.perf_counter() - started) * 1e3)
            rows.append(token.logits.astype(np.float32))  # a copy: the next one overwrites it
            counts.update(token.path)
            spent.append(chosen.cost_ms(token.path, manifest.costs))
            started = time.perf_counter()
        ours = log_softmax(np.stack(rows))
        targets = ids[prompt_tokens + 1 :, None]
        nll.append(-np.take_along_axis(ours, targets, 1))
        reference_nll.append(-np.take_along_axis(wanted, targets, 1))
        kl.append(kl_divergence(wanted, ours))
        agree.append(wanted.argmax(1) == ours.argmax(1))
        on_window()
    return Evaluation(
        perplexity=float(np.exp(np.mean(nll))),
        kl=float(np.mean(kl)),
        kl_stderr=standard_error([float(part.mean()) for part in kl]),
        top1=float(np.mean(agree)),
        ms_per_token=float(np.median(times)),
        cost_ms=float(np.mean(spent)),
        tokens=len(times),
        actions={action: n / counts.total() for action, n in sorted(counts.items())},
        reference_perplexity=float(np.exp(np.mean(reference_nll))),
    )


def _windows(model: Model, text: str, window: int, prompt_tokens: int) -> list[Ids]:
    """Consecutive whole windows of token ids, `[window]` each."""
    limit = model.manifest.model.max_length
    if not 1 <= prompt_tokens <= window - 2 or window > limit:
        raise PolicyError(
            f"window {window} with {prompt_tokens} prompt tokens does not work: the prompt must "
            f"leave at least 2 tokens of the window, and the context is {limit}"
        )
    ids = model.text.encode(text)
    if len(ids) < window:
        raise PolicyError(f"the text has {len(ids)} tokens, fewer than one window of {window}")
    return [ids[end - window : end] for end in range(window, len(ids) + 1, window)]
