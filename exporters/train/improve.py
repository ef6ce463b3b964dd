"""On-policy improvement: random decisions, and what each alternative would have changed.

The second phase. A pass runs a batch on decisions drawn by the scorer, and credits every action of
every layer with the KL that it would have added instead of the action drawn (counterfactual
credit). With s and f `[A]` the gradients of the KL of all tokens, and of a Fisher sample
(`values.py`), with respect to one decision, action a in place of c adds, to second order,

    s[a] - s[c] + (f[a] - f[c])^2 / 2.

The scorer then learns to expect less of (KL + multiplier * cost) / sqrt(multiplier): the Lagrangian
of KL under a bounded cost, scaled so that small and large multipliers weigh alike. The compensation
of skipped layers learns from the same passes.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch

from dash_onnx.core.progress import Loop
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.environment import Decide, State
from dash_onnx.exporters.train.scorer import Scorer
from dash_onnx.exporters.train.trainer import Trainer
from dash_onnx.exporters.train.values import MAX_NATS, fisher_sample

_TEMPERATURE = (0.4, 0.2)  # temperature of the decisions, at the first and last step
_REMEMBERED = 12  # past passes that the scorer keeps learning from
_UPDATES, _TOKENS = 8, 512  # scorer updates after each pass, and decided tokens in each
_MIN_NATS = 1e-8  # nats; avoids log(0)
_NEVER = -100.0  # logit of a forbidden action

Experience: TypeAlias = dict[str, Tensor]
"""Data from a pass over n decided tokens: `log_multiplier` `[n]`; for the decision point at layer
K, `hidden.K` `[n, D]`; `credit` `[n, L, A]`, nats that each other action would add."""


def improve(trainer: Trainer) -> None:
    """Continues from the value regression, or from where an earlier run of this phase was saved."""
    plan, state, compensation = trainer.plan, trainer.checkpoint.state, trainer.compensation
    trainer.scorer.load_state_dict(state["scorer"])
    trainer.generator.set_state(state["generator"].cpu())
    first, memory = state.get("step", 0), list(state.get("memory", []))
    for weight, saved in zip(compensation, state.get("compensation", compensation), strict=True):
        weight.data.copy_(saved)
    learned: list[list[Tensor]] = [list(trainer.scorer.parameters()), compensation]
    optimizers = [torch.optim.Adam(weights, betas=(0.9, 0.98)) for weights in learned if weights]
    if first:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        trainer.history = [tuple(row) for row in state["history"].tolist()]
    steps = plan.improvement_steps
    bar = Loop("policy", range(first, steps), done=first)
    for step in bar:
        done = step / steps
        for optimizer in optimizers:
            rate = plan.learning_rate * min((step + 1) / 5, _cosine(done))
            optimizer.param_groups[0]["lr"] = rate
        hot, cold = _TEMPERATURE
        temperature = hot * (cold / hot) ** done
        log_multipliers = trainer.log_multipliers(plan.batch)
        decide = drawing(trainer, log_multipliers, temperature)
        experience, gradients, figures = explore(trainer, step, log_multipliers, decide)
        memory = [*memory, experience][-_REMEMBERED:]
        _learn(trainer, optimizers[0], memory, temperature)
        for weight, gradient in zip(compensation, gradients, strict=True):
            weight.grad = gradient
        if compensation:
            clipped_step(optimizers[1])
        trainer.history.append(figures)
        bar.set_postfix(loss=f"{figures[0]:.3f}", kl=f"{figures[1]:.3f}")
        if (step + 1) % plan.save_every == 0 or step + 1 == steps or trainer.checkpoint.due:
            trainer.checkpoint.save(
                scorer=trainer.scorer.state_dict(),
                compensation=[weight.detach() for weight in compensation],
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                generator=trainer.generator.get_state(),
                memory=memory,
                history=torch.tensor(trainer.history),
                step=step + 1,
            )


def _cosine(done: float) -> float:
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def clipped_step(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer step with the gradient norm clipped to 1."""
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def drawing(trainer: Trainer, log_multipliers: Tensor, temperature: float) -> Decide:
    """Decisions drawn with the scorer's probabilities.

    Args:
        trainer: provides the scorer and the generator.
        log_multipliers: log multiplier of each sequence, `[B, 1]`.
        temperature: see `probabilities`.
    """

    @torch.no_grad()
    def decide(state: State) -> Tensor:
        p = probabilities(trainer.scorer, trainer.costs, state, log_multipliers, temperature)
        drawn = torch.rand(p.shape[:-1], generator=trainer.generator)[..., None]
        index = (drawn >= p.cumsum(-1)).sum(-1).clamp(max=p.shape[-1] - 1)
        return torch.nn.functional.one_hot(index, p.shape[-1]).float()

    return decide


