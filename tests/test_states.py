"""Layers without K/V: sequences that go back, share passes and move equal fresh runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import CASES, LAYERS, Pair, random_ids, save_random, write_text

import dash_onnx
from dash_onnx.core.actions import ActionPath
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.exporters.fused import FuseOptions, fuse
from dash_onnx.runtime.buffers import Buffer
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.drafts import DraftStats
from dash_onnx.runtime.generate import Request
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.prefix import PrefixStore, Saved, copy_prefix
from dash_onnx.runtime.results import GeneratedToken
from dash_onnx.runtime.rows import Rows
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.states import LONG, POINTS

FAMILIES = ["lfm2", "qwen3_5"]
ROWS = 3
SEEDS = int(os.environ.get("STATE_SEEDS", "20"))
PATHS: list[ActionPath] = [
    ("full",) * LAYERS,
    ("int8", "int4", "int8"),
    ("int8", "skip", "skip"),
    ("int4", "int4", "skip"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @cache
    def build(family: str) -> Model:
        return Pair.build(CASES[family], tmp_path_factory.mktemp("states")).model

    return build


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, built: Callable[[str], Model]) -> Model:
    return built(request.param)


@pytest.fixture(scope="module", params=[*FAMILIES, "lfm2_moe", "gemma4"])
def any_model(request: pytest.FixtureRequest, built: Callable[[str], Model]) -> Model:
    """Also with experts behind such layers, or with layers that share K/V and no states."""
    return built(request.param)


def assert_equal(got: np.ndarray, wanted: np.ndarray) -> None:
    """But for what passes of other sizes round otherwise."""
    assert np.linalg.norm(got - wanted) <= 2e-5 * np.linalg.norm(wanted)


class Twin:
    """A row of a batch, or a sequence alone, and what a fresh one would run to equal it."""

    def __init__(self, state: SequenceState):
        self.state = state
        self.tokens: list[int] = []
        self.paths: list[ActionPath] = []

    def ran(self, tokens: list[int], path: ActionPath) -> None:
        self.tokens += tokens
        self.paths += [path] * len(tokens)

    def back(self, length: int) -> None:
        held = self.state.truncate(length)
        assert held == self.state.length <= length
        del self.tokens[held:], self.paths[held:]

    def check(self, model: Model) -> None:
        """The states and K/V, not only the logits."""
        assert self.state.length == len(self.tokens)
        fresh = model.new_sequence()
        for token, path in zip(self.tokens, self.paths, strict=True):
            fresh.forward(token, FixedPath(path, "full"))
        self.state.kv.begin(0)  # what the last passes made is the past now
        fresh.kv.begin(0)
        held, states = self.state.kv.states, fresh.kv.states
        recurrent = model.manifest.recurrence is not None
        assert (held is not None) == (states is not None) == recurrent
        if held is not None and states is not None:
            assert states.past
            for name, wanted in states.past.items():
                assert_equal(held.past[name].array, wanted.array)
        assert {*fresh.kv.keys} == {*model.manifest.attending}
        for ours, theirs in (
            (self.state.kv.keys, fresh.kv.keys),
            (self.state.kv.values, fresh.kv.values),
        ):
            for layer, buffer in theirs.items():
                valid = slice(None), slice(None), slice(len(self.tokens))
                assert_equal(ours[layer].array[valid], buffer.array[valid])


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, SEEDS))]
)
def test_any_sequence_of_passes_and_returns_equals_a_fresh_run(any_model: Model, seed: int) -> None:
    rng, model = np.random.default_rng(seed), any_model
    batch = Rows.new(model._sessions, ROWS)
    twins = [Twin(state) for state in [*batch.states, model.new_sequence()]]
    saved: list[tuple[Saved, list[ActionPath]]] = []

    def ids(count: int) -> list[int]:
        return [int(token) for token in rng.integers(2, 380, count)]

    def path() -> ActionPath:
        return PATHS[rng.integers(len(PATHS))]

    def prompt(twin: Twin) -> None:
        tokens, chosen = ids(int(rng.integers(1, 60))), path()
        twin.state.prefill(np.array(tokens), chosen, "full", chunk=int(rng.integers(5, 40)))
        twin.ran(tokens, chosen)

    def draft(twin: Twin) -> None:
        """As `Generation.step` does: of some drafts, some are accepted."""
        tokens, chosen = ids(int(rng.integers(2, 9))), path()
        decider, before = FixedPath(chosen, "full"), twin.state.length
        twin.state.forward(np.array(tokens), decider, every=True)
        right = int(rng.integers(1, len(tokens) + 1))
        held = twin.state.truncate(before + right)
        if held < before + right:
            twin.state.layers(np.array(tokens[held - before : right]), decider)
        twin.ran(tokens[:right], chosen)

    def decode(_: Twin) -> None:
        begun = [row for row in range(ROWS) if twins[row].tokens]  # a prompt runs alone
        if not begun:
            return
        count = int(rng.integers(1, len(begun) + 1))
        rows = sorted(rng.choice(begun, count, replace=False).tolist())
        for _ in range(int(rng.integers(1, 6))):
            tokens, paths = ids(len(rows)), [path() for _ in rows]
            batch.forward(
                rows, [[token] for token in tokens], [FixedPath(one, "full") for one in paths]
            )
            for row, token, one in zip(rows, tokens, paths, strict=True):
                twins[row].ran([token], one)

    def fail(twin: Twin) -> None:
        """A pass that ends in the middle of the layers."""
        length = twin.state.length
        twin.state.advance(3)
        twin.state.embed(np.array(ids(3)))
        twin.state.run(0, "int8")
        assert twin.state.truncate(length) == length

    def back(twin: Twin) -> None:
        twin.back(int(rng.integers(0, twin.state.length + 1)))

    def save(twin: Twin) -> None:
        if twin.tokens:
            saved.append((Saved.of(twin.state, twin.tokens), [*twin.paths]))

    def restore(twin: Twin) -> None:
        if saved:
            kept, paths = saved[rng.integers(len(saved))]
            length = kept.place(int(rng.integers(0, len(kept.tokens) + 1)))
            kept.restore(twin.state, length)
            twin.tokens, twin.paths = kept.tokens[:length].tolist(), paths[:length]

    def share(twin: Twin) -> None:
        other = twins[rng.integers(len(twins))]
        if other is not twin:
            length = other.state.kv.place(int(rng.integers(0, other.state.length + 1)))
            copy_prefix(other.state, twin.state, length)
            twin.tokens, twin.paths = other.tokens[:length], other.paths[:length]

    def trade(_: Twin) -> None:
        one, other = (twins[row] for row in rng.choice(ROWS, 2, replace=False))
        one.state.kv.exchange(other.state.kv)
        one.tokens, other.tokens = other.tokens, one.tokens
        one.paths, other.paths = other.paths, one.paths

    steps: list[Callable[[Twin], None]] = [
        *(prompt, draft, decode, fail, back, save, restore, share, trade)
    ]
    for _ in range(25):
        twin = twins[rng.integers(len(twins))]
        if twin.state.length > 150:
            twin.back(20)
        steps[rng.integers(len(steps))](twin)
    for twin in twins:
        twin.check(model)


def test_a_sequence_goes_back_to_where_a_prompt_begins_and_to_its_last_token(model: Model) -> None:
    sequence, path = model.new_sequence(), ("full",) * LAYERS
    first, second = LONG + 3, 2 * LONG
    sequence.prefill(random_ids(first), path, "full")
    for token in random_ids(9).tolist():
        sequence.forward(token, FixedPath(path, "full"))
    sequence.prefill(random_ids(second), path, "full")
    sequence.forward(5, FixedPath(path, "full"))
    begun, end = first + 9, first + 9 + second
    places = {length: sequence.kv.place(length) for length in (first - 2, first + 8, begun, end)}
    assert places == {first - 2: 0, first + 8: first - 1, begun: begun, end: end}
    assert sequence.truncate(end - 1) == end - 1  # the same prompt once more
    assert sequence.truncate(end - 2) == begun


def test_few_points_are_kept_and_the_last_is_one_of_them(model: Model) -> None:
    sequence, path = model.new_sequence(), ("full",) * LAYERS
    length = 9 * (LONG + 1)
    sequence.prefill(random_ids(length), path, "full", chunk=LONG + 1)
    states = sequence.kv.states
    assert states is not None and len(states.points) == POINTS
    assert max(states.points) == length - 1 and min(states.points) > LONG + 1


def test_a_conversation_goes_on_from_what_its_cache_holds(model: Model) -> None:
    cache, ids = model.new_cache(), random_ids(40)

    def tokens(prompt: np.ndarray, **options: object) -> list[int]:
        return [step.token for step in model.generate_step(prompt, max_new_tokens=12, **options)]

    answer = tokens(ids, cache=cache)
    assert tokens(ids, cache=cache) == answer == tokens(ids)  # once more: regenerated
    longer = np.array([*ids, *answer, *random_ids(7)])
    assert tokens(longer, cache=cache) == tokens(longer)
    changed = np.array([*ids[:30], *random_ids(20)])
    assert tokens(changed, cache=cache) == tokens(changed)


def test_a_saved_conversation_is_the_same(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    cache, ids = model.new_cache(), random_ids(40)
    list(model.generate_step(ids, max_new_tokens=5, cache=cache))
    cache.save(tmp_path / "session")
    again = model.new_cache()
    again.load(tmp_path / "session")
    assert len(again) == len(cache)
    longer = np.array([*again.tokens, *random_ids(5)])
    found, wanted = (
        [step.token for step in model.generate_step(longer, max_new_tokens=8, cache=one)]
        for one in (again, None)
    )
    assert found == wanted


def drafting(model: Model, ids: np.ndarray) -> tuple[Request[GeneratedToken], list[int]]:
    """A request whose drafts are right but for every sixth token, and the tokens of its answer."""
    options = GenerationOptions(policy="int8", max_new_tokens=24, ignore_eos=True)
    usual = [step.token for step in model.generate_step(ids, options=options, speculate=False)]
    learned = DraftStats(None, ("int8",) * LAYERS, "int8", frozenset())
    request = model._requests.make(ids, options, lambda token: token, lambda piece: None)
    request.stats_of = lambda _: learned
    request.expected = [3 if n % 6 == 5 else token for n, token in enumerate(usual)]
    return request, usual


def test_drafts_give_the_same_text_and_leave_the_same_states(model: Model) -> None:
    ids, cache = random_ids(30), model.new_cache()
    request, usual = drafting(model, ids)
    drafted = cache.generation(request)
    steps = [*drafted]
    assert [step.token for step in steps] == usual
    outcomes = [step.draft for step in steps if step.draft is not None]
    assert any(0 < draft.accepted for draft in outcomes)
    assert any(draft.accepted < draft.tokens for draft in outcomes)
    longer = np.array([*cache.tokens, *random_ids(5)])
    found, wanted = (
        [step.token for step in model.generate_step(longer, max_new_tokens=8, cache=one)]
        for one in (cache, None)
    )
    assert found == wanted


def test_an_interrupted_return_to_accepted_drafts_leaves_only_what_ran(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States cannot forget only the rejected tokens: what was accepted runs a second time."""
    ids, cache = random_ids(30), model.new_cache()
    request, usual = drafting(model, ids)
    truncate, run, again = SequenceState.truncate, SequenceState.run, list[int]()

    def truncated(self: SequenceState, length: int) -> int:
        held = truncate(self, length)
        again[:] = range(held, length)
        return held

    def interrupted(self: SequenceState, *given: Any) -> None:
        if len(again) > 1:
            raise KeyboardInterrupt
        run(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(SequenceState, "truncate", truncated)
        patched.setattr(SequenceState, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(cache.generation(request))
    longer = np.array([*ids, *usual])
    found, wanted = (
        [step.token for step in model.generate_step(longer, options=request.options, cache=one)]
        for one in (cache, None)
    )
    assert found == wanted


def test_requests_that_share_passes_get_the_text_of_one_alone(model: Model) -> None:
    batch = Rows.new(model._sessions, 2)
    path, prompts = ("int8",) * LAYERS, [random_ids(30), random_ids(11)]
    wanted = []
    for prompt in prompts:
        sequence, logits = model.new_sequence(), None
        sequence.prefill(prompt, path, "int8")
        for token in random_ids(6).tolist():
            logits, _ = sequence.forward(token, FixedPath(path, "int8"))
        assert logits is not None
        wanted.append(logits.copy())
    for row, prompt in enumerate(prompts):
        batch.states[row].prefill(prompt, path, "int8")
    for token in random_ids(6).tolist():
        logits, _ = batch.forward([0, 1], [[token]] * 2, [FixedPath(path, "int8")] * 2)
    for got, want in zip(logits, wanted, strict=True):
        np.testing.assert_allclose(got[0], want, atol=1e-4)


def test_an_interrupted_copy_of_states_is_no_place_and_made_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, path = random_ids(20), ("int8",) * model.manifest.model.num_layers
    batch = Rows.new(model._sessions, 2, 64)
    batch.states[0].prefill(prompt, path, "int8")
    part, copies = batch.states[0].kv.states, iter(range(1))
    assert part is not None
    one = next(buffer for buffer in part.past.values())
    write = type(one).write

    def interrupted(buffer: Any, *given: Any) -> None:
        if next(copies, None) is None:
            raise KeyboardInterrupt
        write(buffer, *given)

    with monkeypatch.context() as patched:
        patched.setattr(type(one), "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            part.begin(20)
    assert part.start < 0 and part.place(20, 20) == 20
    part.begin(20)
    for name, buffer in part.present.items():
        np.testing.assert_array_equal(part.past[name].array, buffer.array)


@pytest.mark.parametrize("writes", range(8))
@pytest.mark.parametrize("restores", [False, True])
def test_interrupted_while_states_are_copied_back_a_sequence_starts_anew(
    model: Model, monkeypatch: pytest.MonkeyPatch, restores: bool, writes: int
) -> None:
    prompt, path = random_ids(60), ("int8",) * model.manifest.model.num_layers
    state, other = model.new_sequence(), model.new_sequence()
    for one in (state, other):
        one.prefill(prompt[:40], path, "int8")
        one.prefill(prompt[40:], path, "int8")
    counts, write = iter(range(writes)), Buffer.write

    def interrupted(buffer: Buffer, *given: Any) -> None:
        if next(counts, None) is None:
            raise KeyboardInterrupt
        write(buffer, *given)

    kept = Saved.of(other, prompt.tolist())
    with monkeypatch.context() as patched:
        patched.setattr(Buffer, "write", interrupted)
        with suppress(KeyboardInterrupt):
            if restores:
                kept.restore(state, 60)
            else:
                state.truncate(0)
    state.truncate(0)
    found, wanted = (
        one.prefill(prompt, path, "int8").copy() for one in (state, model.new_sequence())
    )
    np.testing.assert_array_equal(found, wanted)


def test_a_row_takes_up_what_another_text_left_and_a_store_kept(
    model: Model, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    first, second = "the keeper counts ships " * 9, "a night of other words " * 7
    prompts = [first, second, first + "again", second, first + "once more"]
    options = GenerationOptions(policy="int8", max_new_tokens=12, ignore_eos=True)
    wanted = [model.generate(text, options=options) for text in prompts]
    for rows in (1, 2):
        store = PrefixStore(model.manifest, 1 << 30, tmp_path / str(rows))
        batch = model.new_scheduler(rows, store)
        told: list[list[str]] = [[] for _ in prompts]
        for text, own in zip(prompts, told, strict=True):
            batch.submit(model.request(text, lambda one, own=own: own.append(one.text), options))
        while batch.step():
            pass
        assert ["".join(own) for own in told] == wanted
        assert batch.reused > 0
        batch.save()
        again = PrefixStore(model.manifest, 1 << 30, tmp_path / str(rows))
        assert len(again) == len(store)
        batch, texts = model.new_scheduler(1, again), list[str]()
        batch.submit(model.request(first, lambda one, to=texts: to.append(one.text), options))
        while batch.step():
            pass
        assert "".join(texts) == wanted[0] and batch.reused >= LONG


def test_one_graph_of_such_layers_is_for_genai_alone(model: Model, tmp_path: Path) -> None:
    bundle = Bundle(model._sessions._bundle.folder)
    with pytest.raises(UnsupportedError, match="node does not support the states of "):
        fuse(bundle, tmp_path / "fused", FuseOptions("node"), overwrite=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skip_without_compensation_keeps_the_same_states(family: str, tmp_path: Path) -> None:
    case, source = CASES[family], tmp_path / "source"
    save_random(source, case)
    options = ExportOptions(variants=("int8",), compensation_rank=0, accuracy_level=0)
    text = (write_text(tmp_path / "text.txt"),)
    export(str(source), tmp_path / "out", replace(options, calibration=text))
    with dash_onnx.load(tmp_path / "out") as bundle:
        ids, path = random_ids(20), ("int8", "int8", "skip")
        together, alone = bundle.new_sequence(), bundle.new_sequence()
        together.prefill(ids, path, "int8")
        for token in ids.tolist():
            alone.forward(token, FixedPath(path, "int8"))
        for sequence in (together, alone):
            sequence.kv.begin(0)
        assert together.kv.states is not None and alone.kv.states is not None
        for name, buffer in together.kv.states.past.items():
            assert_equal(buffer.array, alone.kv.states.past[name].array)


def test_such_layers_are_for_the_cpu_alone(model: Model, tmp_path: Path) -> None:
    source = model._sessions._bundle.folder.parent / "source"
    with pytest.raises(UnsupportedError, match="run only on the CPU"):
        export(str(source), tmp_path / "out", ExportOptions(device="cuda"))


def test_a_bundle_says_what_its_layers_keep(model: Model) -> None:
    manifest = model.manifest
    assert manifest.recurrence is not None and len(manifest.attending) < LAYERS
    states = model.new_sequence().kv.states
    assert states is not None
    assert sum(buffer.array.nbytes for buffer in states.past.values()) == manifest.state_bytes
    assert dash_onnx.load(model._sessions._bundle.folder).manifest == manifest
