"""Drafts: another speed, the same text."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dash_onnx.core.errors import PolicyError
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.drafts import MAX_DRAFT_TOKENS, Draft, DraftStats, best_length
from dash_onnx.runtime.generate import CurrentPolicy, Generation, Request
from dash_onnx.runtime.grammar import Constraint, Grammar, guidance_tokenizer
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.part import Part
from dash_onnx.runtime.results import GeneratedToken
from dash_onnx.runtime.rows import Rows
from dash_onnx.runtime.sampling import Sampling
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import PromptPlan

# Repeats itself, so that the text's own end is found in it.
PROMPT = "the keeper counts the ships, the keeper counts the ships, the keeper counts"


def steps(model: Model, **options: Any) -> list[GeneratedToken]:
    ids = model.text.encode(PROMPT)
    return [*model.generate_step(ids, **{"max_new_tokens": 60, "ignore_eos": True, **options})]


def tokens(model: Model, **options: Any) -> list[int]:
    return [step.token for step in steps(model, **options)]


def expectations(model: Model, **options: Any) -> list[str]:
    """Nothing, what comes, what comes with a part left out, and what does not come."""
    own = model.text.decode(tokens(model, speculate=False, **options))
    return ["", own, own[:20] + own[30:], "no ship passes " * 9]


@pytest.mark.parametrize("policy", ["full", "int8", "static:int8,skip,int4,full"])
def test_greedy_text_is_that_without_drafts(policy: str, tiny_model: Model) -> None:
    alone, drafted = tokens(tiny_model, policy=policy, speculate=False), list[Draft]()
    for expected in expectations(tiny_model, policy=policy):
        found = steps(tiny_model, policy=policy, expected=expected)
        assert [step.token for step in found] == alone
        drafted += [step.draft for step in found if step.draft]
    assert all(0 <= draft.accepted <= draft.tokens <= MAX_DRAFT_TOKENS for draft in drafted)
    assert {draft.source for draft in drafted} >= {"expected"}


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"temperature": 1.1, "min_p": 0.05},
    ],
    ids=str,
)
def test_the_same_seed_draws_the_same_text(sampling: dict[str, Any], tiny_model: Model) -> None:
    chosen = {"policy": "full", "seed": 3, **sampling}
    alone = tokens(tiny_model, speculate=False, **chosen)
    for expected in expectations(tiny_model, **chosen):
        assert tokens(tiny_model, expected=expected, **chosen) == alone


class Chain:
    """In place of a sequence: the next token depends on the last one."""

    def __init__(self, logits: np.ndarray):
        """Logits `[V, V]`."""
        facts = SimpleNamespace(model=SimpleNamespace(max_length=10**9))
        self.sessions = SimpleNamespace(manifest=facts)
        self.length, self._logits = 0, logits

    def run(self, tokens: list[int]) -> np.ndarray:
        self.length += len(tokens)
        return self._logits[tokens]


class Named(Policy):
    """A policy of one path without layers."""

    name = head = "int8"

    @property
    def uniform(self) -> tuple[()]:
        return ()


def drawn(
    sampling: Sampling,
    logits: np.ndarray,
    count: int,
    *,
    begin: Sequence[int] = (0,),
    eos: frozenset[int] = frozenset(),
) -> tuple[list[int], list[Draft]]:
    """A text of a chain with `count` further tokens, or up to EOS; what came of its drafts."""
    chain: Any = Chain(logits)
    current = CurrentPolicy(Named(), lambda budget: Named())
    stats = DraftStats(None, (), "int8", frozenset())
    options = GenerationOptions(max_new_tokens=count)
    request: Request[Any] = Request(
        ids=np.array(begin),
        current=current,
        options=options,
        sampling=sampling,
        plan=PromptPlan((), "int8", frozenset(), ()),
        eos=eos,
        write=lambda token: token,
        deliver=lambda piece: None,
    )
    going = Generation(chain, request)
    chain.length, drafts = len(begin) - 1, []
    while going.count < count and not eos & {*going.text[len(begin) :]}:
        context, count_of = chain.length, best_length([going.look_ahead(stats)], stats, 0)
        step = going.take(chain.run([going.text[-1], *going.draft(count_of)]), ())
        chain.length = context + len(step.tokens)
        drafts.append(step.draft)
        assert [told.token for told in going.told(step, 1.0)] == step.tokens
        assert chain.length == len(going.text) - 1
    return going.text, [draft for draft in drafts if draft]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3, "temperature": 1.5}],
    ids=str,
)
def test_twenty_thousand_draws_have_the_target_s_distribution(
    sampling: dict[str, Any],
) -> None:
    """By chi-square, given the token before."""
    rng = np.random.default_rng(0)
    target = rng.normal(0, 1.5, (8, 8)).astype(np.float32)
    chosen = Sampling(**{"temperature": 1.0, "seed": 1, **sampling})
    text, drafts = drawn(chosen, target, 20_000)
    assert 50 < sum(draft.accepted for draft in drafts) < sum(draft.tokens for draft in drafts)
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


def test_nothing_is_drafted_or_drawn_after_the_end() -> None:
    """Token 3 ends the text, and 0 would follow it."""
    cycle = np.full((9, 9), -9.0, np.float32)
    cycle[range(9), [1, 2, 4, 0, 5, 6, 7, 8, 3]] = 9.0  # 0 1 2 4 5 6 7 8 3
    begin = [0, 1, 2, 4, 5, 6, 7, 8, 3, 0]
    text, drafts = drawn(Sampling(), cycle, 30, begin=begin)
    assert len(text) >= 40 and sum(draft.accepted for draft in drafts) > 10
    text, drafts = drawn(Sampling(), cycle, 30, begin=begin, eos=frozenset({3}))
    assert text == [*begin, 1, 2, 4, 5, 6, 7, 8, 3]
    assert sum(draft.tokens for draft in drafts) <= 6  # the first two passes are without


def test_accepted_tokens_save_passes(tiny_model: Model) -> None:
    own = tiny_model.text.decode(tokens(tiny_model, policy="full", speculate=False))
    found = steps(tiny_model, policy="full", expected=own)
    assert sum(step.draft.accepted for step in found if step.draft) > 5
    options: dict[str, Any] = {"policy": "full", "ignore_eos": True, "max_new_tokens": 24}
    whole = tiny_model.generate(PROMPT, expected=own, **options)
    assert 0 < whole.accepted_tokens <= whole.draft_tokens
    alone = tiny_model.generate(PROMPT, speculate=False, **options)
    assert (alone, alone.draft_tokens, alone.accepted_tokens) == (whole, 0, 0)


def test_a_number_is_that_of_drafts_in_a_pass_at_most(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftStats, "cost", lambda _, rows, context: 1 + 0.01 * (rows - 1))
    own = tiny_model.text.decode(tokens(tiny_model, policy="full", speculate=False))
    alone, most = tokens(tiny_model, policy="full", speculate=False), list[int]()
    for number in (True, 2, 1, 0):
        found = steps(tiny_model, policy="full", expected=own, speculate=number)
        assert [step.token for step in found] == alone
        most.append(max((step.draft.tokens for step in found if step.draft), default=0))
    assert most[0] > 2 and most[1:] == [2, 1, 0]
    for number in (-1, MAX_DRAFT_TOKENS + 1):
        with pytest.raises(PolicyError, match=rf"speculate={number} must be in 0\.\.15$"):
            steps(tiny_model, speculate=number)


def test_limits_hold_to_the_token(tiny_model: Model) -> None:
    own = expectations(tiny_model, policy="full", max_new_tokens=1000)[1]
    for count in (1, 2, 7):
        found = steps(tiny_model, policy="full", expected=own, max_new_tokens=count)
        assert len(found) == count
        assert [step.finish_reason for step in found] == [None] * (count - 1) + ["length"]
    found = steps(tiny_model, policy="full", expected=own, max_new_tokens=1000)
    alone = steps(tiny_model, policy="full", speculate=False, max_new_tokens=1000)
    assert [step.token for step in found] == [step.token for step in alone]
    assert found[-1].finish_reason == alone[-1].finish_reason == "context"


def test_a_stop_text_ends_a_pass_in_its_middle(tiny_model: Model) -> None:
    options = {"policy": "full", "max_new_tokens": 60, "ignore_eos": True}
    whole = tiny_model.generate(PROMPT, speculate=False, **options)
    stop = whole[len(whole) // 2 :][:2]
    cut = tiny_model.generate(PROMPT, expected=whole, stop=stop, **options)
    assert cut == tiny_model.generate(PROMPT, speculate=False, stop=stop, **options)
    assert cut.finish_reason == "stop"


def test_a_cache_goes_on_after_drafts(tiny_model: Model) -> None:
    """The K/V that it keeps are the target's: those of rejected tokens are gone."""
    ids = tiny_model.text.encode(PROMPT)
    options: dict[str, Any] = {"policy": "full", "max_new_tokens": 20, "ignore_eos": True}
    for expected in expectations(tiny_model, **options):
        cache = tiny_model.new_cache()
        found = [*tiny_model.generate_step(ids, cache=cache, expected=expected, **options)]
        longer = [*ids.tolist(), *(step.token for step in found)]
        assert [*cache.tokens] == longer[: len(cache)] and len(cache) == len(longer) - 1
        again = [*tiny_model.generate_step(longer, cache=cache, speculate=False, **options)]
        afresh = [*tiny_model.generate_step(longer, speculate=False, **options)]
        assert [step.token for step in again] == [step.token for step in afresh]


