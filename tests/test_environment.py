"""The training process computes what the runtime computes, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA3_ROPE, layer_inputs, logits_of, save_biased, save_tiny

import dash_onnx
from dash_onnx.core.actions import Action, ActionPath
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.facts import INT8_INPUTS
from dash_onnx.core.policy import Policy
from dash_onnx.exporters.train.dequantized import DequantizedModel
from dash_onnx.exporters.train.environment import Decide, Environment
from dash_onnx.runtime.model import Model

LAYERS = 4
PROMPT = 6
LENGTH = 30
ALL = ("full", "int8", "int4", "skip")


class Recorded(Policy):
    """Replays paths."""

    name = "recorded"

    def __init__(self, paths: list[ActionPath], head: Action):
        self.head = head
        self._paths = paths

    def paths(self) -> Iterator[ActionPath]:
        return iter(self._paths)


@dataclass(frozen=True)
class Case:
    """A bundle, twice."""

    model: Model
    env: Environment

    @property
    def actions(self) -> tuple[Action, ...]:
        return self.env.actions


def case_of(folder: Path, prompt_tokens: int = PROMPT) -> Case:
    model = dash_onnx.load(folder)
    actions = model.manifest.actions
    layers = DequantizedModel(Bundle(folder), actions, torch.float32)
    decision_points = tuple(range(1, model.manifest.model.num_layers))
    return Case(model, Environment(layers, actions, prompt_tokens, decision_points))


OPTIONS: dict[str, dict[str, object]] = {
    "default": {},
    "scaled skip": {"compensation_rank": 0},
    "biases": {},
    "biases, scaled skip": {"compensation_rank": 0},
    "without full": {"variants": ("int8", "int4")},
    "int8 alone": {"variants": ("int8",)},
    "full alone": {"variants": ("full",), "compensation_rank": 32},
    "llama3 rope": {"variants": ("full", "int4")},
}


@pytest.fixture(scope="module", params=OPTIONS)
def case(
    request: pytest.FixtureRequest,
    tiny_folder: Path,
    night: Path,
    tmp_path_factory: pytest.TempPathFactory,
    export_tiny: Callable[..., Path],
) -> Case:
    source, folder = tiny_folder, tmp_path_factory.mktemp("source") / "source"
    if "biases" in request.param:
        source = save_biased(folder)
    elif "rope" in request.param:
        source = save_tiny(folder, rope_parameters=LLAMA3_ROPE, head_dim=32)
    return case_of(export_tiny(source, calibration=(night,), **OPTIONS[request.param]))


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Case:
    return case_of(tiny_bundle)


def random_ids(batch: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 384, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_choice(case: Case, ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Action indices `[B, T, L]`; the first layer is not skipped."""
    generator = torch.Generator().manual_seed(seed)
    count = len(case.actions)
    choice = torch.randint(count, (*ids.shape, case.env.layers), generator=generator)
    choice[..., 0] %= count - 1
    return choice


def one_hot(choice: torch.Tensor, case: Case) -> torch.Tensor:
    return torch.nn.functional.one_hot(choice, len(case.actions)).float()


def uniform(case: Case, ids: torch.Tensor, action: Action) -> torch.Tensor:
    return case.env.run_path(ids, (case.actions.index(action),) * LAYERS)


def recorded(decisions: torch.Tensor) -> Decide:
    return lambda state: decisions[:, :, state.layers]


def runtime_logits(case: Case, ids: torch.Tensor, choice: torch.Tensor) -> np.ndarray:
    """Logits after each decoded token of a sequence, `[T - prompt, V]`."""
    prompt = case.env.prompt_tokens
    paths = [tuple(case.actions[i] for i in row) for row in choice[prompt:].tolist()]
    policy = Recorded(paths, case.env.model.head)
    scored = case.model.score(ids.numpy(), prompt_tokens=prompt, policy=policy)
    rows = [(token.logits.copy(), token.path) for token in scored]
    assert [path for _, path in rows] == paths
    return np.stack([logits for logits, _ in rows])


