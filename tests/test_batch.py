"""Continuous batching: several generations share their passes, and none notices."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import attending_plainly
from hypothesis import given, settings
from hypothesis import strategies as st

import dash_onnx
from dash_onnx.core.arrays import common_length
from dash_onnx.core.errors import ContextLengthError, DeviceError, PolicyError
from dash_onnx.core.policy import RandomPolicy
from dash_onnx.runtime import kv
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.generate import Request
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.passes import Pass
from dash_onnx.runtime.prefix import PrefixStore
from dash_onnx.runtime.results import Chunk
from dash_onnx.runtime.rows import Rows, calls
from dash_onnx.runtime.scheduler import Scheduler
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.slot import Slot

PROMPTS = [
    "the keeper",
    "the ships that pass in the night, the ships that",
    "counts",
    "a lighthouse " * 20,  # longer than what runs between two tokens of the others
    "the keeper of the lighthouse",
    "night",
    "in the night",
]


def options(**given: Any) -> GenerationOptions:
    return GenerationOptions(**{"max_new_tokens": 40, "ignore_eos": True, **given})


def run(
    model: Model, batch: Scheduler, *prompts: str, **given: Any
) -> list[list[Chunk | Exception]]:
    """What is delivered for each prompt."""
    told: list[list[Chunk | Exception]] = [[] for _ in prompts]
    for prompt, pieces in zip(prompts, told, strict=True):
        batch.submit(model.request(prompt, pieces.append, options(**given)))
    while batch.step():
        pass
    return told


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    "given",
    [
        {"policy": "full"},
        {"policy": "static:full,int8,skip,int4"},
        {"policy": "random:3"},  # rows that differ in every layer
        {"policy": "dash", "budget": 0.5},
        {"policy": "int4", "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 5},
        {"policy": "int8", "stop": ["e", "zz"], "ignore_eos": False},
    ],
    ids=lambda given: given["policy"].split(":")[0],
)
def test_every_text_is_what_it_would_be_alone(
    given: dict[str, Any], rows: int, scored: Model
) -> None:
    alone = [scored.generate(prompt, options=options(**given)) for prompt in PROMPTS]
    ended: list[int] = []
    together = scored.batch(
        PROMPTS,
        options=options(**given),
        parallel=rows,
        on_done=lambda index, _: ended.append(index),
    )
    assert together == alone
    assert sorted(ended) == [*range(len(PROMPTS))]
    for own, wanted in zip(together, alone, strict=True):
        assert own.finish_reason == wanted.finish_reason
        assert own.prompt_tokens == wanted.prompt_tokens
        assert own.generated_tokens == wanted.generated_tokens
        assert own.actions == wanted.actions


def test_rows_of_different_lengths_have_the_logits_of_each_alone(tiny_model: Model) -> None:
    """Through prompts that come between, growth, and rows that rest between others."""
    sessions = tiny_model.new_sequence().sessions
    decoder = Rows.new(sessions, 4, capacity=8)
    rng = np.random.default_rng(0)
    policy, heads = tiny_model.policy("random:1"), ("full", "int8", "full", "int8")
    assert isinstance(policy, RandomPolicy)
    paths = policy.paths()  # a layer that is always skipped would never read what it wrote
    alone = [tiny_model.new_sequence() for _ in range(4)]
    lengths = [0] * 4
    for step in range(60):
        starting = [row for row in range(4) if lengths[row] == 0 and step >= 5 * row]
        for row in starting:
            ids = rng.integers(2, 300, 3 + 7 * row)
            path, head = next(paths), heads[row]
            got = decoder.states[row].prefill(ids, path, head)
            np.testing.assert_allclose(got, alone[row].prefill(ids, path, head), atol=2e-4)
            lengths[row] = len(ids)
        rows = [row for row in range(4) if lengths[row] and rng.random() < 0.8]
        if not rows:
            continue
        tokens = [int(rng.integers(2, 300)) for _ in rows]
        deciders = [FixedPath(next(paths), heads[row]) for row in rows]
        logits, taken = decoder.forward(rows, [[token] for token in tokens], deciders)
        for row, token, own, path, decider in zip(
            rows, tokens, logits, taken, deciders, strict=True
        ):
            wanted, _ = alone[row].forward(token, decider)
            np.testing.assert_allclose(own[0], wanted, atol=2e-4)
            assert path == decider.path


@pytest.mark.parametrize("form", ["grouped", "plain", "int4"])
def test_rows_with_several_tokens_each_have_the_logits_of_each_alone(
    form: str, tiny_with: Callable[..., Path], tmp_path: Path
) -> None:
    """In different numbers, on different paths, with rows that rest between others."""
    folder = tiny_with(kv_cache="int4") if form == "int4" else tiny_with(attention="both")
    plainly = form == "plain"
    opened = attending_plainly(folder, tmp_path / "out") if plainly else dash_onnx.load(folder)
    with opened as model:
        together = Rows.new(model._sessions, 4, capacity=32)  # grows between two passes
        assert together.ragged
        alone = [model.new_sequence() for _ in range(4)]
        rng, heads = np.random.default_rng(0), ("full", "int8", "full", "int8")
        policy = model.policy("random:1")
        assert isinstance(policy, RandomPolicy)
        paths = policy.paths()
        for row in range(4):
            ids, path = rng.integers(2, 300, 3 + 7 * row), next(paths)
            together.states[row].prefill(ids, path, heads[row])
            alone[row].prefill(ids, path, heads[row])
        for _ in range(25):
            rows = [row for row in range(4) if rng.random() < 0.8] or [0, 2]
            most = int(rng.choice([1, 4]))
            tokens = [rng.integers(2, 300, rng.integers(1, most + 1)).tolist() for _ in rows]
            wanted = [int(rng.integers(most == 1, len(ids) + 1)) for ids in tokens]
            deciders = [FixedPath(next(paths), heads[row]) for row in rows]
            logits, _ = together.forward(rows, tokens, deciders, wanted)
            for row, ids, own, count, decider in zip(
                rows, tokens, logits, wanted, deciders, strict=True
            ):
                every, _ = alone[row].forward(np.array(ids), decider, every=True)
                assert len(own) == count
                np.testing.assert_allclose(own, every[len(ids) - count :], atol=2e-4)
                kept = together.states[row].length - int(rng.integers(0, len(ids)))
                together.states[row].truncate(kept)
                alone[row].truncate(kept)


def test_some_rows_share_a_head_after_a_pass_of_several_tokens(tiny_model: Model) -> None:
    """Two rows that verified drafts take one token each, beside a row with another LM head."""
    together = Rows.new(tiny_model.new_sequence().sessions, 3, capacity=32)
    alone = [tiny_model.new_sequence() for _ in range(3)]
    path = ("int8",) * tiny_model.manifest.model.num_layers
    deciders = [FixedPath(path, head) for head in ("full", "full", "int8")]
    for row, decider in enumerate(deciders):
        for state in (together.states[row], alone[row]):
            state.prefill(np.arange(2, 7 + row), path, decider.head)
    for tokens in ([[8, 9, 10, 11], [12, 13, 14, 15]], [[16], [17], [18]]):
        rows = range(len(tokens))
        logits, _ = together.forward(rows, tokens, deciders[: len(tokens)])
        for row, ids, own in zip(rows, tokens, logits, strict=True):
            wanted, _ = alone[row].forward(np.array(ids), deciders[row], every=True)
            np.testing.assert_allclose(own, wanted, atol=2e-4)


@pytest.mark.usefixtures("cheap_rows")
@pytest.mark.parametrize("given", [{}, {"temperature": 0.8, "seed": 5}], ids=str)
def test_drafts_answers_and_a_prompt_share_a_pass(
    given: dict[str, Any], tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call of each layer's graph for a prompt's part, drafted rows and a lone one."""
    prompts = ["the keeper of the lighthouse", "in the night", "the ships"]
    chosen = options(policy="full", max_new_tokens=120, **given)
    wanted = [tiny_model.generate(prompt, options=chosen, speculate=False) for prompt in prompts]
    told: list[list[Any]] = [[] for _ in prompts]
    chosen_each = [chosen, replace(chosen, speculate=False)]
    requests = [
        tiny_model.request(prompt, pieces.append, own)
        for prompt, pieces, own in zip(prompts, told, [*chosen_each, chosen], strict=True)
    ]
    ids = requests[0].ids
    alone = tiny_model.generate_step(ids, options=chosen, speculate=False)
    requests[0].expected = [step.token for step in alone]
    scheduler, passes = tiny_model.new_scheduler(3), []
    forward, run_layer = Rows.forward, SequenceState.run
    calls_of_a_layer = 0

    def counted(state: SequenceState, layer: int, *rest: Any) -> None:
        nonlocal calls_of_a_layer
        calls_of_a_layer += layer == 0
        run_layer(state, layer, *rest)

    def noted(rows: Rows, numbers: Any, tokens: Any, *rest: Any) -> Any:
        before = calls_of_a_layer
        found = forward(rows, numbers, tokens, *rest)
        passes.append(([len(ids) for ids in tokens], calls_of_a_layer - before))
        return found

    monkeypatch.setattr(SequenceState, "run", counted)
    monkeypatch.setattr(Rows, "forward", noted)
    for request in requests[:2]:
        scheduler.submit(request)
    while not passes or passes[-1][0][0] == 1:
        scheduler.step()
    del passes[:]
    scheduler.submit(requests[2])
    scheduler.step()
    (sizes, calls_made), *_ = passes
    assert len(sizes) == 3 and calls_made == 1
    assert sizes[0] > 1 and sizes[1] == 1 and sizes[2] > 1
    while scheduler.step():
        pass
    assert ["".join(chunk.text for chunk in pieces) for pieces in told] == wanted
    assert sum(chunk.draft.accepted for chunk in told[0] if chunk.draft) > 10
    assert not any(chunk.draft for chunk in told[1])
    assert all(made == 1 for _, made in passes)


