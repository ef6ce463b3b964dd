"""What is drafted, and how much of it: with texts and times made up, so that no machine decides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_onnx.core.facts import PassCosts
from dash_onnx.runtime.drafts import MAX_DRAFT_TOKENS, Drafter, DraftStats, Lookup, best_length

# What passes of 1 to 9 tokens take, as a multiple of one: measured on two cores.
TIMES = {
    "135M int4": (1, 1.27, 1.56, 1.9, 2.1, 2.5, 2.7, 2.9, 3.1),
    "135M int8": (1, 1.26, 1.61, 1.74, 1.9, 2.3, 2.3, 2.3, 2.6),
    "135M full": (1, 1.16, 1.18, 1.26, 1.4, 1.4, 1.5, 1.6, 1.7),
    "0.5B int8": (1, 1.03, 1.14, 1.24, 1.5, 1.5, 1.6, 1.8, 1.9),
    "1.5B int4": (1, 1.25, 1.74, 1.96, 2.4, 2.7, 3.0, 3.4, 3.7),
    "no gain": (1, 2, 3, 4, 5, 6, 7, 8, 9),
}


def stats(times: Sequence[float], reruns: bool = False) -> DraftStats:
    rows = tuple(range(1, len(times) + 1))
    passes = PassCosts(rows, (0,), {"int8": (tuple(times),)}, (), (), (1,), {"int8": (0.0,)})
    return DraftStats(passes, ("int8",), "int8", frozenset(), reruns)


def speed(
    known: DraftStats,
    prompt: Sequence[int],
    answer: Sequence[int],
    expected: Sequence[int] = (),
) -> float:
    """Tokens of an answer per plain pass."""
    text, drafter, spent, end = [*prompt], Drafter(prompt, expected), 0.0, len(prompt) + len(answer)
    text.append(answer[0])
    while len(text) < end:
        found, gains = drafter.find(known, text, min(MAX_DRAFT_TOKENS, end - len(text) - 1))
        drafts = found.tokens[: best_length([gains], known, 0)] if found else []
        assert len(text) + len(drafts) < end
        spent += known.cost(1 + len(drafts), 0)
        rest = answer[len(text) - len(prompt) :]
        right = next((n for n, draft in enumerate(drafts) if draft != rest[n]), len(drafts))
        if known.reruns and right < len(drafts):
            spent += known.cost(1 + right, 0)
        text += rest[: right + 1]
    return (len(answer) - 1) / spent


def drawn(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(count)]


@pytest.mark.parametrize("reruns", [False, True])
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("vocabulary", [3, 30, 300, 30000])
def test_text_that_cannot_be_drafted_costs_nothing(
    vocabulary: int, times: tuple[float, ...], reruns: bool
) -> None:
    known, fast = stats(times, reruns), []
    for seed in range(6):
        fast.append(speed(known, drawn(200, vocabulary, seed), drawn(300, vocabulary, seed + 100)))
    assert fast[0] > (0.97 if reruns else 0.98)  # of a model that was just loaded
    assert sum(fast) / len(fast) > (0.99 if reruns else 0.995)


@pytest.mark.parametrize("reruns", [False, True])
@pytest.mark.parametrize("name", [name for name in TIMES if name != "no gain"])
def test_the_more_of_an_answer_is_repeated_the_sooner_it_comes(name: str, reruns: bool) -> None:
    prompt, found = drawn(600, 5000), []
    for kept in (8, 20, 60):  # tokens between changes
        known = stats(TIMES[name], reruns)
        answer = [9999 if n % kept == 0 else token for n, token in enumerate(prompt)]
        found.append(speed(known, prompt, answer))
    assert found == sorted(found) and found[0] > 1.0
    best = max(n / time for n, time in enumerate(TIMES[name], 1))
    assert found[-1] > (0.65 if reruns else 0.75) * best


def test_nothing_is_drafted_where_a_row_costs_a_pass() -> None:
    assert speed(stats(TIMES["no gain"]), drawn(300, 9000), drawn(300, 9000)) == 1.0


def test_what_was_learned_holds_in_the_next_answer() -> None:
    """After three tokens comes any of nine, so that what followed them before is seldom right."""
    rng, known, found = random.Random(1), stats(TIMES["135M int8"]), []
    for _ in range(8):
        text = [token for _ in range(100) for token in (*drawn(3, 9**9, 5), rng.randrange(9))]
        found.append(speed(known, text[:200], text[200:]))
    unlearned = speed(stats(TIMES["135M int8"]), text[:200], text[200:])
    assert found[-1] > unlearned


def lines(count: int) -> list[list[int]]:
    """Lines that begin and end alike, as those of a program do."""
    return [[1, 2, *drawn(8, 40, seed), 3, 4] for seed in range(count)]


@pytest.mark.parametrize("change", ["line", "left out", "added", "word", "before"])
def test_an_edit_costs_little_more_than_what_changes(change: str) -> None:
    known, old, new = stats(TIMES["0.5B int8"]), lines(150), lines(150)
    if change == "line":
        new[70] = [1, 2, *drawn(8, 40, 999), 3, 4]
    elif change == "left out":
        del new[70:73]
    elif change == "added":
        new[70:70] = lines(999)[-3:]
    elif change == "word":
        new = [[77 if token == 7 else token for token in line] for line in new]
    else:
        new[:0] = [drawn(6, 9000)]
    expected, answer = [*chain(*old)], [*chain(*new)]
    assert speed(known, drawn(20, 9000), answer) < 2.5
    best = 9 / TIMES["0.5B int8"][-1]
    assert (
        speed(known, drawn(20, 9000), answer, expected) > (0.55 if change == "word" else 0.8) * best
    )


def test_an_expected_text_that_does_not_come_costs_little() -> None:
    known = stats(TIMES["135M int4"])
    assert speed(known, drawn(50, 300), drawn(300, 300, 1), drawn(600, 300, 2)) > 0.98


def longest(text: list[int]) -> int:
    """Tokens at the end of a text that occur in it before; none are one alone."""
    for size in range(min(16, len(text) - 1), 1, -1):
        if any(text[end - size : end] == text[-size:] for end in range(size, len(text))):
            return size
    return 0


@given(st.lists(st.integers(0, 2), max_size=18), st.integers(0, 18))
@settings(max_examples=300)
def test_what_is_found_followed_the_longest_match(text: list[int], begin: int) -> None:
    """With texts as short as the places that are compared."""
    lookup = Lookup(text[:begin])
    for token in text[begin:]:
        lookup.add(token)
    found, size = lookup.find(), longest(text)
    assert (found.match if found else 0) == size
    if found:
        ends = [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]]
        assert found.tokens == text[ends[-1] :][:MAX_DRAFT_TOKENS]


def test_an_unlikely_draft_takes_no_row_beside_another_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rate = "dash_onnx.runtime.drafts._Outcomes.rate"
    monkeypatch.setattr(rate, lambda _, believed: 0.1)
    text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    found, gains = Drafter(text).find(stats(TIMES["0.5B int8"]), text, MAX_DRAFT_TOKENS)
    assert found and found.tokens == [4, 5] and gains == pytest.approx([1.0, 1.1, 1.11])


def test_nothing_is_drafted_after_the_end() -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4], eos={6})
    for _ in range(30):
        found, gains = drafter.find(
            stats(TIMES["0.5B int8"]), [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4], 9
        )
    assert len(gains) == 3  # of none, of 5, and of 5 and 6
    assert found and found.tokens == [5, 6]


def test_no_draft_token_is_expected_more_than_once() -> None:
    """Not even after a long match with the text that the app expects, which agrees."""
    text, known = drawn(40, 30000), stats(TIMES["0.5B int8"])
    prompt, answer = text[:30], text[:17]  # the prompt repeats the expected text
    found, gains = Drafter(prompt, expected=text).find(known, prompt + answer, 15)
    assert found and len(gains) > 2
    added = np.diff(gains)
    assert (added < 1).all() and (np.diff(added) <= 0).all()
