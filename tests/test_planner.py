"""What guessing pays: with times and outcomes made up, so that no machine decides."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from scored_bundle import made_up

from dash_onnx.core.actions import Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.facts import Costs, StaticPoint
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import ScoredPolicy
from dash_onnx.runtime.planner import Bet, Draft, Guess, Planner, planner_for

# What passes of 1 to 9 tokens take, as a multiple of one: measured on two cores.
TIMES = {
    "135M int4": (1, 1.27, 1.56, 1.9, 2.1, 2.5, 2.7, 2.9, 3.1),
    "135M int8": (1, 1.26, 1.61, 1.74, 1.9, 2.3, 2.3, 2.3, 2.6),
    "135M full": (1, 1.16, 1.18, 1.26, 1.4, 1.4, 1.5, 1.6, 1.7),
    "0.5B int8": (1, 1.03, 1.14, 1.24, 1.5, 1.5, 1.6, 1.8, 1.9),
    "0.5B full": (1, 1.02, 1.08, 1.08, 1.1, 1.1, 1.1, 1.2, 1.2),
    "1.5B int4": (1, 1.25, 1.74, 1.96, 2.4, 2.7, 3.0, 3.4, 3.7),
}
PLAIN_MS, SET_UP_MS, DRAFT = 10.0, 2.0, 0.7


class Machine:
    """Generations of 128 tokens whose passes and guesses are drawn, not run."""

    def __init__(self, times: tuple[float, ...], seed: int, **rates: float):
        """`rates` is how often each source is right."""
        self.planner = Planner(Draft(None, DRAFT, 0.8) if "dash" in rates else None)  # type: ignore[arg-type]
        self.rng, self.times, self.rates = random.Random(seed), times, rates
        self.ms, self.bets = 0.0, []

    def pass_ms(self, tokens: int, ran: set[object]) -> float:
        """A pass, which takes longer the first time."""
        ms = PLAIN_MS * self.times[tokens - 1] * self.rng.lognormvariate(0, 0.03)
        return ms if tokens in ran else ms + SET_UP_MS

    def generate(self, tokens: int = 128) -> None:
        ran: set[object] = set()
        while tokens > 0:
            most = min(8, tokens - 1)
            offers = [Bet("dash", 0, most)] if "dash" in self.rates else []
            if "ngram" in self.rates and self.rng.random() < 0.7:
                offers.append(Bet("ngram", self.rng.choice((2, 2, 3, 6)), most))
            bet = self.planner.choose([offer for offer in offers if offer.tokens])
            guessed = bet.tokens if bet else 0
            ms, timed = self.pass_ms(1 + guessed, ran), (1 + guessed) in ran
            ran.add(1 + guessed)
            self.ms += ms
            tokens -= 1
            if bet is None:
                if timed:
                    self.planner.see_plain(ms)
                continue
            right, draft_ms = 0, 0.0
            while right < guessed and self.rng.random() < self.rates[bet.source]:
                right += 1
            if bet.source == "dash":
                draft_ms = DRAFT * PLAIN_MS * guessed + (0 if "draft" in ran else SET_UP_MS)
            guess, drafted = Guess(bet.source, guessed, right), "draft" in ran
            self.planner.see(bet, guess, draft_ms, ms, timed=(drafted, timed))
            ran |= {"draft"} if draft_ms else set()
            self.ms += draft_ms
            self.bets.append(bet)
            tokens -= right


def speed(times: tuple[float, ...], generations: int = 8, **rates: float) -> float:
    """Beside the same generations without guesses; the mean of some seeds."""
    alone = generations * (128 * PLAIN_MS + SET_UP_MS)
    found = []
    for seed in range(3):
        machine = Machine(times, seed, **rates)
        for _ in range(generations):
            machine.generate()
        found.append(alone / machine.ms)
    return statistics.mean(found)


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.2])
def test_a_source_that_is_seldom_right_costs_less_than_two_percent(
    rate: float, times: tuple[float, ...]
) -> None:
    assert speed(times, ngram=rate) > 0.98
    assert speed(times, ngram=rate, dash=rate) > 0.98
    assert speed(times, generations=1, ngram=rate) > 0.98  # a model that was just loaded


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
def test_a_source_that_is_often_right_gains(times: tuple[float, ...]) -> None:
    found = [speed(times, ngram=rate, dash=0.2) for rate in (0.5, 0.7, 0.9)]
    assert found == sorted(found)
    assert found[0] > 1.05 and found[-1] > 1.4


def test_a_draft_pays_where_passes_of_several_tokens_are_cheap() -> None:
    assert speed(TIMES["0.5B full"], dash=0.95) > 1.1
    assert speed(TIMES["1.5B int4"], dash=0.95) > 0.98


def test_what_does_not_pay_is_probed_with_one_token_now_and_then() -> None:
    machine = Machine(TIMES["135M int8"], 0, ngram=0.0)
    for _ in range(8):
        machine.generate()
    assert {bet.tokens for bet in machine.bets} == {1}
    assert 5 < len(machine.bets) < 8 * 128 / 40
    machine.rates["ngram"] = 0.9  # it is noticed
    before = machine.ms
    for _ in range(8):
        machine.generate()
    assert machine.ms - before < 0.8 * 8 * 128 * PLAIN_MS


def test_what_was_learned_holds_in_the_next_generation() -> None:
    machine = Machine(TIMES["0.5B int8"], 0, ngram=0.9)
    machine.generate()
    before = machine.ms
    machine.generate()
    assert machine.ms - before < before


def test_the_first_pass_of_a_size_tells_no_time() -> None:
    """It sets up what it runs."""
    planner, offer = Planner(), Bet("ngram", 2, 1)
    assert planner.choose([offer]) is None  # nothing is known yet
    planner.see_plain(10.0)
    bet = planner.choose([offer])
    assert bet is not None and bet.probe
    planner.see(bet, Guess("ngram", 1, 1), 0.0, 100.0, timed=(False, False))
    again = planner.choose([offer])  # 100 ms for two tokens would say that it never pays
    assert again is not None and not again.probe


def with_costs(manifest: Manifest, **layer: float) -> Manifest:
    costs: dict[Action, float] = {**layer, "skip": 0.1}  # type: ignore[dict-item]
    heads = dict.fromkeys(manifest.costs.heads_ms, 0.5)
    layers = (costs,) * manifest.model.num_layers
    return replace(manifest, scorer=None, costs=Costs("a machine", 2, 0.1, 0.05, heads, layers))


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return with_costs(Bundle(tiny_bundle).manifest, full=1.0, int8=0.6, int4=0.4)


def uniform(manifest: Manifest, action: Action) -> Planner:
    path = (action,) * manifest.model.num_layers
    return planner_for(manifest, path, manifest.heads[action])


def test_an_untrained_bundle_drafts_with_its_cheapest_precision(manifest: Manifest) -> None:
    draft = uniform(manifest, "full").draft
    assert draft is not None and draft.policy.name == "int4"
    assert draft.cost == pytest.approx((0.1 + 0.5 + 4 * 0.4) / (0.1 + 0.5 + 4 * 1.0))


def test_auto_loads_no_draft_that_promises_little(manifest: Manifest) -> None:
    cheap = with_costs(manifest, full=1.0, int8=0.3, int4=0.1)
    for planner, worth in ((uniform(cheap, "full"), True), (uniform(manifest, "int8"), False)):
        assert planner.draft is not None
        assert planner.draft_for("dash") is planner.draft
        assert planner.draft_for("auto") is (planner.draft if worth else None)
        assert planner.draft_for("ngram") is None


def test_a_draft_may_have_been_measured_as_losing_less_than_nothing(manifest: Manifest) -> None:
    scorer = made_up(manifest, "scorer.onnx")
    same = ("int4",) * manifest.model.num_layers
    better = replace(scorer, static=(StaticPoint(0.31, "int4", -1e-4, same),))
    draft = uniform(replace(manifest, scorer=better), "full").draft
    assert draft is not None and draft.believed == 1.0


def test_no_path_drafts_that_takes_as_long_as_the_target(manifest: Manifest) -> None:
    assert uniform(manifest, "int4").draft is None
    slow = with_costs(manifest, full=1.0, int8=0.6, int4=0.7)
    assert uniform(slow, "int8").draft is None


def test_the_draft_is_what_promises_most_at_its_cost_and_loss(manifest: Manifest) -> None:
    scorer = made_up(manifest, "scorer.onnx")  # its cheapest preset: 0.3, at about 0.4 nats
    same = ("int4",) * manifest.model.num_layers
    near = replace(scorer, static=(StaticPoint(0.31, "int4", 0.02, same),))
    draft = uniform(replace(manifest, scorer=near), "full").draft
    assert draft is not None and draft.policy.uniform == same
    assert draft.believed == pytest.approx(0.93, abs=0.01)
    far = replace(scorer, static=(StaticPoint(0.31, "int4", 1.5, same),))
    draft = uniform(replace(manifest, scorer=far), "full").draft
    assert draft is not None and isinstance(draft.policy, ScoredPolicy)
