"""Speculative decoding: another speed, the same text."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.core.errors import PolicyError
from dash_onnx.runtime.engine import Model
from dash_onnx.runtime.generate import GeneratedToken
from dash_onnx.runtime.speculate import NgramIndex

# Repeats itself, so that the text's own end is found in it.
PROMPT = "the keeper counts the ships, the keeper counts the ships, the keeper counts"
SPECULATE = ("ngram", "dash", "auto")


@pytest.fixture(scope="module")
def scored(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("scored") / "bundle"
    with dash_onnx.load(with_scorer(Path(shutil.copytree(tiny_bundle, folder)))) as model:
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
    trained: bool, speculate: str, policy: str, tiny_model: Model, scored: Model
) -> None:
    model = scored if trained else tiny_model
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
    ],
    ids=str,
)
@pytest.mark.parametrize("speculate", SPECULATE)
def test_the_same_seed_draws_the_same_text(
    speculate: str, sampling: dict[str, Any], tiny_model: Model
) -> None:
    chosen = {"policy": "full", "seed": 3, **sampling}
    assert tokens(tiny_model, speculate=speculate, **chosen) == tokens(tiny_model, **chosen)


def test_the_first_token_after_a_right_or_wrong_guess_has_the_target_s_distribution(
    tiny_model: Model,
) -> None:
    """By its counts over many seeds, as without guesses."""
    counts = {}
    for speculate in ("off", "dash"):
        options = {"policy": "full", "temperature": 1.5, "top_k": 4, "max_new_tokens": 3}
        drawn = [
            tokens(tiny_model, speculate=speculate, seed=seed, **options)[1] for seed in range(300)
        ]
        counts[speculate] = Counter(drawn)
    assert counts["off"] == counts["dash"]
    assert len(counts["off"]) > 1


def test_right_guesses_save_passes(tiny_model: Model) -> None:
    """Those of a path that differs from the target in one layer mostly are."""
    policy = "static:int8,int4,int4,int4"
    found = steps(tiny_model, policy=policy, speculate="dash", max_new_tokens=150)
    guesses = [step.guess for step in found if step.guess]
    assert sum(guess.right for guess in guesses) > 50
    assert len(guesses) < 100  # one for each pass


@pytest.mark.parametrize("speculate", SPECULATE)
def test_limits_hold_to_the_token(speculate: str, tiny_model: Model) -> None:
    for count in (1, 2, 7):
        found = steps(tiny_model, policy="full", speculate=speculate, max_new_tokens=count)
        assert len(found) == count
        assert [step.finish_reason for step in found] == [None] * (count - 1) + ["length"]
    found = steps(tiny_model, policy="full", speculate=speculate, max_new_tokens=1000)
    alone = steps(tiny_model, policy="full", max_new_tokens=1000)
    assert [step.token for step in found] == [step.token for step in alone]
    assert found[-1].finish_reason == alone[-1].finish_reason == "context"


@pytest.mark.parametrize("speculate", SPECULATE)
def test_a_stop_text_ends_a_pass_in_its_middle(speculate: str, tiny_model: Model) -> None:
    options = {"policy": "full", "max_new_tokens": 60, "ignore_eos": True}
    whole = tiny_model.generate(PROMPT, **options)
    stop = whole[len(whole) // 2 :][:2]
    cut = tiny_model.generate(PROMPT, speculate=speculate, stop=stop, **options)
    assert cut == tiny_model.generate(PROMPT, stop=stop, **options)
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize("speculate", SPECULATE)
def test_a_cache_goes_on_after_guesses(speculate: str, tiny_model: Model) -> None:
    """The K/V that it keeps are the target's: those of wrong guesses are gone."""
    ids = tiny_model.text.encode(PROMPT)
    options: dict[str, Any] = {"policy": "full", "max_new_tokens": 20, "ignore_eos": True}
    cache = tiny_model.new_cache()
    found = [*tiny_model.generate_step(ids, cache=cache, speculate=speculate, **options)]
    longer = [*ids.tolist(), *(step.token for step in found)]
    assert cache.tokens == longer[: len(cache)] and len(cache) == len(longer) - 1
    again = [*tiny_model.generate_step(longer, cache=cache, **options)]
    afresh = [*tiny_model.generate_step(longer, **options)]
    assert [step.token for step in again] == [step.token for step in afresh]


def test_speculation_takes_the_highest_precision_unless_told(scored: Model) -> None:
    assert {path for step in steps(scored, speculate="ngram") for path in step.path} == {"full"}
    for options in ({"policy": "dash"}, {"budget": "fast"}, {"policy": "random:1"}):
        with pytest.raises(PolicyError, match="one path for every token"):
            steps(scored, speculate="ngram", **options)
    with pytest.raises(PolicyError, match="speculate='maybe'"):
        steps(scored, speculate="maybe")


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


def test_several_tokens_at_once_give_the_logits_of_each(tiny_model: Model) -> None:
    ids = tiny_model.text.encode(PROMPT)
    together = tiny_model.logits(ids, policy="int8")
    alone = [token.logits.copy() for token in tiny_model.score(ids, policy="int8")]
    assert np.abs(together[1:] - np.stack(alone)).max() < 1e-3
