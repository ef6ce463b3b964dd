"""Speculative decoding: another speed, the same text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.core.actions import Action
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import PathPolicy
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.engine import Model
from dash_onnx.runtime.generate import GeneratedToken
from dash_onnx.runtime.planner import Draft, Guess, Planner
from dash_onnx.runtime.sampling import Sampler, Sampling
from dash_onnx.runtime.speculate import NgramIndex, Speculation

# Repeats itself, so that the text's own end is found in it.
PROMPT = "the keeper counts the ships, the keeper counts the ships, the keeper counts"
SPECULATE = ("ngram", "dash", "auto")


@pytest.fixture(scope="module")
def untrained(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """With made-up costs: in a model this small the profile is a matter of luck."""
    folder = with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("plain") / "b")))
    replace_manifest(folder, replace(Bundle(folder).manifest, scorer=None))
    with dash_onnx.load(folder) as model:
        yield model


@pytest.fixture(scope="module")
def scored_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored") / "bundle"
    return with_scorer(Path(shutil.copytree(tiny_bundle, folder)))


@pytest.fixture(scope="module")
def scored(scored_bundle: Path) -> Iterator[Model]:
    with dash_onnx.load(scored_bundle) as model:
        yield model


def steps(model: Model, **options: Any) -> list[GeneratedToken]:
    ids = model.text.encode(PROMPT)
    return [*model.generate_step(ids, **{"max_new_tokens": 60, "ignore_eos": True, **options})]


def tokens(model: Model, **options: Any) -> list[int]:
    return [step.token for step in steps(model, **options)]


@pytest.mark.parametrize("policy", ["full", "int8", "static:int8,skip,int4,full"])
@pytest.mark.parametrize("speculate", SPECULATE)
@pytest.mark.parametrize("trained", [False, True])
def test_greedy_text_is_that_of_the_target_alone(
    trained: bool, speculate: str, policy: str, untrained: Model, scored: Model
) -> None:
    model = scored if trained else untrained
    found = steps(model, policy=policy, speculate=speculate)
    assert [step.token for step in found] == tokens(model, policy=policy)
    if speculate != "auto":  # which need not find that it pays
        guesses = [step.guess for step in found if step.guess]
        assert {guess.source for guess in guesses} == {speculate}
        assert all(0 <= guess.right <= guess.tokens <= 8 for guess in guesses)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.2},
        {"temperature": 1.1, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("speculate", SPECULATE)
def test_the_same_seed_draws_the_same_text(
    speculate: str, sampling: dict[str, Any], untrained: Model
) -> None:
    chosen = {"policy": "full", "seed": 3, **sampling}
    assert tokens(untrained, speculate=speculate, **chosen) == tokens(untrained, **chosen)


class Chain:
    """In place of a sequence: the next token depends on the last one, and on who computes it."""

    def __init__(self, **logits: np.ndarray):
        """Logits `[V, V]` of each head."""
        self.length, self._logits = 1, logits

    def forward(self, tokens: int | np.ndarray, decider: Any, *, every: bool = False) -> Any:
        ids = np.atleast_1d(tokens)
        self.length += len(ids)
        rows = self._logits[decider.head][ids]
        return (rows if every else rows[-1]), ()

    def truncate(self, length: int) -> None:
        self.length = length


class Named(PathPolicy):
    """A policy of one path without layers."""

    def __init__(self, head: Action):
        self.name = self.head = head

    @property
    def uniform(self) -> tuple[Action, ...]:
        return ()

    def paths(self) -> Iterator[tuple[Action, ...]]:
        return repeat(())


def drawn(
    speculate: Any,
    sampling: Sampling,
    target: np.ndarray,
    draft: np.ndarray,
    count: int,
    *,
    begin: Sequence[int] = (0,),
    eos: frozenset[int] = frozenset(),
) -> tuple[list[int], list[Guess]]:
    """A text of a chain with `count` further tokens, or up to EOS; what came of its guesses."""
    chain: Any = Chain(int8=target, int4=draft)
    text, sampler, guesses = [*begin], Sampler(sampling), []

    def draw(logits: np.ndarray) -> int:
        text.append(sampler(logits, text))
        return text[-1]

    planner = Planner(Draft(Named("int4"), 0.1, 0.8))
    going = Speculation(chain, Named("int8"), draw, speculate, planner, eos)
    while len(text) < len(begin) + count and not eos & {*text[len(begin) :]}:
        guesses.append(going.step(text, 100)[1])
    return text, [guess for guess in guesses if guess]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3, "temperature": 1.5}],
    ids=str,
)
@pytest.mark.parametrize("speculate", ["ngram", "dash"])
def test_twenty_thousand_draws_have_the_target_s_distribution(
    speculate: str, sampling: dict[str, Any]
) -> None:
    """By chi-square, given the token before."""
    rng = np.random.default_rng(0)
    target = rng.normal(0, 1.5, (8, 8)).astype(np.float32)
    draft = target + rng.normal(0, 0.7, target.shape).astype(np.float32)
    chosen = Sampling(**{"temperature": 1.0, "seed": 1, **sampling})
    text, guesses = drawn(speculate, chosen, target, draft, 20_000)
    assert 50 < sum(guess.right for guess in guesses) < sum(guess.tokens for guess in guesses)
    counts = np.zeros(target.shape)
    np.add.at(counts, (text[:-1], text[1:]), 1)
    wanted = counts.sum(1, keepdims=True) * np.stack([filtered(row, chosen) for row in target])
    assert not counts[wanted == 0].any()
    often = wanted > 5
    chi_square = ((counts - wanted) ** 2 / np.where(often, wanted, 1))[often].sum()
    freedom = often.sum() - len(target)
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def filtered(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities of the next token, written as plainly as can be."""
    order = np.argsort(-logits)
    kept = np.exp(logits[order].astype(np.float64) / sampling.temperature)
    if sampling.top_k:
        kept[sampling.top_k :] = 0
    kept /= kept.sum()
    kept[np.cumsum(kept) - kept >= sampling.top_p] = 0
    kept[kept < sampling.min_p * kept[0]] = 0
    return (kept / kept.sum())[np.argsort(order)]