# The environment against the runtime


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_random_paths_give_the_logits_of_the_runtime(case: Case, dense: bool) -> None:
    ids = random_ids()
    choice = random_choice(case, ids)
    with torch.no_grad():
        rollout = case.env.run(ids, recorded(one_hot(choice, case)), dense)
        ours = case.env.model.logits(rollout.final)[:, PROMPT:].numpy()
    assert torch.equal(rollout.paths[:, PROMPT:], choice[:, PROMPT:])
    for row, tokens, paths in zip(ours, ids, choice, strict=True):
        wanted = runtime_logits(case, tokens, paths)
        assert wanted.std() > 0.1  # layers matter
        np.testing.assert_allclose(row, wanted, atol=1e-3)


def test_inputs_are_rounded_as_in_the_graphs(tiny_with: Callable[..., Path]) -> None:
    """With them, what is left are other orders of sums, and what they carry over a border."""
    case, errors = case_of(tiny_with(accuracy_level=INT8_INPUTS)), []
    ids = random_ids(4)
    choice = random_choice(case, ids)
    for case.env.model.rounds_inputs in (False, True):
        with torch.no_grad():
            final = case.env.run(ids, recorded(one_hot(choice, case))).final
            ours = case.env.model.logits(final)[:, PROMPT:].numpy()
        rows = zip(ours, ids, choice, strict=True)
        errors.append(
            np.mean([np.abs(a - runtime_logits(case, *rest)).mean() for a, *rest in rows])
        )
    before, after = errors
    assert after < before / 5


