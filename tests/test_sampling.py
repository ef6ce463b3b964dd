"""Sampling: from logits to the next token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_onnx.core.errors import PolicyError
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions, Options
from dash_onnx.runtime.sampling import Sampler, Sampling, _nucleus

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))  # most likely first: 1 3 4 0 2
DRAWS = 8_000


def draw(sampling: Sampling, logits: npt.NDArray = LOGITS, seen: list[int] | None = None) -> int:
    return Sampler(sampling)(logits, seen or [])


def shares(sampling: Sampling, logits: npt.NDArray = LOGITS, draws: int = DRAWS) -> npt.NDArray:
    sampler = Sampler(sampling)
    counts = np.bincount([sampler(logits, []) for _ in range(draws)], minlength=len(logits))
    return counts / draws


def assert_distribution(found: npt.NDArray, wanted: npt.NDArray, draws: int = DRAWS) -> None:
    """Pearson's chi-square test at a level of about 1e-5; the seeds are fixed."""
    assert not found[wanted == 0].any()
    support = wanted > 0
    chi = draws * ((found[support] - wanted[support]) ** 2 / wanted[support]).sum()
    degrees = support.sum() - 1
    assert chi < degrees + 5 * np.sqrt(2 * degrees) + 10


def normalized(*weights: float) -> npt.NDArray:
    return np.array(weights) / sum(weights)


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert draw(Sampling()) == 1
    assert draw(Sampling(top_k=3, top_p=0.5, min_p=0.9)) == 1


def test_greedy_takes_the_first_of_equals() -> None:
    assert draw(Sampling(), np.array([0.0, 2.0, 2.0])) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_scales_the_logits_of_the_softmax(temperature: float) -> None:
    wanted = np.exp(LOGITS.astype(np.float64) / temperature)
    found = shares(Sampling(temperature=temperature, seed=1))
    assert_distribution(found, wanted / wanted.sum())


@pytest.mark.parametrize("temperature", [1e-6, 1e-310])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = np.array([1.0, 5.0, 4.9, -3.0])
    assert draw(Sampling(temperature=temperature, seed=0), logits) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_large_logits_do_not_overflow(dtype: type) -> None:
    logits = np.array([30000.0, -60000.0, 30000.0], dtype)
    assert_distribution(shares(Sampling(temperature=1.0, seed=2), logits), np.array([0.5, 0, 0.5]))


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0])
    found = shares(Sampling(temperature=1.0, seed=3), logits, 2000)
    assert found[0] == found[2] == 0


@pytest.mark.parametrize(
    ("k", "wanted"),
    [
        (1, [0, 1, 0, 0, 0]),
        (2, [0, 4, 0, 3, 0]),
        (4, [10, 40, 0, 30, 15]),
        (5, [10, 40, 5, 30, 15]),
        (99, [10, 40, 5, 30, 15]),
        (0, [10, 40, 5, 30, 15]),
    ],
)
def test_top_k_keeps_the_k_most_likely_in_their_proportions(k: int, wanted: list[float]) -> None:
    assert_distribution(shares(Sampling(temperature=1.0, top_k=k, seed=4)), normalized(*wanted))


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        (0.01, [0, 1, 0, 0, 0]),
        (0.39, [0, 1, 0, 0, 0]),
        (0.41, [0, 4, 0, 3, 0]),  # 0.4 is not enough: the token that crosses stays
        (0.69, [0, 4, 0, 3, 0]),
        (0.71, [0, 40, 0, 30, 15]),
        (0.96, [10, 40, 5, 30, 15]),
        (1.0, [10, 40, 5, 30, 15]),
    ],
)
def test_top_p_keeps_the_token_that_crosses_the_threshold(p: float, wanted: list[float]) -> None:
    assert_distribution(shares(Sampling(temperature=1.0, top_p=p, seed=5)), normalized(*wanted))


def test_top_p_that_is_reached_exactly_keeps_no_further_token() -> None:
    logits = np.array([0.0, 0.0, 0.0, 0.0])  # 1/4 each, exact in binary
    found = shares(Sampling(temperature=1.0, top_p=0.5, seed=6), logits)
    assert_distribution(found, np.array([0.5, 0.5, 0, 0]))