@pytest.mark.parametrize("speculate", ["ngram", "dash"])
def test_nothing_is_guessed_or_drawn_after_the_end(speculate: str) -> None:
    """Token 3 ends the text, and 0 would follow it."""
    cycle = np.full((9, 9), -9.0, np.float32)
    cycle[range(9), [1, 2, 4, 0, 5, 6, 7, 8, 3]] = 9.0  # 0 1 2 4 5 6 7 8 3
    begin = [0, 1, 2, 4, 5, 6, 7, 8, 3, 0]
    text, guesses = drawn(speculate, Sampling(), cycle, cycle, 30, begin=begin)
    assert len(text) >= 40 and sum(guess.right for guess in guesses) > 10
    text, guesses = drawn(speculate, Sampling(), cycle, cycle, 30, begin=begin, eos=frozenset({3}))
    assert text == [*begin, 1, 2, 4, 5, 6, 7, 8, 3]
    assert sum(guess.tokens for guess in guesses) <= 6  # the first two passes are without


def test_right_guesses_save_passes(untrained: Model) -> None:
    """Those of a path that differs from the target in one layer mostly are."""
    policy = "static:int8,int4,int4,int4"
    found = steps(untrained, policy=policy, speculate="dash", max_new_tokens=150)
    guesses = [step.guess for step in found if step.guess]
    assert sum(guess.right for guess in guesses) > 50
    assert len(guesses) < 100  # one for each pass


@pytest.mark.parametrize("speculate", SPECULATE)
def test_limits_hold_to_the_token(speculate: str, untrained: Model) -> None:
    for count in (1, 2, 7):
        found = steps(untrained, policy="full", speculate=speculate, max_new_tokens=count)
        assert len(found) == count
        assert [step.finish_reason for step in found] == [None] * (count - 1) + ["length"]
    found = steps(untrained, policy="full", speculate=speculate, max_new_tokens=1000)
    alone = steps(untrained, policy="full", max_new_tokens=1000)
    assert [step.token for step in found] == [step.token for step in alone]
    assert found[-1].finish_reason == alone[-1].finish_reason == "context"