def test_rounded_inputs_leave_gradients_as_they_are(tiny_with: Callable[..., Path]) -> None:
    model, found = case_of(tiny_with(accuracy_level=INT8_INPUTS)).env.model, []
    for model.rounds_inputs in (False, True):
        final = torch.linspace(-1, 1, 64).requires_grad_()
        model.logits(final, "int8").sum().backward()  # linear in its input
        found.append(final.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("action", range(len(ALL)), ids=ALL)
def test_a_path_that_all_tokens_take_gives_the_logits_of_the_runtime(
    tiny: Case, action: int
) -> None:
    ids = random_ids(5)  # more than run at once
    path = (0, action, action, action)
    ours = tiny.env.model.logits(tiny.env.run_path(ids, path))[-1, PROMPT:].numpy()
    wanted = runtime_logits(tiny, ids[-1], torch.tensor(path).expand(LENGTH, -1))
    np.testing.assert_allclose(ours, wanted, atol=1e-3)


def test_the_reference_runs_every_layer_at_the_dearest_action(tiny: Case) -> None:
    ids = random_ids()
    ours = tiny.env.model.logits(tiny.env.reference(ids))
    for row, tokens in zip(ours, ids.numpy(), strict=True):
        policy = Recorded([("full",) * LAYERS] * LENGTH, tiny.env.model.head)
        wanted = logits_of(tiny.model.score(tokens, prompt_tokens=1, policy=policy))
        np.testing.assert_allclose(row[1:].numpy(), wanted, atol=1e-3)


def test_the_prompt_runs_at_the_prefill_precision_whatever_is_decided(tiny: Case) -> None:
    ids = random_ids()
    outcomes = []
    for seed in (0, 1):
        choice = random_choice(tiny, ids, seed)
        choice[:, PROMPT:] = 1
        with torch.no_grad():
            outcomes.append(tiny.env.run(ids, recorded(one_hot(choice, tiny))))
    assert torch.equal(outcomes[0].final, outcomes[1].final)
    assert (outcomes[0].paths[:, :PROMPT] == 0).all()


def test_a_sequence_without_prompt_is_decided_from_its_first_token(tiny_bundle: Path) -> None:
    case = case_of(tiny_bundle, prompt_tokens=0)
    ids = random_ids(1, 12)
    choice = random_choice(case, ids)
    with torch.no_grad():
        final = case.env.run(ids, recorded(one_hot(choice, case))).final
        ours = case.env.model.logits(final)[0].numpy()
    np.testing.assert_allclose(ours, runtime_logits(case, ids[0], choice[0]), atol=1e-3)


@pytest.mark.parametrize("decision_points", [tuple(range(1, LAYERS)), (1, 3), (2,), (LAYERS - 1,)])
def test_decisions_see_what_the_layer_before_their_segment_sees(
    tiny: Case, decision_points: tuple[int, ...]
) -> None:
    env = Environment(tiny.env.model, tiny.actions, PROMPT, decision_points)
    ids = random_ids()
    choice = random_choice(tiny, ids)
    with torch.no_grad():
        states = env.run(ids, recorded(one_hot(choice, tiny))).states
    bounds = (0, *decision_points, LAYERS)
    assert [state.layers for state in states] == [slice(*pair) for pair in pairwise(bounds)]
    for number, (tokens, paths) in enumerate(zip(ids.numpy(), choice.tolist(), strict=True)):
        named = [tuple(ALL[action] for action in path) for path in paths[PROMPT:]]
        inputs = layer_inputs(tiny.model, tokens, named, PROMPT)
        for state in states:
            wanted = inputs[:, max(state.layers.start - 1, 0)]
            np.testing.assert_allclose(state.hidden[number, PROMPT:], wanted, atol=1e-3)


def test_later_tokens_attend_to_what_earlier_actions_left(tiny: Case) -> None:
    ids = random_ids(1)
    choice = torch.zeros((1, LENGTH, LAYERS), dtype=torch.int64)
    other = choice.clone()
    other[0, PROMPT, 2] = ALL.index("skip")
    finals = []
    with torch.no_grad():
        for paths in (choice, other):
            finals.append(tiny.env.run(ids, recorded(one_hot(paths, tiny))).final[0])
    change = (finals[0] - finals[1]).abs().amax(-1)
    assert (change[:PROMPT] == 0).all()
    assert (change[PROMPT:] > 1e-5).all()


# Dense and sparse


def test_dense_equals_sparse(case: Case) -> None:
    ids = random_ids(3, seed=4)
    decisions = one_hot(random_choice(case, ids, 5), case)
    with torch.no_grad():
        sparse = case.env.run(ids, recorded(decisions))
        dense = case.env.run(ids, recorded(decisions), dense=True)
    torch.testing.assert_close(dense.final, sparse.final, atol=1e-4, rtol=1e-4)
    assert torch.equal(dense.paths, sparse.paths)


def test_in_dense_mode_every_decision_of_every_layer_has_a_gradient(case: Case) -> None:
    ids = random_ids()
    rollout = case.env.run(ids, recorded(one_hot(random_choice(case, ids), case)), dense=True)
    kl = case.env.kl(case.env.reference(ids), rollout.final)[:, PROMPT:].mean()
    gradient = torch.cat(torch.autograd.grad(kl, rollout.decisions), 2)
    assert torch.isfinite(gradient).all()
    assert (gradient[:, PROMPT:].abs().amax((0, 1)) > 0).all()


def test_the_gradient_of_the_decisions_is_the_slope_of_the_kl(tiny: Case) -> None:
    """At the path of the first action, whose Jacobian is exact."""
    ids = random_ids(1)
    base = torch.zeros((1, LENGTH, LAYERS), dtype=torch.int64)
    decisions = one_hot(base, tiny).requires_grad_()
    wanted = uniform(tiny, ids, "int4")  # any other distribution

    def loss(values: torch.Tensor) -> torch.Tensor:
        final = tiny.env.run(ids, recorded(values), dense=True).final
        return tiny.env.kl(wanted, final)[:, PROMPT:].double().sum()

    (gradient,) = torch.autograd.grad(loss(decisions), decisions)
    step = 0.004
    for layer in range(LAYERS):
        for action in (1, 2, 3):
            direction = torch.zeros_like(gradient)
            direction[:, PROMPT:, layer, action] = 1.0
            direction[:, PROMPT:, layer, 0] = -1.0
            with torch.no_grad():
                up = loss(decisions.detach() + step * direction)
                down = loss(decisions.detach() - step * direction)
            slope = float(up - down) / (2 * step)
            found = float((gradient * direction).sum())
            assert found == pytest.approx(slope, rel=0.03, abs=2e-3), (layer, action)


# KL through the LM head


def plain_kl(
    env: Environment, reference: torch.Tensor, final: torch.Tensor, head: Action
) -> torch.Tensor:
    p = env.model.logits(reference).log_softmax(-1)
    q = env.model.logits(final, head).log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("shape", [(2, 50), (1, 64), (3, 1), (7,)])
def test_the_kl_and_its_gradient_are_those_of_a_plain_computation(
    tiny: Case, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(*shape, 64, generator=generator)
    final = reference + 0.3 * torch.randn(*shape, 64, generator=generator)
    final.requires_grad_()
    weight = torch.rand(shape, generator=generator)
    ours = tiny.env.kl(reference, final)
    wanted = plain_kl(tiny.env, reference, final, tiny.env.model.head)
    assert ours.shape == shape
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    (got,) = torch.autograd.grad((ours * weight).sum(), final)
    (exact,) = torch.autograd.grad((wanted * weight).sum(), final)
    torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-3)


def test_the_kl_of_the_reference_itself_is_nothing_and_no_kl_is_negative(tiny: Case) -> None:
    ids = random_ids()
    reference = tiny.env.reference(ids)
    assert tiny.env.kl(reference, reference).abs().max() < 1e-6
    assert (tiny.env.kl(reference, uniform(tiny, ids, "int4"))[:, PROMPT:] > 0).all()


def test_the_mean_kl_with_each_head_is_that_of_the_decided_tokens(tiny: Case) -> None:
    ids, heads = random_ids(), list(tiny.env.model.heads)
    reference, final = tiny.env.reference(ids), uniform(tiny, ids, "int4")
    losses = (plain_kl(tiny.env, reference, final, head) for head in heads)
    wanted = [float(loss[:, PROMPT:].mean()) for loss in losses]
    assert len(set(wanted)) == len(heads) > 1
    found = tiny.env.mean_kl(reference, [final, reference], heads)
    assert found[0] == pytest.approx(wanted, rel=1e-5)
    assert found[1][heads.index(tiny.env.model.head)] == pytest.approx(0, abs=1e-6)


def test_the_mean_kl_is_summed_exactly_where_products_run_in_bf16(tiny: Case) -> None:
    ids, head = random_ids(), tiny.env.model.head
    reference = tiny.env.reference(ids)
    with torch.autocast("cpu", torch.bfloat16):
        ((found,),) = tiny.env.mean_kl(reference, [reference], [head])
    assert found == pytest.approx(0, abs=1e-6)


def test_a_model_too_large_to_keep_gives_the_same_gradients(case: Case) -> None:
    ids, env = random_ids(), case.env
    maps = [weight.requires_grad_() for weight in env.model.compensation()]

    def gradients() -> list[torch.Tensor]:
        rollout = env.run(ids, recorded(one_hot(random_choice(case, ids), case)), dense=True)
        kl = env.kl(env.reference(ids), rollout.final).sum()
        first = torch.autograd.grad(kl, [*rollout.decisions, *maps], retain_graph=True)
        second = torch.autograd.grad(rollout.final.square().sum(), rollout.decisions)
        return [*first, *second]

    assert env.model.keeps_layers
    wanted = gradients()
    env.model.keeps_layers = False
    try:
        found = gradients()
    finally:
        env.model.keeps_layers = True
        for weight in maps:
            weight.requires_grad_(False)
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)