def test_a_policy_decided_per_token_drafts_only_if_it_must_and_then_refuses(
    scored: Model,
) -> None:
    for given in ({"policy": "dash"}, {"budget": "fast"}, {"policy": "random:1"}):
        found = steps(scored, expected=PROMPT, **given)
        assert not any(step.draft for step in found)
        with pytest.raises(PolicyError, match="one path for every token") as error:
            steps(scored, speculate=True, **given)
        assert "\n" not in str(error.value)
    with pytest.raises(PolicyError, match="speculate='maybe'"):
        steps(scored, speculate="maybe")


@pytest.mark.usefixtures("cheap_rows")
def test_drafts_end_and_begin_with_the_policy(scored: Model) -> None:
    """A budget that is set while an answer runs may take another kind of policy."""
    options: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True}
    options["expected"] = scored.generate(PROMPT, policy="full", **options)
    stream, found = scored.stream(PROMPT, policy="full", **options), []
    stream._request.current.at = lambda budget: scored.policy(
        "dash" if budget == "fast" else "full"
    )
    for chunk in stream:
        found.append(chunk)
        if len(found) in (20, 40):
            stream.set_budget("fast" if len(found) == 20 else "best")
    assert {action for step in found[:20] for action in step.path} == {"full"}
    assert {action for step in found[-5:] for action in step.path} == {"full"}
    decided = next(n for n, step in enumerate(found) if set(step.path) != {"full"})
    assert any(step.draft for step in found[:decided])
    assert not any(step.draft for step in found[decided:40])