@given(st.integers(0, 2**32), st.floats(0.001, 0.999), st.integers(1, 400), st.floats(0.1, 6))
def test_the_nucleus_is_the_shortest_prefix_that_reaches_the_share(
    seed: int, share: float, size: int, spread: float
) -> None:
    weights = np.exp(np.random.default_rng(seed).normal(0, spread, size))
    kept = _nucleus(weights, share)
    assert list(kept) == list(np.argsort(-weights, kind="stable")[: len(kept)])
    mass = weights[kept].sum() / weights.sum()
    assert mass >= share * (1 - 1e-12)
    assert mass - weights[kept[-1]] / weights.sum() < share * (1 + 1e-12)


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        (0.0, [10, 40, 5, 30, 15]),
        (0.12, [10, 40, 5, 30, 15]),  # threshold 0.048
        (0.13, [10, 40, 0, 30, 15]),
        (0.5, [0, 4, 0, 3, 0]),
        (0.8, [0, 1, 0, 0, 0]),
        (1.0, [0, 1, 0, 0, 0]),
    ],
)
def test_min_p_keeps_what_is_likely_enough_next_to_the_best(p: float, wanted: list[float]) -> None:
    assert_distribution(shares(Sampling(temperature=1.0, min_p=p, seed=7)), normalized(*wanted))


def test_min_p_of_one_keeps_equals() -> None:
    found = shares(Sampling(temperature=1.0, min_p=1.0, seed=8), np.array([1.0, 2.0, 2.0]))
    assert_distribution(found, np.array([0, 0.5, 0.5]))


def test_filters_act_on_the_tempered_distribution() -> None:
    # At temperature 0.5 the shares are squared: 0.16 of 0.285 is 56 %, with 0.09 it is 88 %.
    found = shares(Sampling(temperature=0.5, top_p=0.6, seed=9))
    assert_distribution(found, normalized(0, 0.16, 0, 0.09, 0))


def test_top_p_counts_probabilities_among_the_top_k() -> None:
    # Of the two that top_k keeps, the first has 4/7 = 57 %: enough for 0.5.
    found = shares(Sampling(temperature=1.0, top_k=2, top_p=0.5, seed=10))
    assert_distribution(found, np.array([0, 1.0, 0, 0, 0]))


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = np.array([4.0, 3.0, -1.0, -1.5])
    sampling = Sampling(repetition_penalty=2.0)
    assert draw(sampling, logits, [0]) == 1  # 4 / 2 < 3
    assert draw(sampling, logits, [0, 1, 0]) == 0  # 2 against 1.5, counted once
    assert draw(sampling, np.array([-1.0, -1.5]), [0]) == 1  # -1 * 2 < -1.5
    assert draw(sampling, np.array([-1.0, 0.0, -3.0]), [1]) == 1  # zero stays zero


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, [0] * 6),
        ({"presence_penalty": 0.3}, [0, 1, 0, 0, 0, 0]),
        ({"frequency_penalty": 0.3}, [0, 1, 0, 1, 2, 0]),
        ({"frequency_penalty": -1.0}, [0] * 6),
    ],
)
def test_penalties_of_the_answer_leave_the_prompt_alone(
    given: dict[str, float], wanted: list[int]
) -> None:
    logits, prompt, drawn = np.array([2.0, 1.85, 1.5, 1.0]), [0, 0], list[int]()
    sampler = Sampler(Sampling(**given), len(prompt))
    for _ in wanted:
        drawn.append(sampler(logits, prompt + drawn))
    assert drawn == wanted


def test_a_penalty_below_one_makes_seen_tokens_more_likely() -> None:
    assert draw(Sampling(repetition_penalty=0.5), np.array([2.0, 3.0]), [0]) == 0
    assert draw(Sampling(repetition_penalty=0.5), np.array([-3.0, -2.0]), [0]) == 0


def test_the_penalty_of_a_growing_text_is_that_of_the_whole_text() -> None:
    rng = np.random.default_rng(3)
    sampling, text = Sampling(temperature=1.0, repetition_penalty=1.7, seed=5), [3, 3, 0]
    sampler = Sampler(sampling)
    for _ in range(40):
        logits = rng.normal(size=12)
        penalized = np.array(
            [(x / 1.7 if x > 0 else x * 1.7) if i in text else x for i, x in enumerate(logits)]
        )
        state = sampler._rng.bit_generator.state
        alone = Sampler(Sampling(temperature=1.0))
        alone._rng.bit_generator.state = state
        token = sampler(logits, text)
        assert token == alone(penalized, [])
        text += [token, int(rng.integers(12))]


def test_the_penalty_acts_before_the_draw() -> None:
    logits = np.array([2.0, 1.0])
    sampler = Sampler(Sampling(temperature=1.0, repetition_penalty=2.0, seed=11))
    counts = np.bincount([sampler(logits, [0]) for _ in range(DRAWS)], minlength=2)
    assert_distribution(counts / DRAWS, np.array([0.5, 0.5]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, repetition_penalty=1.5, top_k=3, top_p=0.9, min_p=0.1),
    ],
)
def test_logits_are_left_as_they_are(sampling: Sampling, dtype: type) -> None:
    logits = LOGITS.astype(dtype)
    before = logits.copy()
    logits.flags.writeable = False
    draw(sampling, logits, [0, 1, 2])
    np.testing.assert_array_equal(logits, before)
    assert logits.dtype == dtype


