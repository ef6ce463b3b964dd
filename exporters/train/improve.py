"""The second phase, on-policy: random decisions, and what each would have changed."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from dash_onnx.exporters.train.environment import State
from dash_onnx.exporters.train.frozen import Tensor
from dash_onnx.exporters.train.learning import BATCH, Learning
from dash_onnx.exporters.train.scorer import Scorer
from dash_onnx.exporters.train.values import random_direction

_TEMPERATURE = (0.4, 0.2)  # of the decisions, from first to last step
_RATE = 1e-3  # learning rate of the scorer
_COMPENSATION_RATE = 1e-3
_REMEMBERED = 12  # passes that the scorer goes on learning from
_UPDATES, _TOKENS = 8, 512  # of the scorer after each pass, and decided tokens in each
_SAVE_EVERY = 20  # steps
_LEAST = 1e-8  # nats; a log of nothing
_NEVER = -100.0  # logit of a forbidden action

Experience: TypeAlias = dict[str, Tensor]
"""What a pass over n decided tokens taught: `log_multiplier` `[n]`; for the decision point at
layer K `hidden.K` `[n, D]`; `changes` `[n, L, A]`, nats that another action would add."""


def improve(run: Learning) -> None:
    """The scorer decides, and learns from what other decisions would have changed."""
    steps, state = run.effort.steps, run.checkpoint.state
    run.scorer.load_state_dict(state["scorer"])
    compensation = run.frozen.compensation()
    saved = state.get("compensation", compensation)
    for weight, before in zip(compensation, saved, strict=True):
        weight.data.copy_(before)
        weight.requires_grad_()
    for parameter in run.scorer.parameters():
        parameter.requires_grad_(parameter is not run.scorer.normalise.weight)
    groups: list[dict[str, Any]] = [{"params": list(run.scorer.parameters()), "rate": _RATE}]
    if compensation:
        groups.append({"params": compensation, "rate": _COMPENSATION_RATE})
    optimizers = [torch.optim.Adam([group], betas=(0.9, 0.98)) for group in groups]
    first = state.get("step", 0)
    run.generator.set_state(state["generator"])
    memory: list[Experience] = list(state.get("memory", []))
    if first:
        for optimizer, before in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(before)
        run.history = [tuple(row) for row in state["history"].tolist()]
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="policy", disable=None)
    for step in bar:
        done = step / steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * min((step + 1) / 5, _cosine(done))
        hot, cold = _TEMPERATURE
        temperature = hot * (cold / hot) ** done
        experience, gradients, figures = _pass(run, compensation, step, temperature)
        memory = [*memory, experience][-_REMEMBERED:]
        _learn(run, optimizers[0], memory, temperature)
        if compensation:
            for weight, gradient in zip(compensation, gradients, strict=True):
                weight.grad = gradient
            _clipped_step(optimizers[1])
        run.history.append(figures)
        bar.set_postfix(loss=f"{figures[0]:.3f}", kl=f"{figures[1]:.3f}")
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            run.checkpoint.save(
                scorer=run.scorer.state_dict(),
                compensation=[weight.detach() for weight in compensation],
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                generator=run.generator.get_state(),
                memory=memory,
                history=torch.tensor(run.history),
                step=step + 1,
            )


def _cosine(done: float) -> float:
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _clipped_step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def _pass(
    run: Learning, compensation: list[Tensor], step: int, temperature: float
) -> tuple[Experience, list[Tensor], tuple[float, float, float]]:
    """Runs a batch on random decisions.

    Returns:
        What it taught; the gradients of the compensation; the mean over decided tokens of
        (KL + multiplier * cost) / sqrt(multiplier), of the KL in nats, and of the cost.
    """
    batch, log_multipliers = run.batch(step), run.log_multipliers(BATCH)
    seen = slice(run.env.prompt_tokens, None)
    drawing = _Drawing(run, log_multipliers, temperature)
    with run.autocast():
        reference = run.reference(step)
        rollout = run.env.run(batch, drawing, dense=True)
        kl = run.env.kl(reference, rollout.final)[:, seen]
        weight = (-log_multipliers / 2).exp()  # [B, 1]
        direction = random_direction(run.env, rollout.final, run.generator)
    count, leaves = kl.numel(), drawing.weights
    slopes = torch.autograd.grad(
        (kl * weight).sum() / count, [*leaves, *compensation], retain_graph=True, allow_unused=True
    )
    effects = torch.autograd.grad(direction, leaves, allow_unused=True)
    changes = []
    for leaf, slope, effect in zip(leaves, slopes, effects, strict=False):
        assert slope is not None and effect is not None
        chosen = leaf.detach()
        slope = slope * count / weight[..., None, None]  # of the KL of all tokens, in nats
        slope = slope - (slope * chosen).sum(-1, keepdim=True)
        effect = effect - (effect * chosen).sum(-1, keepdim=True)
        # To second order: half the curvature is one more unbiased sample, as in `values.py`.
        changes.append((slope + effect.square() / 2)[:, seen].flatten(0, 1))
    cost = run.cost(rollout.weights.detach())[:, seen]
    kl = kl.detach()
    loss = ((kl + log_multipliers.exp() * cost) * weight).mean()
    experience = {
        "log_multiplier": log_multipliers.expand(-1, kl.shape[1]).flatten(),
        "changes": torch.cat(changes, 1).float(),
    }
    for state in drawing.states[1:]:
        hidden = state.hidden[:, seen].flatten(0, 1).to(run.dtype)
        experience[f"hidden.{state.layers.start}"] = hidden
    gradients = [g for g in slopes[len(leaves) :] if g is not None]
    return experience, gradients, (float(loss), float(kl.mean()), float(cost.mean()))


class _Drawing:
    """Draws decisions, and remembers them as leaves of the gradient.

    Attributes:
        states: of each segment.
        weights: one-hot decisions `[B, T, n, A]` of each segment.
    """

    def __init__(self, run: Learning, log_multipliers: Tensor, temperature: float):
        self._run, self._log_multipliers, self._temperature = run, log_multipliers, temperature
        self.states: list[State] = []
        self.weights: list[Tensor] = []

    def __call__(self, state: State) -> Tensor:
        run = self._run
        with torch.no_grad():
            p = chances(run.scorer, run.costs, state, self._log_multipliers, self._temperature)
            drawn = torch.rand(p.shape[:-1], generator=run.generator)[..., None]
            index = (drawn >= p.cumsum(-1)).sum(-1).clamp(max=p.shape[-1] - 1)
            weights = torch.nn.functional.one_hot(index, p.shape[-1]).float()
        self.states.append(state)
        self.weights.append(weights.requires_grad_())
        return weights


def _learn(
    run: Learning, optimizer: torch.optim.Optimizer, memory: list[Experience], temperature: float
) -> None:
    """Moves the chances towards the actions that would have lost less."""
    everything = {name: torch.cat([one[name] for one in memory]) for name in memory[0]}
    tokens = len(everything["log_multiplier"])
    costs = run.costs.nan_to_num(posinf=0.0)
    for _ in range(_UPDATES):
        rows = torch.randint(tokens, (_TOKENS,), generator=run.generator)
        log_multiplier = everything["log_multiplier"][rows]
        changes = everything["changes"][rows]  # [n, L, A]
        totals = changes + log_multiplier.exp()[:, None, None] * costs
        loss = torch.zeros(())
        for layers in run.env.segments:
            nothing = changes[:, :0, 0]  # the first segment sees no token
            hidden = everything[f"hidden.{layers.start}"][rows].float() if layers.start else nothing
            state = State(layers, hidden)
            p = chances(run.scorer, run.costs, state, log_multiplier, temperature)
            expected = (p * totals[:, layers]).sum((-1, -2))
            loss = loss + (expected * (-log_multiplier / 2).exp()).mean()
        optimizer.zero_grad()
        loss.backward()
        _clipped_step(optimizer)


def chances(
    scorer: Scorer, costs: Tensor, state: State, log_multiplier: Tensor, temperature: float
) -> Tensor:
    """Probability of each action, `[..., n, A]`: the decision of the runtime, made smooth.

    The argmin of value + multiplier * cost, taken from the cheap end: going one action cheaper is
    worth the time it saves, times the multiplier, plus what going further would gain. The logit of
    each such choice is the log of worth over value, so that it acts on the scale of the values,
    which differ by orders of magnitude between tokens.

    Args:
        scorer: in training.
        costs: `[L, A]`, in any unit, from dear to cheap, infinite where forbidden.
        state: of the decisions for n layers.
        log_multiplier: log nats per unit of cost, broadcastable to the tokens.
        temperature: scale of the logistic noise on log values that it stands for.
    """
    steps = scorer.log_steps(state)  # [..., n, A-1]
    rows = costs[state.layers]
    saved = log_multiplier.exp()[..., None, None] * (
        rows[:, :-1] - rows[:, 1:]
    )  # [..., n, A-1] nats
    beyond = torch.zeros_like(steps[..., 0])
    go: list[Tensor] = []
    for step in reversed(range(steps.shape[-1])):
        worth = saved[..., step] + beyond
        logit = (worth.clamp(min=_LEAST).log() - steps[..., step]) / temperature
        go.append(torch.sigmoid(torch.where(saved[..., step].isfinite(), logit, _NEVER)))
        beyond = (worth - steps[..., step].exp()).clamp(min=0).detach()
    # Action k: went down k times, and not once more.
    reached = torch.ones_like(beyond)
    result = []
    for down in reversed(go):
        result.append(reached * (1 - down))
        reached = reached * down
    return torch.stack([*result, reached], -1)