def test_passes_of_a_few_tokens_share_their_logits(tiny_model: Model) -> None:
    """A buffer for each size would be as large as five, with a large vocabulary many megabytes."""
    whole, memory = tiny_model.new_sequence(batch=2), set()
    path = FixedPath(("full",) * 4, "full")
    for sequence in (Part(whole, 0, 1), Part(whole, 1, 2)):
        sequence.forward(np.array([1, 2, 3]), path)
        for size in (2, 9, 5, MAX_DRAFT_TOKENS + 1):
            logits, _ = sequence.forward(np.arange(size), path, every=True)
            assert logits.shape[0] == size
            memory.add(logits.__array_interface__["data"][0])
    assert len(memory) == 1


# In batches


@pytest.mark.parametrize("given", [{}, {"temperature": 0.8, "seed": 5}], ids=str)
def test_an_answer_that_runs_alone_in_a_batch_drafts(
    given: dict[str, Any], tiny_model: Model
) -> None:
    options: dict[str, Any] = {"policy": "full", "max_new_tokens": 60, "ignore_eos": True, **given}
    alone = tiny_model.generate(PROMPT, speculate=False, **options)
    chosen = GenerationOptions(expected=alone, **options)
    batch, told = tiny_model.new_scheduler(3), [list[Any](), list[Any]()]
    batch.submit(tiny_model.request(PROMPT, told[0].append, chosen))
    for _ in range(3):
        batch.step()
    other = GenerationOptions(policy="full", max_new_tokens=9, ignore_eos=True)
    batch.submit(tiny_model.request("night", told[1].append, other))
    while batch.step():
        pass
    assert "".join(chunk.text for chunk in told[0]) == alone
    assert any(chunk.draft.accepted for chunk in told[0] if chunk.draft)
    assert "".join(chunk.text for chunk in told[1]) == tiny_model.generate("night", options=other)


# Forced by a grammar


def forced(texts: int) -> Grammar:
    """One of some texts, whose ends and beginnings are the same."""
    middles = " | ".join(f'"{number}"' for number in range(texts))
    return Grammar.lark(f'start: "the keeper counts " ({middles}) " ships in the night"')


def test_what_a_grammar_forces_runs_in_one_pass(tiny_model: Model) -> None:
    ids = tiny_model.text.encode(PROMPT)
    found = [*tiny_model.generate_step(ids, grammar=forced(1), policy="full")]
    text = "the keeper counts 0 ships in the night"
    assert tiny_model.text.decode([step.token for step in found[:-1]]) == text
    given = tiny_model.text.encode(text, add_special_tokens=False).tolist()
    assert [step.token for step in found[: len(given) - 1]] == given[:-1]
    assert found[0].ms > 0 and {step.ms for step in found[1 : len(given) - 2]} == {0.0}


