"""The second phase, on-policy: random decisions, and a gradient through them."""

from __future__ import annotations

import math
from typing import Any

import torch
from tqdm import tqdm

from dash_onnx.exporters.train.environment import Decide, Rollout, State
from dash_onnx.exporters.train.frozen import Tensor
from dash_onnx.exporters.train.learning import BATCH, Learning
from dash_onnx.exporters.train.scorer import Scorer

_TEMPERATURE = (0.4, 0.2)  # of the noise, from first to last step
_RATE = 2e-3  # learning rate of the scorer
_COMPENSATION_RATE = 1e-3
_SAVE_EVERY = 20  # steps
_LEAST = 1e-8  # nats; a log of nothing
_NEVER = -100.0  # logit of a forbidden action: no noise reaches it


def improve(run: Learning) -> None:
    """The scorer decides, and learns from the KL of what it decided."""
    steps, state = run.effort.steps, run.checkpoint.state
    run.scorer.load_state_dict(state["scorer"])
    compensation = run.frozen.compensation()
    saved = state.get("compensation", compensation)
    for weight, before in zip(compensation, saved, strict=True):
        weight.data.copy_(before)
    groups: list[dict[str, Any]] = [{"params": list(run.scorer.parameters()), "rate": _RATE}]
    if compensation:
        groups.append({"params": compensation, "rate": _COMPENSATION_RATE})
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(parameter is not run.scorer.normalise.weight)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    first = state.get("step", 0)
    run.generator.set_state(state["generator"])
    if first:
        optimizer.load_state_dict(state["optimizer"])
        run.history = [tuple(row) for row in state["history"].tolist()]
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="policy", disable=None)
    for step in bar:
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min((step + 1) / 5, _cosine(done))
        hot, cold = _TEMPERATURE
        figures = _step(run, optimizer, step, hot * (cold / hot) ** done)
        run.history.append(figures)
        bar.set_postfix(loss=f"{figures[0]:.3f}", kl=f"{figures[1]:.3f}")
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            run.checkpoint.save(
                scorer=run.scorer.state_dict(),
                compensation=[weight.detach() for weight in compensation],
                optimizer=optimizer.state_dict(),
                generator=run.generator.get_state(),
                history=torch.tensor(run.history),
                step=step + 1,
            )


def _cosine(done: float) -> float:
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _step(
    run: Learning, optimizer: torch.optim.Optimizer, step: int, temperature: float
) -> tuple[float, float, float]:
    batch, prices = run.batch(step), run.log_prices(BATCH)
    with run.autocast():
        reference = run.reference(step)
        decide = straight_through(run.scorer, run.costs, prices, temperature, run.generator)
        rollout = run.env.run(batch, decide, dense=True)
        loss, kl, cost = _loss(run, rollout, reference, prices)
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    return float(loss.detach()), float(kl.detach()), float(cost.detach())


def _loss(
    run: Learning, rollout: Rollout, reference: Tensor, log_prices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over decided tokens of (KL + price * cost) / sqrt(price); mean KL; mean cost."""
    kl = run.env.kl(reference, rollout.final)
    cost = (rollout.weights * run.costs.nan_to_num(posinf=0.0)).sum((-1, -2))
    seen = slice(run.env.prompt_tokens, None)
    total = (kl + log_prices.exp() * cost) / (log_prices / 2).exp()
    return total[:, seen].mean(), kl[:, seen].mean(), cost[:, seen].mean()


def straight_through(
    scorer: Scorer,
    costs: Tensor,
    log_price: Tensor,
    temperature: float,
    generator: torch.Generator,
) -> Decide:
    """Random decisions, one-hot in value, with the gradient of their probabilities.

    The argmin of value + price * cost, every step between neighbouring actions multiplied by
    random noise. It is taken from the cheap end: going one action cheaper is worth the price of
    the time it saves, plus what going further would gain from there. The logit of each such
    choice is the log of worth over value, so noise and gradient act on the scale of the values,
    which differ by orders of magnitude between tokens.

    Args:
        scorer: in training.
        costs: `[L, A]`, in any unit, from dear to cheap, infinite where forbidden.
        log_price: log nats per unit of cost, broadcastable to `[B, T]`.
        temperature: scale of the logistic noise on log values.
        generator: of the noise.
    """

    def decide(state: State) -> Tensor:
        steps = scorer.log_steps(state, log_price)  # [B, T, A-1]
        uniform = torch.rand(steps.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        noise = torch.logit(uniform)
        row = costs[state.layer]
        saved = log_price.exp()[..., None] * (row[:-1] - row[1:])  # [B, 1, A-1] nats
        beyond = torch.zeros_like(steps[..., 0])
        go: list[Tensor] = []
        for step in reversed(range(steps.shape[-1])):
            worth = saved[..., step] + beyond
            logit = (worth.clamp(min=_LEAST).log() - steps[..., step]) / temperature
            logit = torch.where(saved[..., step].isfinite(), logit, _NEVER)
            go.append(_drawn(logit, noise[..., step]))
            noisy = steps[..., step] + temperature * noise[..., step]
            beyond = (worth - noisy.exp()).clamp(min=0).detach()
        # Weight of action k: went down k times, and not once more.
        reached = torch.ones_like(beyond)
        weights = []
        for down in reversed(go):
            weights.append(reached * (1 - down))
            reached = reached * down
        return torch.stack([*weights, reached], -1)

    return decide


def _drawn(logit: Tensor, noise: Tensor) -> Tensor:
    """A Bernoulli draw, with a gradient that is exact where the loss is quadratic in it.

    The plain straight-through gradient takes the slope of the loss at what was drawn, and the KL
    has none where nothing was skipped yet: it finds the first skip free. ReinMax (Liu et al.
    2023, arXiv 2304.08612) weighs the slopes at both ends alike.
    """
    with torch.no_grad():
        p = torch.sigmoid(logit)
        drawn = (logit > noise).float()
        weight = torch.where(drawn > 0, 1 - p, p) / 2
    return drawn + weight * (logit - logit.detach())
