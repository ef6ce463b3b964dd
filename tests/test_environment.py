"""The training process computes what the runtime computes, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA3_ROPE, logits_of, save_tiny
from transformers import LlamaForCausalLM

import dash_onnx
from dash_onnx.core.actions import Action
from dash_onnx.core.actions import Path as ActionPath
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.policy import PathPolicy
from dash_onnx.exporters.train.environment import Decide, Environment, State
from dash_onnx.exporters.train.frozen import Frozen
from dash_onnx.exporters.train.static import fixed
from dash_onnx.runtime.engine import Model

LAYERS = 4
PROMPT = 6
LENGTH = 30
ALL = ("full", "int8", "int4", "skip")


class Recorded(PathPolicy):
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
    frozen = Frozen(Bundle(folder), actions, torch.float32)
    decision_points = tuple(range(1, model.manifest.model.num_layers))
    return Case(model, Environment(frozen, actions, prompt_tokens, actions[0], decision_points))


def save_with_biases(folder: Path) -> Path:
    save_tiny(folder, attention_bias=True, mlp_bias=True)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # transformers leaves them at zero
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data = values.mul(0.2).half().float()
    model.save_pretrained(folder)
    return folder


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


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "night.txt"
    path.write_text("the keeper of the lighthouse counts 42 ships that pass in the night\n" * 48)
    return path


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_biases(tmp_path_factory.mktemp("biased") / "biased")


@pytest.fixture(scope="module", params=OPTIONS)
def case(
    request: pytest.FixtureRequest,
    tiny_folder: Path,
    biased: Path,
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
    export_tiny: Callable[..., Path],
) -> Case:
    source = biased if "biases" in request.param else tiny_folder
    if "rope" in request.param:
        folder = tmp_path_factory.mktemp("rope") / "rope"
        source = save_tiny(folder, rope_parameters=LLAMA3_ROPE, head_dim=32)
    return case_of(export_tiny(source, calibration=(text,), **OPTIONS[request.param]))


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


def recorded(weights: torch.Tensor) -> Decide:
    return lambda state: weights[:, :, state.layers]


def runtime_logits(case: Case, ids: torch.Tensor, choice: torch.Tensor) -> np.ndarray:
    """Logits after each decoded token of a sequence, `[T - prompt, V]`."""
    prompt = case.env.prompt_tokens
    paths = [tuple(case.actions[i] for i in row) for row in choice[prompt:].tolist()]
    policy = Recorded(paths, case.env.frozen.head)
    scored = case.model.score(ids.numpy(), prompt_tokens=prompt, policy=policy)
    rows = [(token.logits.copy(), token.path) for token in scored]
    assert [path for _, path in rows] == paths
    return np.stack([logits for logits, _ in rows])


# The process against the runtime


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_random_paths_give_the_logits_of_the_runtime(case: Case, dense: bool) -> None:
    ids = random_ids()
    choice = random_choice(case, ids)
    with torch.no_grad():
        rollout = case.env.run(ids, recorded(one_hot(choice, case)), dense)
        ours = case.env.frozen.logits(rollout.final)[:, PROMPT:].numpy()
    assert torch.equal(rollout.paths[:, PROMPT:], choice[:, PROMPT:])
    for row, tokens, paths in zip(ours, ids, choice, strict=True):
        wanted = runtime_logits(case, tokens, paths)
        assert wanted.std() > 0.1  # layers matter
        np.testing.assert_allclose(row, wanted, atol=1e-3)


def test_every_uniform_path_gives_the_logits_of_the_runtime(tiny: Case) -> None:
    ids = random_ids(1)
    for action in range(len(ALL)):
        path = [0, action, action, action]
        with torch.no_grad():
            final = tiny.env.run(ids, fixed(tiny.env, path, ids.shape)).final
            ours = tiny.env.frozen.logits(final)[0, PROMPT:].numpy()
        wanted = runtime_logits(tiny, ids[0], torch.tensor(path).expand(LENGTH, -1))
        np.testing.assert_allclose(ours, wanted, atol=1e-3)


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
        ours = case.env.frozen.logits(final)[0].numpy()
    np.testing.assert_allclose(ours, runtime_logits(case, ids[0], choice[0]), atol=1e-3)


def test_the_reference_is_the_prefill_of_the_runtime_at_one_action(tiny: Case) -> None:
    ids = random_ids()
    for action in ("full", "int8", "int4"):
        reference = tiny.env.reference(ids, action)[:, PROMPT:]
        if action == "full":  # the prompt, too
            reference = tiny.env.reference(ids, action)
            path = (action,) * LAYERS
            for row, tokens in zip(tiny.env.frozen.logits(reference), ids, strict=True):
                policy = Recorded([path], tiny.env.frozen.head)
                wanted = logits_of(tiny.model.score(tokens[:7], prompt_tokens=6, policy=policy))
                np.testing.assert_allclose(row[6].numpy(), wanted[0], atol=1e-3)
        else:
            choice = torch.full((*ids.shape, LAYERS), ALL.index(action))
            ours = tiny.env.frozen.logits(reference)[0].numpy()
            np.testing.assert_allclose(ours, runtime_logits(tiny, ids[0], choice[0]), atol=1e-3)


@pytest.mark.parametrize("decision_points", [tuple(range(1, LAYERS)), (1, 3), (2,), (LAYERS - 1,)])
def test_decisions_see_what_the_layer_before_their_segment_sees(
    tiny: Case, decision_points: tuple[int, ...]
) -> None:
    frozen = tiny.env.frozen
    env = Environment(frozen, tiny.actions, PROMPT, "full", decision_points)
    ids = random_ids()
    weights = one_hot(random_choice(tiny, ids), tiny)
    states: list[State] = []

    def decide(state: State) -> torch.Tensor:
        states.append(state)
        return weights[:, :, state.layers]

    with torch.no_grad():
        paths = env.run(ids, decide).paths
    bounds = (0, *decision_points, LAYERS)
    assert [state.layers for state in states] == [slice(*pair) for pair in pairwise(bounds)]
    inputs = inputs_in_the_runtime(tiny, ids, paths)
    for state in states:
        wanted = inputs[:, :, max(state.layers.start - 1, 0)]
        np.testing.assert_allclose(state.hidden[:, PROMPT:].numpy(), wanted, atol=1e-3)


def inputs_in_the_runtime(case: Case, ids: torch.Tensor, paths: torch.Tensor) -> np.ndarray:
    """Input of each layer for each decoded token, `[B, T - prompt, L, D]`."""
    rows = []
    for tokens, path in zip(ids.numpy(), paths.tolist(), strict=True):
        sequence = case.model.new_sequence()
        sequence.prefill(tokens[:PROMPT], ("full",) * LAYERS, "int8")
        for position in range(PROMPT, LENGTH):
            sequence.advance(1)
            sequence.embed(int(tokens[position]))
            for layer, action in enumerate(path[position]):
                rows.append(sequence.hidden[layer % 2].array[0, 0].copy())
                sequence.run(layer, case.actions[action])
    return np.stack(rows).reshape(len(ids), LENGTH - PROMPT, LAYERS, -1)


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
    weights = one_hot(random_choice(case, ids, 5), case)
    with torch.no_grad():
        sparse = case.env.run(ids, recorded(weights))
        dense = case.env.run(ids, recorded(weights), dense=True)
    torch.testing.assert_close(dense.final, sparse.final, atol=1e-4, rtol=1e-4)
    assert torch.equal(dense.paths, sparse.paths)


def test_weights_carry_a_gradient_in_dense_mode_but_not_those_of_the_prompt(case: Case) -> None:
    ids = random_ids()
    weights = one_hot(random_choice(case, ids), case).requires_grad_()
    final = case.env.run(ids, recorded(weights), dense=True).final
    reference = case.env.reference(ids, case.actions[0])
    case.env.kl(reference, final)[:, PROMPT:].mean().backward()
    assert weights.grad is not None
    assert torch.isfinite(weights.grad).all()
    assert (weights.grad[:, :PROMPT] == 0).all()
    assert (weights.grad[:, PROMPT:].abs().amax((0, 1)) > 0).all()  # every layer and action


def test_the_gradient_of_the_weights_is_the_slope_of_the_kl(tiny: Case) -> None:
    """At the path of the first action, whose Jacobian is exact."""
    ids = random_ids(1)
    base = torch.zeros((1, LENGTH, LAYERS), dtype=torch.int64)
    weights = one_hot(base, tiny).requires_grad_()
    wanted = tiny.env.reference(ids, "int4")  # any other distribution

    def loss(values: torch.Tensor) -> torch.Tensor:
        final = tiny.env.run(ids, recorded(values), dense=True).final
        return tiny.env.kl(wanted, final)[:, PROMPT:].double().sum()

    (gradient,) = torch.autograd.grad(loss(weights), weights)
    step = 0.02
    for layer in range(LAYERS):
        for action in (1, 2, 3):
            direction = torch.zeros_like(gradient)
            direction[:, PROMPT:, layer, action] = 1.0
            direction[:, PROMPT:, layer, 0] = -1.0
            with torch.no_grad():
                up = loss(weights.detach() + step * direction)
                down = loss(weights.detach() - step * direction)
            slope = float(up - down) / (2 * step)
            found = float((gradient * direction).sum())
            assert found == pytest.approx(slope, rel=0.03, abs=2e-3), (layer, action)


# KL through the LM head


def plain_kl(
    env: Environment, reference: torch.Tensor, final: torch.Tensor, head: Action
) -> torch.Tensor:
    p = env.frozen.logits(reference).log_softmax(-1)
    q = env.frozen.logits(final, head).log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("head", [None, "int8", "int4"])
@pytest.mark.parametrize("shape", [(2, 50), (1, 64), (3, 1), (7,)])
def test_the_kl_and_its_gradient_are_those_of_a_plain_computation(
    tiny: Case, head: Action | None, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(*shape, 64, generator=generator)
    final = reference + 0.3 * torch.randn(*shape, 64, generator=generator)
    final.requires_grad_()
    weight = torch.rand(shape, generator=generator)
    ours = tiny.env.kl(reference, final, head)
    wanted = plain_kl(tiny.env, reference, final, head or tiny.env.frozen.head)
    assert ours.shape == shape
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    (got,) = torch.autograd.grad((ours * weight).sum(), final)
    (exact,) = torch.autograd.grad((wanted * weight).sum(), final)
    torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-3)


def test_the_kl_of_the_reference_itself_is_nothing_and_no_kl_is_negative(tiny: Case) -> None:
    ids = random_ids()
    reference = tiny.env.reference(ids, "full")
    assert tiny.env.kl(reference, reference).abs().max() < 1e-6
    assert (tiny.env.kl(reference, tiny.env.reference(ids, "int4"))[:, PROMPT:] > 0).all()


def test_the_mean_kl_with_each_head_is_that_of_the_decided_tokens(tiny: Case) -> None:
    ids, heads = random_ids(), list(tiny.env.frozen.heads)
    reference, final = tiny.env.reference(ids, "full"), tiny.env.reference(ids, "int4")
    wanted = [float(tiny.env.kl(reference, final, head)[:, PROMPT:].mean()) for head in heads]
    assert len(set(wanted)) == len(heads) > 1
    assert tiny.env.mean_kl(reference, final, heads) == pytest.approx(wanted, rel=1e-5)


# The model writes its own training text


def test_the_cached_attention_of_sampling_is_the_attention_of_the_process(tiny: Case) -> None:
    frozen, ids = tiny.env.frozen, random_ids(2, 12)
    tables = frozen.rotary(12)
    caches = [frozen.new_cache(2, 12) for _ in range(LAYERS)]
    wanted = tiny.env.reference(ids, "full")
    for position in range(12):
        x = frozen.embed(ids[:, position : position + 1])
        now = slice(position, position + 1)
        rotary = [(cos[now], sin[now]) for cos, sin in tables]
        for layer, cache in enumerate(caches):
            normed = frozen.normed(layer, x)
            queries, keys_values = frozen.split(layer, frozen.qkv(layer, "full", normed))
            attention = frozen.attend_cached(layer, queries, keys_values, rotary, cache, position)
            x = frozen.complete(layer, "full", x, attention)
        torch.testing.assert_close(frozen.final(x)[:, 0], wanted[:, position], atol=1e-4, rtol=1e-4)