def explore(
    trainer: Trainer, number: int, log_multipliers: Tensor, decide: Decide
) -> tuple[Experience, list[Tensor], tuple[float, float, float]]:
    """Runs a batch and credits every action with the change it would have made.

    Args:
        trainer: provides the environment, and the generator for the Fisher samples.
        number: number of the pass, which determines the batch.
        log_multipliers: log multiplier of each sequence, `[B, 1]`.
        decide: decides the action of each token and layer.

    Returns:
        The experience; the gradients of the compensation; the mean over decided tokens of
        (KL + multiplier * cost) / sqrt(multiplier), of the KL in nats, and of the cost.
    """
    env, decided = trainer.env, slice(trainer.env.prompt_tokens, None)
    with trainer.autocast():
        reference = trainer.reference(number)
        rollout = env.run(trainer.batch(number), decide, dense=True)
        kl = env.kl(reference, rollout.final)[:, decided]  # [B, T']
        scale = (-log_multipliers / 2).exp()  # [B, 1]
        fisher = fisher_sample(env, rollout.final, trainer.generator)
    decisions, count = rollout.decisions, kl.numel()
    inputs = [*decisions, *trainer.compensation]
    slopes = torch.autograd.grad((kl * scale).sum() / count, inputs, retain_graph=True)
    effects = torch.autograd.grad(fisher, decisions)
    credit = []
    for taken, slope, effect in zip(decisions, slopes, effects, strict=False):
        taken = taken.detach()
        slope = slope * count / scale[..., None, None]  # gradient of the KL of all tokens, in nats
        slope, effect = (x - (x * taken).sum(-1, keepdim=True) for x in (slope, effect))
        added = (slope + effect.square() / 2).clamp(-MAX_NATS, MAX_NATS)
        credit.append(added[:, decided].flatten(0, 1))
    cost = trainer.cost(torch.cat(decisions, 2).detach())[:, decided]
    kl = kl.detach()
    lagrangian = ((kl + log_multipliers.exp() * cost) * scale).mean()
    experience = {
        "log_multiplier": log_multipliers.expand(-1, kl.shape[1]).flatten(),
        "credit": torch.cat(credit, 1).float(),
    }
    for state in rollout.states[1:]:
        hidden = state.hidden[:, decided].flatten(0, 1).to(trainer.dtype)
        experience[f"hidden.{state.layers.start}"] = hidden
    figures = float(lagrangian), float(kl.mean()), float(cost.mean())
    return experience, list(slopes[len(decisions) :]), figures


def _learn(
    trainer: Trainer,
    optimizer: torch.optim.Optimizer,
    memory: list[Experience],
    temperature: float,
) -> None:
    """Moves the probabilities towards the actions that would have lost less."""
    everything = {name: torch.cat([one[name] for one in memory]) for name in memory[0]}
    tokens = len(everything["log_multiplier"])
    costs = trainer.costs.nan_to_num(posinf=0.0)
    for _ in range(_UPDATES):
        rows = torch.randint(tokens, (_TOKENS,), generator=trainer.generator)
        log_multiplier = everything["log_multiplier"][rows]
        credit = everything["credit"][rows]  # [n, L, A]
        totals = credit + log_multiplier.exp()[:, None, None] * costs
        loss = torch.zeros(())
        for layers in trainer.env.segments:
            nothing = credit[:, :0, 0]  # the first segment does not depend on the token
            hidden = everything[f"hidden.{layers.start}"][rows].float() if layers.start else nothing
            state = State(layers, hidden)
            p = probabilities(trainer.scorer, trainer.costs, state, log_multiplier, temperature)
            expected = (p * totals[:, layers]).sum((-1, -2))
            loss = loss + (expected * (-log_multiplier / 2).exp()).mean()
        optimizer.zero_grad()
        loss.backward()
        clipped_step(optimizer)


def probabilities(
    scorer: Scorer, costs: Tensor, state: State, log_multiplier: Tensor, temperature: float
) -> Tensor:
    """Probability of each action, `[..., n, A]`: the runtime's decision, smoothed.

    The argmin of value + multiplier * cost, computed from the cheap end: the gain of going one
    action cheaper is the time saved, times the multiplier, plus the gain of going further. The
    logit of each such choice is the log of gain over increment, so that it adapts to the scale of
    the values, which differ by orders of magnitude between tokens.

    Args:
        scorer: the scorer in training.
        costs: `[L, A]`, in any unit, most expensive first, infinite where forbidden.
        state: state of the decisions for n layers.
        log_multiplier: log nats per unit of cost, broadcastable to the tokens.
        temperature: scale of the equivalent logistic noise on log values.
    """
    log_increments = scorer.log_increments(state)  # [..., n, A-1]
    saved = -costs[state.layers].diff(dim=-1) * log_multiplier.exp()[..., None, None]  # nats
    beyond = torch.zeros_like(log_increments[..., 0])
    cheaper: list[Tensor] = []  # probability of continuing at each action, from the cheap end
    for step in reversed(range(log_increments.shape[-1])):
        worth = saved[..., step] + beyond
        logit = (worth.clamp(min=_MIN_NATS).log() - log_increments[..., step]) / temperature
        cheaper.append(torch.sigmoid(torch.where(saved[..., step].isfinite(), logit, _NEVER)))
        beyond = (worth - log_increments[..., step].exp()).clamp(min=0).detach()
    reached = torch.ones_like(beyond)
    result = []
    for further in reversed(cheaper):
        result.append(reached * (1 - further))
        reached = reached * further
    return torch.stack([*result, reached], -1)