@pytest.mark.parametrize("speculate", SPECULATE)
def test_a_stop_text_ends_a_pass_in_its_middle(speculate: str, untrained: Model) -> None:
    options = {"policy": "full", "max_new_tokens": 60, "ignore_eos": True}
    whole = untrained.generate(PROMPT, **options)
    stop = whole[len(whole) // 2 :][:2]
    cut = untrained.generate(PROMPT, speculate=speculate, stop=stop, **options)
    assert cut == untrained.generate(PROMPT, stop=stop, **options)
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize("speculate", SPECULATE)
def test_a_cache_goes_on_after_guesses(speculate: str, untrained: Model) -> None:
    """The K/V that it keeps are the target's: those of wrong guesses are gone."""
    ids = untrained.text.encode(PROMPT)
    options: dict[str, Any] = {"policy": "full", "max_new_tokens": 20, "ignore_eos": True}
    cache = untrained.new_cache()
    found = [*untrained.generate_step(ids, cache=cache, speculate=speculate, **options)]
    longer = [*ids.tolist(), *(step.token for step in found)]
    assert cache.tokens == longer[: len(cache)] and len(cache) == len(longer) - 1
    again = [*untrained.generate_step(longer, cache=cache, **options)]
    afresh = [*untrained.generate_step(longer, **options)]
    assert [step.token for step in again] == [step.token for step in afresh]


def test_speculation_takes_the_highest_precision_unless_told(scored: Model) -> None:
    assert {path for step in steps(scored, speculate="ngram") for path in step.path} == {"full"}
    for options in ({"policy": "dash"}, {"budget": "fast"}, {"policy": "random:1"}):
        with pytest.raises(PolicyError, match="one path for every token"):
            steps(scored, speculate="ngram", **options)
    with pytest.raises(PolicyError, match="speculate='maybe'"):
        steps(scored, speculate="maybe")


def test_the_model_s_own_policy_does_not_decide_whether_a_request_may_speculate(
    scored_bundle: Path,
) -> None:
    for own in ({"budget": "balanced"}, {"policy": "int8"}):
        with dash_onnx.load(scored_bundle, **own) as model:
            found = steps(model, speculate="auto")
            assert {path for step in found for path in step.path} == {"full"}
            with pytest.raises(PolicyError, match="one path for every token"):
                steps(model, speculate="auto", policy="dash")


def test_a_path_must_be_cheaper_to_guess(untrained: Model) -> None:
    with pytest.raises(PolicyError, match="needs a cheaper path than policy 'int4'"):
        untrained.stream(PROMPT, policy="int4", speculate="dash")
    with pytest.raises(PolicyError, match="needs a cheaper path"):
        untrained.preload("int4", speculate="dash")
    found = steps(untrained, policy="int4", speculate="auto", max_new_tokens=150)
    assert {step.guess.source for step in found if step.guess} <= {"ngram"}


def test_a_budget_cannot_change_while_guesses_are_checked(untrained: Model) -> None:
    with untrained.stream(PROMPT, policy="int8", speculate="ngram") as chunks:
        with pytest.raises(PolicyError, match="cannot change with `speculate`; leave it out"):
            chunks.set_budget(0.5)


def followed(text: list[int], count: int) -> tuple[int, list[int]]:
    """What `NgramIndex.following` promises, by looking everywhere."""
    for size in range(min(6, len(text) - 1), 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                return size, text[end : end + count]
    return 0, []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8), st.integers(0, 60))
@settings(max_examples=300)
def test_an_index_finds_the_latest_longest_match(text: list[int], count: int, first: int) -> None:
    index = NgramIndex()
    index.extend(text[:first])
    index.extend(text)
    assert index.following(count) == followed(text, count)


def test_several_tokens_at_once_give_the_logits_of_each(untrained: Model) -> None:
    ids = untrained.text.encode(PROMPT)
    together = untrained.logits(ids, policy="int8")
    alone = [token.logits.copy() for token in untrained.score(ids, policy="int8")]
    assert np.abs(together[1:] - np.stack(alone)).max() < 1e-3


def test_passes_of_a_few_tokens_share_their_logits(untrained: Model) -> None:
    """A buffer for each size would be as large as five, with a large vocabulary many megabytes."""
    sequence, memory = untrained.new_sequence(), set()
    path = FixedPath(("full",) * 4, "full")
    sequence.forward(np.array([1, 2, 3]), path)
    for size in (2, 9, 5):
        logits, _ = sequence.forward(np.arange(size), path, every=True)
        assert logits.shape[0] == size
        memory.add(logits.__array_interface__["data"][0])
    assert len(memory) == 1