def test_the_result_is_a_plain_int() -> None:
    assert type(draw(Sampling())) is int
    assert type(draw(Sampling(temperature=1.0))) is int


def test_a_seed_repeats_the_draws_and_none_does_not() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler(LOGITS, []) for _ in range(100)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)


def test_draws_of_one_generation_leave_the_global_generator_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    draw(Sampling(temperature=1.0, seed=1))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 101.0),
        ("repetition_penalty", float("nan")),
        ("repetition_penalty", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", float("nan")),
        ("seed", -1),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(PolicyError, match=f"^{name}={value} is not allowed; it must be "):
        GenerationOptions(**{name: value})


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 1, "min_p": 1, "top_k": 0}])
def test_limits_are_allowed(options: dict) -> None:
    GenerationOptions(**options)


def test_what_is_given_replaces_a_value_and_none_leaves_it() -> None:
    options = GenerationOptions(temperature=0.5, top_k=7, stop="END")
    found = GenerationOptions.of(options, top_k=3, temperature=None, max_new_tokens=9)
    assert found == GenerationOptions(temperature=0.5, top_k=3, stop="END", max_new_tokens=9)
    assert GenerationOptions.of(None) == GenerationOptions()


@pytest.mark.parametrize("name", ["generate_step", "stream", "generate", "chat", "batch"])
def test_every_option_is_a_keyword_that_editors_and_type_checkers_see(name: str) -> None:
    parameters = inspect.signature(getattr(Model, name)).parameters
    (given,) = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    assert given.annotation == "Unpack[Options]"
    assert Options.__annotations__.keys() == {field.name for field in fields(GenerationOptions)}


def test_a_logits_processor_is_asked_before_each_token(tiny_model: Model) -> None:
    ids, asked = tiny_model.text.encode("the keeper"), []

    def processed(text: Sequence[int], logits: np.ndarray) -> np.ndarray:
        asked.append([*text])
        return np.where(np.arange(len(logits)) == 7 + len(text) % 3, np.float32(9), -np.inf)

    given: dict[str, Any] = {"max_new_tokens": 9, "ignore_eos": True}
    found = [
        step.token for step in tiny_model.generate_step(ids, logits_processor=processed, **given)
    ]
    text = [*ids.tolist(), *found]
    assert found == [7 + len(text[:end]) % 3 for end in range(len(ids), len(text))]
    assert asked == [text[:end] for end in range(len(ids), len(text))]
    with pytest.raises(PolicyError, match="logits_processor=5 must be a function"):
        tiny_model.stream("the keeper", logits_processor=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_token_that_is_infinitely_likely_is_drawn(
    temperature: float, given: Any, tiny_model: Model
) -> None:
    def processed(_: object, logits: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(logits)) == 20, np.inf, logits)

    given = {"max_new_tokens": 3, "ignore_eos": True, "temperature": temperature, **given}
    steps = tiny_model.generate_step([3, 4], logits_processor=processed, **given)
    assert [step.token for step in steps] == [20] * 3


def test_a_single_stop_string_is_not_taken_for_its_letters() -> None:
    assert GenerationOptions(stop="END").stop == ("END",)


@pytest.mark.parametrize("stop", ["", ("END", "")])
def test_an_empty_stop_string_is_refused(stop: str | tuple[str, ...]) -> None:
    with pytest.raises(PolicyError, match="stop"):
        GenerationOptions(stop=stop)


@pytest.mark.parametrize("count", [0, -5])
def test_no_new_tokens_at_all_is_refused(count: int) -> None:
    with pytest.raises(PolicyError, match=f"max_new_tokens={count} must be at least 1"):
        GenerationOptions(max_new_tokens=count)


@pytest.mark.parametrize(
    "made",
    [
        lambda logits: None,
        lambda logits: logits[:3],
        lambda logits: "x",
        lambda logits: logits * np.nan,
        lambda logits: np.full_like(logits, -np.inf),
        lambda logits: logits.astype(np.int64),
    ],
    ids=["None", "short", "text", "nan", "none left", "integers"],
)
def test_what_a_logits_processor_returns_is_checked(made: Any, tiny_model: Model) -> None:
    with pytest.raises(PolicyError, match="logits_processor must return logits"):
        tiny_model.generate("a", logits_processor=lambda ids, logits: made(logits))