@pytest.mark.usefixtures("cheap_rows")
def test_each_answer_has_no_more_drafts_in_a_pass_than_it_asks_for(tiny_model: Model) -> None:
    chosen = options(policy="full", max_new_tokens=60)
    own = tiny_model.generate("night", options=chosen, speculate=False)
    batch, told = tiny_model.new_scheduler(2), [list[Any](), list[Any]()]
    for most, pieces in zip((1, None), told, strict=True):
        asked = replace(chosen, expected=own, speculate=most)
        batch.submit(tiny_model.request("night", pieces.append, asked))
    while batch.step():
        pass
    assert ["".join(chunk.text for chunk in pieces) for pieces in told] == [own, own]
    most = [max(chunk.draft.tokens for chunk in pieces if chunk.draft) for pieces in told]
    assert most[0] == 1 < most[1]


@settings(max_examples=300)
@given(
    st.dictionaries(st.integers(0, 11), st.sampled_from(["int8", "int4", "skip"]), min_size=1),
    st.booleans(),
)
def test_the_last_call_of_every_row_is_its_own_action(actions: dict[int, str], again: bool) -> None:
    rows = tuple(sorted(actions))
    found: dict[int, str] = {}
    ranges = calls(rows, tuple(actions[row] for row in rows), again)
    for start, stop, action in ranges:
        assert start in actions and stop - 1 in actions
        found.update(dict.fromkeys(range(start, stop), action))
    assert {row: found[row] for row in rows} == actions
    assert all(stop - start == 1 for start, stop, action in ranges if action == "skip")
    if set(actions.values()) in ({"int8"}, {"int4"}):
        assert len(ranges) == 1
    if not again:
        ran = [row for start, stop, _ in ranges for row in range(start, stop) if row in actions]
        assert sorted(ran) == [*rows]