RECORD = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 3} for name in ("keeper", "of the ships")},
    "required": ["keeper", "of the ships"],
    "additionalProperties": False,
}


@pytest.mark.usefixtures("cheap_rows")
def test_what_a_grammar_leaves_is_drafted_where_a_longer_token_may_come(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After "the", "ship" must follow; the answer may write "ships" in one token."""
    ids, layers, passes = tiny_model.text.encode(PROMPT), SequenceState.layers, list[int]()

    def counted(state: SequenceState, tokens: Any, decider: Any) -> Any:
        passes.append(1 if isinstance(tokens, int) else len(tokens))
        return layers(state, tokens, decider)

    monkeypatch.setattr(SequenceState, "layers", counted)
    grammar = Grammar.lark('start: item{20}\nitem: "the ship" ("s" | "") ", "')
    given: dict[str, Any] = {"grammar": grammar, "policy": "full", "temperature": 1.0, "seed": 1}
    found, needed = {}, {}
    for speculate in (False, True):
        del passes[:]
        found[speculate] = [*tiny_model.generate_step(ids, speculate=speculate, **given)]
        needed[speculate] = len(passes)
    assert [step.token for step in found[True]] == [step.token for step in found[False]]
    drafts = [step.draft for step in found[True] if step.draft]
    right = sum(draft.accepted for draft in drafts if draft.source == "grammar")
    assert right > 5 and needed[True] <= needed[False] - right


def test_what_a_grammar_leaves_is_cut_as_the_answer_cut_it_before(tiny_model: Model) -> None:
    tokenizer = guidance_tokenizer(tiny_model.text, tiny_model.manifest.model.vocab_size)
    grammar = Grammar.lark('start: item{4}\nitem: "the ship" ("s" | "") ", "')
    constraint = Constraint(grammar, tokenizer)
    usual, between = constraint.hint(), tokenizer.tokenize_bytes(b", ")
    text = tokenizer.decode_bytes(usual)
    letters = [
        token for n in range(len(text)) for token in tokenizer.tokenize_bytes(text[n : n + 1])
    ]
    assert text.startswith(b"the ship") and letters != usual
    constraint.took(*letters)
    for token in tokenizer.tokenize_bytes(b"the ship, "[len(text) :]):
        constraint.took(token)
    assert constraint.hint() == letters
    constraint.took(*usual)  # the latest way holds
    constraint.took(*between)
    assert constraint.hint() == usual
    constraint.took(*tokenizer.tokenize_bytes(b"the ships"))  # another text: nothing is stats
    constraint.took(*between)
    assert constraint.hint() == usual


@pytest.mark.usefixtures("cheap_rows")
def test_forced_tokens_join_the_pass_of_other_answers(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, passes = Rows.forward, list[list[int]]()

    def noted(rows: Rows, numbers: Any, tokens: Any, *rest: Any) -> Any:
        if told[1]:  # the prompts have run
            passes.append([len(ids) for ids in tokens])
        return forward(rows, numbers, tokens, *rest)

    monkeypatch.setattr(Rows, "forward", noted)
    scheduler, told = tiny_model.new_scheduler(2), [list[Any](), list[Any]()]
    given = GenerationOptions(policy="full", max_new_tokens=40)
    form = dataclasses.replace(given, grammar=Grammar.json_schema(RECORD), speculate=1)
    for options, pieces in zip((given, form), told, strict=True):
        scheduler.submit(tiny_model.request("no ship passes", pieces.append, options))
    while scheduler.step():
        pass
    wanted = [tiny_model.generate("no ship passes", options=options) for options in (given, form)]
    assert ["".join(chunk.text for chunk in pieces) for pieces in told] == wanted
    assert any(len(sizes) == 2 and sizes[1] > 2 for sizes in passes)


@pytest.mark.usefixtures("cheap_rows")
@pytest.mark.parametrize(
    ("policy", "prefill"), [("full", None), ("int4", "full"), ("static:full,int8,skip,int4", None)]
)
def test_forced_tokens_take_the_path_of_an_answer(
    policy: str, prefill: str | None, tiny_model: Model
) -> None:
    """By themselves as well as beside draft tokens."""
    names = ("keeper", "ship", "of the ships")
    parts = {name: {"type": "string", "maxLength": 12} for name in names}
    schema = {"type": "object", "properties": parts, "required": [*names]}
    grammar = Grammar.json_schema({**schema, "additionalProperties": False})
    given: dict[str, Any] = {"policy": policy, "prefill": prefill, "grammar": grammar}
    for seed in range(4):
        given |= {"seed": seed, "temperature": 1.0, "max_new_tokens": 100}
        text = tiny_model.generate("the keeper", speculate=True, **given)
        assert text == tiny_model.generate("the keeper", speculate=False, **given)


@pytest.mark.parametrize("policy", ["full", "dash", "random:1"])
def test_forced_tokens_are_the_same_alone_and_in_batches(policy: str, scored: Model) -> None:
    given: dict[str, Any] = {"policy": policy, "grammar": forced(9), "temperature": 3.0}
    alone = [scored.generate(PROMPT, seed=seed, **given) for seed in range(4)]
    assert len({*alone}) > 1
    assert alone == [scored.generate(PROMPT, seed=n, speculate=False, **given) for n in range(4)]
    for rows in (1, 3):
        batch, told = scored.new_scheduler(rows), [list[Any]() for _ in alone]
        for seed, pieces in enumerate(told):
            options = GenerationOptions(seed=seed, **given)
            batch.submit(scored.request(PROMPT, pieces.append, options))
        while batch.step():
            pass
        assert ["".join(chunk.text for chunk in pieces) for pieces in told] == alone


def test_forced_tokens_keep_limits_and_caches(tiny_model: Model) -> None:
    ids = tiny_model.text.encode(PROMPT)
    given: dict[str, Any] = {"grammar": forced(1), "policy": "full"}
    whole = [step.token for step in tiny_model.generate_step(ids, **given)]
    for count in (1, 2, len(whole) - 1):
        cache = tiny_model.new_cache()
        found = [*tiny_model.generate_step(ids, max_new_tokens=count, cache=cache, **given)]
        assert [step.finish_reason for step in found] == [None] * (count - 1) + ["length"]
        assert [*cache.tokens] == [*ids.tolist(), *(step.token for step in found[:-1])]
        assert len(cache) == len(cache.tokens)


def test_log_probabilities_are_of_every_token_of_a_form(tiny_model: Model) -> None:
    ids = tiny_model.text.encode(PROMPT)
    found = [*tiny_model.generate_step(ids, grammar=forced(1), logprobs=2)]
    assert all(step.logprobs is not None for step in found)


def schemas(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random JSON schema whose answers are short."""
    kinds = ["enum", "integer", "boolean", "string"] + ["object", "array"] * (depth < 2)
    kind = rng.choice(kinds) if depth else "object"
    if kind == "enum":
        return {"enum": [rng.choice(["night", "no on", "ship", '"', "é"]), rng.randrange(99), None]}
    if kind == "string":
        return {"type": "string", "maxLength": rng.randrange(4)}
    if kind == "integer":
        return {"type": "integer", "minimum": 0, "maximum": rng.randrange(300)}
    if kind == "array":
        return {"type": "array", "items": schemas(rng, depth + 1), "minItems": 1, "maxItems": 2}
    names = rng.sample(["name", "keeper of", "at", "a" * 20, "ships", "ü"], rng.randrange(1, 5))
    fields = {name: schemas(rng, depth + 1) for name in names} if kind == "object" else {}
    extra = {"required": names, "additionalProperties": False} if fields else {}
    return {"type": kind, **({"properties": fields} if fields else {}), **extra}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is one of `schemas`."""
    kind = schema.get("type")
    if kind is None:
        return value in schema["enum"]
    if kind == "object":
        fields = schema["properties"]
        return {*value} == {*fields} and all(fits(value[name], fields[name]) for name in fields)
    if kind == "array":
        return 1 <= len(value) <= 2 and all(fits(one, schema["items"]) for one in value)
    if kind == "integer":
        return type(value) is int and 0 <= value <= schema["maximum"]
    return type(value) is bool if kind == "boolean" else len(value) <= schema["maxLength"]


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_answers_with_forced_tokens_fit_their_schema(count: int, tiny_model: Model) -> None:
    rng, forced = random.Random(0), 0
    for seed in range(count):
        schema = schemas(rng)
        grammar = Grammar.json_schema(schema)
        given: dict[str, Any] = {"grammar": grammar, "temperature": 2.0, "seed": seed}
        text = tiny_model.generate("the keeper", policy="full", max_new_tokens=240, **given)
        if text.finish_reason == "stop":
            assert fits(json.loads(text), schema), (schema, text)
        forced += sum(ms == 0.0 for ms in text.ms)
    assert forced > count
