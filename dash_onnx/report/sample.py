"""The sample: a text run through the runtime under the policy, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dash_onnx.core.actions import Action, path_letters
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.budget import DEFAULT_PRESET, Budget, reference_ms, scorer_facts
from dash_onnx.core.errors import PolicyError, SourceError
from dash_onnx.core.policy import Policy, ScoredPolicy
from dash_onnx.core.progress import Loop
from dash_onnx.core.statistics import kl_divergence, log_softmax
from dash_onnx.report.tokens import Token, describe
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GREEDY

_PROMPT = "Write a short story about a lighthouse keeper who counts 12 ships in the night of 1897."
_PREFILLED = 8  # tokens of a given text: the first ones are attention sinks and not typical
_MIN_TOKENS = 8  # fewest decoded tokens for meaningful figures


@dataclass(frozen=True)
class PolicyRun:
    """Run of one policy on the sample; tuples have one entry per decoded token.

    Attributes:
        name: name of the policy.
        budget: the fraction asked for; 0 for policies without one.
        head: precision of the LM head.
        paths: path, one character per layer.
        cost: cost as a fraction of the reference's time.
        kl: KL(reference || policy) of the next token in nats.
        predicted: sum of the scorer's predictions for the chosen actions, in nats; empty if no
            scorer decided.
        top1: share of tokens whose most likely next token is the reference's, so that the
            reference would accept it as a draft token.
    """

    name: str
    budget: float
    head: Action
    paths: tuple[str, ...]
    cost: tuple[float, ...]
    kl: tuple[float, ...]
    predicted: tuple[float, ...]
    top1: float


@dataclass(frozen=True)
class SampleText:
    """Token ids of the sample.

    Attributes:
        source: where it came from.
        ids: `[S]`, prompt part first.
        prompt_tokens: number of prefilled tokens.
    """

    source: str
    ids: Ids
    prompt_tokens: int


@dataclass(frozen=True)
class Sample:
    """The sample and the run of each policy on it.

    Attributes:
        source: where the text came from.
        prompt_tokens: number of tokens prefilled before the first decoded one.
        text: what the decoded tokens say; a character may be in several of them.
        tokens: the decoded tokens.
        runs: runs of the scorer, one per budget.
        baselines: runs without a scorer, on the same tokens.
    """

    source: str
    prompt_tokens: int
    text: str
    tokens: tuple[Token, ...]
    runs: tuple[PolicyRun, ...]
    baselines: tuple[PolicyRun, ...]


def given_text(model: Model, text: str, tokens: int, source: str) -> SampleText:
    """The beginning of a text.

    Raises:
        SourceError: the text is too short.
    """
    limit = model.manifest.model.max_length
    ids = model.text.encode(text)[:limit]
    if len(ids) < _PREFILLED + _MIN_TOKENS:
        raise SourceError(
            f"{source} has {len(ids)} tokens; a report needs at least {_PREFILLED + _MIN_TOKENS}"
        )
    return SampleText(source, ids[: max(tokens, _MIN_TOKENS) + _PREFILLED], _PREFILLED)


def generated_text(model: Model, tokens: int) -> SampleText:
    """What the model answers to a short prompt under the default preset.

    Raises:
        PolicyError: the context has no room for an answer.
    """
    prompt = model.text.encode_message(_PROMPT)
    room = model.manifest.model.max_length - len(prompt)
    if room < _MIN_TOKENS:
        raise PolicyError("the context has no room for a generated sample; give --text FILE")
    # Sampled, because greedy answers of small models soon repeat themselves.
    steps = model.generate_step(
        prompt,
        policy="dash",
        budget=DEFAULT_PRESET,
        max_new_tokens=min(tokens, room),
        ignore_eos=True,
        options=GREEDY,
        temperature=0.7,
        seed=0,
    )
    ids = prompt.tolist()
    for count, step in enumerate(steps, 1):
        ids.append(step.token)
        if step.token in model.text.eos_token_ids and count >= _MIN_TOKENS:
            break
    return SampleText("self-generated", np.asarray(ids, np.int64), len(prompt))


def measure(model: Model, text: SampleText, budgets: Sequence[Budget]) -> Sample:
    """Runs the scorer at every budget, and the baselines.

    The baselines are the best static assignment within each budget, and every uniform precision
    but the highest.

    Args:
        budgets: presets or fractions.

    Raises:
        PolicyError: the bundle cannot meet a budget, or has no scorer.
    """
    reference = model.logits(text.ids, policy=model.manifest.variants[0])[text.prompt_tokens :]

    policies = [ScoredPolicy(model.manifest, budget) for budget in budgets]
    wanted: list[tuple[Policy, float]] = [(policy, policy.budget) for policy in policies]
    for policy in policies:
        try:
            wanted.append((model.policy("static", policy.budget), policy.budget))
        except PolicyError:  # none is that cheap
            continue
    wanted += [(model.policy(precision), 0.0) for precision in model.manifest.variants[1:]]
    runs = [_run(model, text, *one, reference) for one in Loop("runs", wanted)]
    ids = text.ids.tolist()
    return Sample(
        text.source,
        text.prompt_tokens,
        model.text.tokenizer.decode(ids[text.prompt_tokens :], skip_special_tokens=False),
        describe(model.text, ids)[text.prompt_tokens :],
        tuple(runs[: len(policies)]),
        tuple(runs[len(policies) :]),
    )


def _run(
    model: Model,
    text: SampleText,
    policy: Policy,
    budget: float,
    reference: Logits,
) -> PolicyRun:
    """Runs one policy over the whole text; `reference` holds logits `[S - prompt, V]`."""
    full_ms, actions = reference_ms(model.manifest), scorer_facts(model.manifest).actions
    paths, cost, kl, predicted, agree = [], [], [], [], []
    scored = model.score(
        text.ids, prompt_tokens=text.prompt_tokens, policy=policy, predictions=True
    )
    for theirs, token in zip(reference, scored, strict=True):
        paths.append(path_letters(token.path))
        cost.append(round(policy.cost_ms(token.path, model.manifest.costs) / full_ms, 5))
        kl.append(max(float(kl_divergence(log_softmax(theirs), log_softmax(token.logits))), 0.0))
        agree.append(theirs.argmax() == token.logits.argmax())
        if token.predicted_kl is not None:
            chosen = [actions.index(action) for action in token.path]
            values = token.predicted_kl[np.arange(len(chosen)), chosen]
            predicted.append(float(values.sum(dtype=np.float64)))
    return PolicyRun(
        policy.name,
        budget,
        policy.head,
        tuple(paths),
        tuple(cost),
        tuple(kl),
        tuple(predicted),
        float(np.mean(agree)),
    )