def test_a_row_goes_on_from_what_it_holds_of_a_prompt(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, ran = tiny_model.new_scheduler(2), []
    prefill = SequenceState.prefill

    def watched(state: SequenceState, ids: np.ndarray, *rest: Any) -> Any:
        ran.append(len(ids))
        return prefill(state, ids, *rest)

    monkeypatch.setattr(SequenceState, "prefill", watched)
    counts = "the keeper of the lighthouse counts " * 8  # more than the answer
    run(tiny_model, batch, "in the night", counts)
    longer = counts + "the ships"
    (again,) = run(tiny_model, batch, longer)
    before, after = (tiny_model.text.encode(text) for text in (counts, longer))
    assert ran[-1] == len(after) - common_length(before, after)
    wanted = tiny_model.generate(longer, options=options())
    assert "".join(chunk.text for chunk in again if isinstance(chunk, Chunk)) == wanted


def test_a_prompt_takes_what_a_running_answer_holds_of_it(tiny_model: Model) -> None:
    prompt = "the ships that pass in the night, " * 6
    batch = tiny_model.new_scheduler(2)
    (alone,) = run(tiny_model, tiny_model.new_scheduler(2), prompt + "again", policy="int8")
    told: list[list[Chunk | Exception]] = [[], []]
    batch.submit(tiny_model.request(prompt, told[0].append, options(policy="int8")))
    for _ in range(3):
        batch.step()
    second = tiny_model.request(prompt + "again", told[1].append, options(policy="int8"))
    batch.submit(second)
    batch.step()
    assert len(second.ids) - 8 < batch.reused < len(second.ids)
    while batch.step():
        pass
    assert [piece.token for piece in told[1]] == [piece.token for piece in alone]
    assert len(told[0]) == 40


def test_neither_short_nor_long_prompts_wait_for_all_of_the_others(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dash_onnx.runtime.scheduler.PREFILL_CHUNK", 8)
    batch, asked = tiny_model.new_scheduler(2), options(max_new_tokens=1, policy="int8")
    long, short = list[Chunk | Exception](), list[Chunk | Exception]()
    batch.submit(tiny_model.request(np.arange(2, 202), long.append, asked))
    batch.step()
    for number in range(60):  # each answer frees its slot for the next
        batch.submit(tiny_model.request(np.array([300 + number]), short.append, asked))
    while not long:
        batch.step()
    assert 10 < len(short) < 40  # of 25 parts, one in two steps
    while batch.step():
        pass
    assert len(short) == 60 and not any(isinstance(piece, Exception) for piece in long + short)


def test_a_batch_of_many_rows_keeps_some_of_its_parts(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are used again in other passes, and made again where they are not kept."""
    monkeypatch.setattr("dash_onnx.runtime.rows._MOST_PARTS", 2)
    rows, found = Rows.new(tiny_model._sessions, 5), []
    for actions in (("int8",) * 5, ("int8", "int4") * 2 + ("int4",), ("int4", "int4", "int8") * 2):
        paths = [FixedPath((action,) * 4, "int8") for action in actions[:5]]
        found.append(rows.forward(range(5), [[7]] * 5, paths)[0][2].copy())
        assert len(rows._parts) <= 2
    alone = Rows.new(tiny_model._sessions, 1)
    for action, logits in zip(("int8", "int8", "int8"), found, strict=True):
        wanted = alone.forward([0], [[7]], [FixedPath((action,) * 4, "int8")])[0][0]
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_prompt_takes_nothing_that_another_budget_wrote(scored: Model) -> None:
    batch, told = scored.new_scheduler(2), list[Chunk | Exception]()
    first = scored.request("the ships that pass, " * 8, told.append, options(budget=0.9))
    batch.submit(first)
    while len(told) < 4:
        batch.step()
    first.current.set_budget(0.5)
    while len(told) < 38:
        batch.step()
    answer = [piece.token for piece in told if isinstance(piece, Chunk)]
    prompt = np.append(first.ids, answer)
    later = list[Chunk | Exception]()
    batch.submit(scored.request(prompt, later.append, options(budget=0.9)))
    batch.step()
    assert batch.reused == len(first.ids)


def test_an_error_before_the_first_token_is_raised(
    scored: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room for the prompt")

    monkeypatch.setattr(SequenceState, "reserve", fail)
    for generate in (
        lambda: scored.generate("the keeper"),
        lambda: next(scored.stream("the keeper")),
        lambda: next(scored.generate_step([3, 4, 5])),
        lambda: scored.batch(["the keeper", "night"]),
    ):
        with pytest.raises(MemoryError, match="no room"):
            generate()


def test_a_cancelled_request_leaves_and_the_others_go_on(tiny_model: Model) -> None:
    batch = tiny_model.new_scheduler(2)
    told: list[Chunk | Exception] = []
    others: list[Chunk | Exception] = []
    requests: list[Request] = []

    def stop(piece: Chunk | Exception) -> None:
        told.append(piece)
        if len(told) == 5:
            requests[0].cancelled.set()

    requests.append(tiny_model.request("the keeper", stop, options()))
    batch.submit(requests[0])
    batch.submit(tiny_model.request("in the night", others.append, options()))
    waiting = tiny_model.request("never", told.append, options())
    waiting.cancelled.set()
    batch.submit(waiting)
    while batch.step():
        pass
    assert len(told) == 5
    assert "".join(c.text for c in others if isinstance(c, Chunk)) == tiny_model.generate(
        "in the night", options=options()
    )


@pytest.mark.parametrize("policy", ["int8", "random:3", "dash"])
def test_answers_move_into_the_rows_of_those_that_ended(
    policy: str, scored: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass runs over all rows between its first and its last one."""
    given: dict[str, Any] = {"policy": policy, **({"budget": 0.5} if policy == "dash" else {})}
    lengths = [60, 200, 60, 70, 210, 60, 220, 230]
    each = [options(**given, max_new_tokens=length) for length in lengths]
    prompts = [f"{n} counts the ships" for n in range(len(lengths))]
    wanted = [
        scored.generate(prompt, options=one) for prompt, one in zip(prompts, each, strict=True)
    ]
    batch, forward, exchange = scored.new_scheduler(len(lengths)), Rows.forward, Slot.exchange
    spans, moves = list[tuple[int, int]](), list[int]()

    def noted(rows: Rows, numbers: Any, *rest: Any) -> Any:
        spans.append((len(numbers), numbers[-1] - numbers[0] + 1))
        return forward(rows, numbers, *rest)

    def moved(slot: Slot, other: Slot) -> None:
        moves.append(slot.number)
        exchange(slot, other)

    monkeypatch.setattr(Rows, "forward", noted)
    monkeypatch.setattr(Slot, "exchange", moved)
    told: list[list[Chunk]] = [[] for _ in lengths]
    for prompt, one, pieces in zip(prompts, each, told, strict=True):
        batch.submit(scored.request(prompt, pieces.append, one))
    while batch.step():
        pass
    assert ["".join(piece.text for piece in pieces) for pieces in told] == wanted
    assert moves
    assert [span for rows, span in spans if rows == 4][-10:] == [4] * 10
    again, held = list[Chunk](), batch.reused
    batch.submit(scored.request(prompts[5], again.append, each[5]))
    while batch.step():
        pass
    assert "".join(piece.text for piece in again) == wanted[5]
    assert batch.reused - held == len(scored.text.encode(prompts[5])) - 1  # wherever it lies now


def test_an_answer_that_cannot_move_ends_alone_and_leaves_nothing(
    scored: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, prompts = [60, 8, 60], ["the keeper", "counts", "the ships"]
    each = [options(policy="int8", max_new_tokens=length) for length in lengths]
    wanted = [scored.generate(text, options=one) for text, one in zip(prompts, each, strict=True)]
    batch, copies, told = scored.new_scheduler(3), iter(range(2)), list[list[Any]]()
    write = kv.exchange

    def full(*given: Any) -> None:
        if next(copies, None) is None:
            raise MemoryError
        write(*given)

    monkeypatch.setattr(kv, "exchange", full)
    for prompt, one in zip(prompts, each, strict=True):
        told.append([])
        batch.submit(scored.request(prompt, told[-1].append, one))
    while batch.step():
        pass
    assert isinstance(told[2][-1], MemoryError)
    monkeypatch.setattr(kv, "exchange", write)
    told[2].clear()
    batch.submit(scored.request(prompts[2], told[2].append, each[2]))
    while batch.step():
        pass
    assert ["".join(piece.text for piece in pieces) for pieces in told] == wanted


def test_an_answer_moves_into_a_row_of_a_cache_that_has_just_grown(scored: Model) -> None:
    lengths = [8, 8, 90, 90]
    prompts = ["the keeper", "counts", "the ships", "in the night"]
    each = [options(policy="int8", max_new_tokens=n, speculate=False) for n in lengths]
    wanted = [
        scored.generate(prompt, options=one) for prompt, one in zip(prompts, each, strict=True)
    ]
    batch = Scheduler(Rows.new(scored._sessions, len(lengths), capacity=64))
    told: list[list[Chunk]] = [[] for _ in lengths]
    for prompt, one, pieces in zip(prompts, each, told, strict=True):
        batch.submit(scored.request(prompt, pieces.append, one))
    while not (told[1] and told[1][-1].finish_reason):
        batch.step()
    assert max(slot.state.kv.capacity for slot in batch._slots) == 64
    late, longer = list[Chunk](), "a lighthouse " * 60
    before = [weakref.ref(buffer.array) for buffer in batch._rows._whole.kv.keys.values()]
    assert all(one() is not None for one in before)
    batch.submit(scored.request(longer, late.append, each[0]))
    batch.step()
    assert all(slot.state.kv.capacity > 64 for slot in batch._slots)
    gc.collect()
    assert not any(one() is not None for one in before)  # nobody holds the smaller cache
    while batch.step():
        pass
    assert ["".join(piece.text for piece in pieces) for pieces in told] == wanted
    assert "".join(piece.text for piece in late) == scored.generate(longer, options=each[0])


def test_a_conversation_keeps_its_slot_while_others_begin_alike(tiny_model: Model) -> None:
    """As with one chat template, or one system message."""
    batch, reused = tiny_model.new_scheduler(3), []
    talks = [list(range(20, 26)) + list(range(first, first + 20)) for first in (40, 80, 120)]
    for _ in range(2):
        for talk in talks:
            before, told = batch.reused, list[Any]()
            asked = options(max_new_tokens=4, policy="int8")
            batch.submit(tiny_model.request(talk, told.append, asked))
            while batch.step():
                pass
            reused.append(batch.reused - before)
            talk += [piece.token for piece in told] + [7]
    assert reused[3:] == [29, 29, 29]


def test_a_conversation_keeps_its_slot_where_its_thoughts_are_left_out(tiny_model: Model) -> None:
    batch, used = tiny_model.new_scheduler(3), list[int]()
    talk = list(range(20, 40))
    for question in (60, 61, 62):
        request = tiny_model.request(talk, lambda _: None, options(max_new_tokens=60))
        batch.submit(request)
        batch.step()
        used += [slot.number for slot in batch._slots if slot.request is request]
        while batch.step():
            pass
        talk += [question] * 3  # the answer is too short to matter
    assert used == [used[0]] * 3


@pytest.mark.parametrize("seed", [5, 8, 11])
def test_answers_that_come_and_go_are_what_they_are_alone(scored: Model, seed: int) -> None:
    """Of any length and policy, some cancelled; the cache grows and rows trade places."""
    rng = np.random.default_rng(seed)
    batch = Scheduler(Rows.new(scored._sessions, 6, capacity=32))
    policies = ("int8", "int4", "random:3", "static:full,int8,skip,int4")
    wanted, told, requests = list[str](), list[list[Chunk]](), list[Request]()
    while len(requests) < 24 or batch.step():
        if len(requests) < 24 and rng.random() < 0.4:
            words = rng.choice(["the keeper ", "ships ", "a lighthouse ", "in the night "], 40)
            prompt = "".join(words[: rng.integers(1, 40)])
            given = options(
                policy=str(rng.choice(policies)),
                max_new_tokens=int(rng.integers(1, 60)),
                temperature=float(rng.choice([0.0, 1.0])),
                seed=len(requests),
            )
            wanted.append(scored.generate(prompt, options=given))
            told.append([])
            requests.append(scored.request(prompt, told[-1].append, given))
            batch.submit(requests[-1])
        elif requests and rng.random() < 0.02:
            requests[rng.integers(len(requests))].cancelled.set()
        batch.step()
    for request, text, pieces in zip(requests, wanted, told, strict=True):
        whole = "".join(piece.text for piece in pieces)
        if request.cancelled.is_set():
            assert text.startswith(whole)
        else:
            assert whole == text


@pytest.mark.parametrize("first", [1, 3])
def test_what_goes_wrong_in_one_generation_ends_no_other(first: int, tiny_model: Model) -> None:
    batch, wrong, right = tiny_model.new_scheduler(2), [], []

    def fails(piece: Chunk | Exception) -> None:
        wrong.append(piece)
        if len(wrong) >= first:  # it takes no error either
            raise ConnectionError("the client went away")

    batch.submit(tiny_model.request("the keeper", fails, options()))
    batch.submit(tiny_model.request("in the night", right.append, options()))
    while batch.step():
        pass
    assert isinstance(wrong[-1], ConnectionError) and len(wrong) == first + 1
    assert len(right) == 40
    assert len(run(tiny_model, batch, "the keeper")[0]) == 40  # its row serves the next one


def test_a_pass_that_fails_ends_no_row_that_runs_alone(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one row's policy needs a graph for which there is no memory."""
    forward = Rows.forward

    def failing(together: Rows, rows: Any, *rest: Any) -> Any:
        found = forward(together, rows, *rest)  # it fails late, with all positions moved
        if 0 in rows and len(together.states) > 1 and together.states[0].length > 8:
            raise MemoryError
        return found

    monkeypatch.setattr(Rows, "forward", failing)
    ended, *others = run(tiny_model, tiny_model.new_scheduler(3), *PROMPTS[:3])
    assert isinstance(ended[-1], MemoryError)
    for prompt, pieces in zip(PROMPTS[1:3], others, strict=True):
        wanted = tiny_model.generate(prompt, options=options())
        assert "".join(c.text for c in pieces if isinstance(c, Chunk)) == wanted


def test_an_answer_serves_only_requests_of_its_quality(scored: Model) -> None:
    """Else a text would depend on who asked before."""
    batch, first = scored.new_scheduler(1), scored.text.encode(PROMPTS[1])

    def turn(prompt: np.ndarray, **given: Any) -> tuple[np.ndarray, int]:
        """The conversation with its answer, and what was held of it before."""
        before, pieces = batch.reused, []
        batch.submit(scored.request(prompt, pieces.append, options(max_new_tokens=20, **given)))
        while batch.step():
            pass
        return np.append(prompt, [piece.token for piece in pieces]), batch.reused - before

    talk, _ = turn(first, budget=0.25)
    dear, held = turn(talk, budget=0.9)
    alone = scored.generate_step(talk, options=options(max_new_tokens=20, budget=0.9))
    assert dear[len(talk) :].tolist() == [step.token for step in alone]
    assert held == 0
    longer, held = turn(dear, budget=0.9)  # its own next turn: all but the last token
    assert held == len(dear) - 1
    for policy in ("int4", "static:full,int4,skip,int8"):
        talk, held = turn(longer, policy=policy)
        assert held == 0
        assert turn(talk, policy=policy)[1] == len(talk) - 1


def test_what_another_budget_wrote_serves_nobody(scored: Model) -> None:
    batch, first, tokens = scored.new_scheduler(1), scored.text.encode(PROMPTS[1]), []

    def deliver(piece: Chunk | Exception) -> None:
        assert isinstance(piece, Chunk)
        tokens.append(piece.token)
        if len(tokens) == 5:
            request.current.set_budget(0.25)

    request = scored.request(first, deliver, options(budget=0.9))
    batch.submit(request)
    while batch.step():
        pass
    again = np.append(first, tokens)
    batch.submit(scored.request(again, lambda piece: None, options(budget=0.9)))
    while batch.step():
        pass
    assert batch.reused == len(first)


def test_what_another_budget_wrote_is_not_saved(scored: Model) -> None:
    store = PrefixStore(scored.manifest, 1 << 24)
    batch, told = scored.new_scheduler(2, store), list[Any]()
    request = scored.request("the ships that pass, " * 4, told.append, options(budget=0.9))
    batch.submit(request)
    while len(told) < 4:
        batch.step()
    request.current.set_budget(0.25)
    while len(told) < 38:
        batch.step()
    batch.save()  # as a server does that ends while an answer runs
    talk = np.append(request.ids, [piece.token for piece in told])
    held = [len(saved.tokens) for saved in store._entries.values()]
    assert all(length <= len(request.ids) + 4 for length in held)
    again = scored.new_scheduler(2, store)
    again.submit(scored.request(talk, told.append, options(budget=0.9)))
    while again.step():
        pass
    assert again.reused <= len(request.ids) + 4


@pytest.mark.usefixtures("cheap_rows")
def test_drafts_leave_room_for_a_row_between_them_that_is_nearly_full(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes run over its row, too, beyond its last token."""
    limit, rng = tiny_model.manifest.model.max_length, np.random.default_rng(1)
    prompts: list[Any] = [tiny_model.text.encode(prompt) for prompt in PROMPTS[:3]]
    prompts += [rng.integers(2, 300, limit - 6), *map(tiny_model.text.encode, PROMPTS[4:6])]
    counts = [150, 4, 180, 3, 30, 60]
    given = [options(policy="full", max_new_tokens=count) for count in counts]
    pairs = [*zip(prompts, given, strict=True)]
    alone = [
        [step.token for step in tiny_model.generate_step(ids, options=one, speculate=False)]
        for ids, one in pairs
    ]
    forward, refused = Rows.forward, list[Exception]()

    def watched(*arguments: Any) -> Any:
        try:
            return forward(*arguments)
        except Exception as error:
            refused.append(error)
            raise

    monkeypatch.setattr(Rows, "forward", watched)
    batch, told = tiny_model.new_scheduler(3), [list[Any]() for _ in prompts]
    for (ids, one), pieces, text in zip(pairs, told, alone, strict=True):
        request = tiny_model.request(ids, pieces.append, one)
        request.expected = text
        batch.submit(request)
    while batch.step():
        pass
    assert [[piece.token for piece in pieces] for pieces in told] == alone
    assert refused == []
    assert any(piece.draft for pieces in told for piece in pieces)


@pytest.mark.parametrize("policy", ["random:3", "int8"])
def test_a_pass_that_fails_is_repeated_on_the_same_paths(
    policy: str, scored: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, joined, passes = options(policy=policy), Rows._layers, [0]
    alone = [scored.generate(prompt, options=given) for prompt in PROMPTS[:3]]

    def failing(*arguments: Any) -> None:
        joined(*arguments)
        passes[0] += 1
        if passes[0] == 10:
            raise MemoryError

    monkeypatch.setattr(Rows, "_layers", failing)
    assert scored.batch(PROMPTS[:3], options=given, parallel=3) == alone
    assert passes[0] > 10


def test_a_full_context_ends_a_text_and_its_row_goes_on(tiny_model: Model) -> None:
    batch = tiny_model.new_scheduler(3)
    for _ in range(2):
        told = run(tiny_model, batch, *PROMPTS[:3], max_new_tokens=1000)
        for prompt, pieces in zip(PROMPTS, told, strict=False):
            wanted = tiny_model.generate(prompt, options=options(max_new_tokens=1000))
            last = pieces[-1]
            assert isinstance(last, Chunk)
            assert last.finish_reason == wanted.finish_reason == "context"
            assert "".join(c.text for c in pieces if isinstance(c, Chunk)) == wanted


def test_a_budget_may_change_between_two_tokens(scored: Model) -> None:
    batch, paths = scored.new_scheduler(2), []

    def deliver(piece: Chunk | Exception) -> None:
        assert isinstance(piece, Chunk)
        paths.append(piece.path)
        if len(paths) == 20:
            request.current.set_budget(0.25)

    request = scored.request(PROMPTS[0], deliver, options(budget=0.99, max_new_tokens=200))
    batch.submit(request)
    while batch.step():
        pass
    dear = [sum(action in ("full", "int8") for action in path) for path in paths]
    assert np.mean(dear[60:]) < np.mean(dear[1:20])


def test_a_budget_that_cannot_be_followed_ends_its_answer_alone(scored: Model) -> None:
    batch, told, others = scored.new_scheduler(2), list[Chunk | Exception](), list[Any]()
    failing = scored.request(PROMPTS[0], told.append, options(policy="dash", budget=0.9))
    batch.submit(failing)
    batch.submit(scored.request(PROMPTS[1], others.append, options(policy="int8")))
    while len(told) < 4:
        batch.step()
    (slot,) = (slot for slot in batch._slots if slot.request is failing)
    assert slot.going is not None

    def follow() -> None:
        raise DeviceError("no memory for the scorer")

    slot.going.follow = follow  # type: ignore[method-assign]
    while batch.step():
        pass
    assert isinstance(told[-1], DeviceError) and others[-1].finish_reason == "length"


def test_what_an_app_gives_a_batch_may_fail_and_says_so(tiny_model: Model) -> None:
    """Neither the error of a logits processor nor that of what takes an answer is swallowed."""
    calls = iter(range(2))

    def processor(_: object, logits: np.ndarray) -> np.ndarray:
        if next(calls, None) is None:
            raise ZeroDivisionError("the app's own")
        return logits

    with pytest.raises(ZeroDivisionError, match="the app's own"):
        options = GenerationOptions(max_new_tokens=8, logits_processor=processor)
        tiny_model.batch(["ab", "cd"], options=options)

    def on_done(*_: object) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        tiny_model.batch(["ab"], options=GenerationOptions(max_new_tokens=2), on_done=on_done)
    (answer,) = tiny_model.batch(["ab"], options=GenerationOptions(max_new_tokens=2))
    assert answer.generated_tokens == 2


def test_what_no_batch_can_do_is_refused_at_once(tiny_model: Model) -> None:
    with pytest.raises(PolicyError, match="slots=0"):
        tiny_model.new_scheduler(0)
    with pytest.raises(PolicyError, match=r"parallel=300 must be an integer in 1\.\.256"):
        tiny_model.batch(["the keeper"], parallel=300)
    with pytest.raises(ContextLengthError):
        tiny_model.batch(["the keeper", "a b c " * 300])
    with pytest.raises(PolicyError, match="no message"):
        tiny_model.batch([[]])
    assert tiny_model.batch([]) == []


@pytest.mark.parametrize("nth", [1, 6, 13])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_interrupted_step_ends_its_requests_and_leaves_nothing_half_written(
    tiny_model: Model, rows: int, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"policy": "random:3", "max_new_tokens": 8, "ignore_eos": True}
    prompts, calls = ["the keeper", "ships"][:rows], list[int]()
    alone = [tiny_model.generate(prompt, **given) for prompt in prompts]
    bound = Pass.run

    def interrupted(self: Pass, start: int, stop: int, form: Any) -> None:
        calls.append(start)
        if len(calls) == nth:
            bound(self, start, start + 1, form)
            raise KeyboardInterrupt
        bound(self, start, stop, form)

    batch = tiny_model.new_scheduler(rows)
    told: list[Chunk | Exception] = []
    for prompt in prompts:
        batch.submit(tiny_model.request(prompt, told.append, options(**given)))
    monkeypatch.setattr(Pass, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        while batch.step():
            pass
    assert "interrupted" in str(told[-1])
    again = run(tiny_model, batch, *prompts, **given)
    texts = ["".join(piece.text for piece in pieces) for pieces in again]  # type: ignore[union-attr]
    assert texts == alone
