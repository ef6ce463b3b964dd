"""The decision process: layers are steps, tokens are the vectorised episodes.

State of a step: the input of the layer before its segment (what the runtime knows while that layer
runs), the layer index, the multiplier. Action: what the layer does for this token. Cost: its
profiled milliseconds. Terminal reward: -KL(reference || path) of the token.

One teacher-forced pass runs any token-level paths as the runtime's decode would: keys and values
of every token are those its own action wrote, so later tokens attend to what earlier ones left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.exporters.train.frozen import Frozen, Rotary, Tensor


@dataclass(frozen=True)
class State:
    """What decisions may depend on.

    Attributes:
        layers: to decide for; a segment that begins at layer i.
        hidden: `[B, T, D]`, input of layer i-1 (of layer 0 itself for i = 0).
    """

    layers: slice
    hidden: Tensor


Decide: TypeAlias = Callable[[State], Tensor]
"""Weights `[B, T, n, A]` of the actions of n layers: one-hot in value, with or without gradient."""


@dataclass(frozen=True)
class Rollout:
    """What one pass over `[B, T]` tokens gave.

    Attributes:
        final: input of the LM head, `[B, T, D]`.
        weights: of the actions, `[B, T, L, A]`.
    """

    final: Tensor
    weights: Tensor

    @property
    def paths(self) -> Tensor:
        """Action indices `[B, T, L]`."""
        return self.weights.argmax(-1)


class Environment:
    """Vectorised teacher-forced episodes over a frozen model.

    Attributes:
        frozen: the model.
        actions: what the indices of decisions mean.
        prompt_tokens: first tokens of each sequence, which run at `prefill`.
        segments: of layers that are decided at once.
    """

    def __init__(
        self,
        frozen: Frozen,
        actions: tuple[Action, ...],
        prompt_tokens: int,
        prefill: Action,
        decision_points: tuple[int, ...],
    ):
        """The prompt is executed, not decided; each decision point begins a segment."""
        self.frozen = frozen
        self.actions = actions
        self.prompt_tokens = prompt_tokens
        self.layers = frozen.manifest.model.num_layers
        self.segments = [slice(*pair) for pair in pairwise((0, *decision_points, self.layers))]
        self._prefill = torch.zeros(len(actions))
        self._prefill[actions.index(prefill)] = 1.0

    def run(self, ids: Tensor, decide: Decide, dense: bool = False) -> Rollout:
        """One pass.

        Args:
            ids: `[B, T]`.
            decide: called once per segment, in order.
            dense: compute every action for every token, so that the weights have a gradient;
                otherwise each token runs its own action only.
        """
        frozen = self.frozen
        rotary = frozen.rotary(ids.shape[1])
        x = before = frozen.embed(ids)
        all_weights = []
        step = self._dense if dense else self._sparse
        for layers in self.segments:
            weights = decide(State(layers, before.detach()))
            prompt = self._prefill.expand_as(weights[:, : self.prompt_tokens])
            weights = torch.cat([prompt, weights[:, self.prompt_tokens :]], 1)
            for number, layer in enumerate(range(layers.start, layers.stop)):
                before = x
                x = step(layer, x, weights[:, :, number], rotary)
            all_weights.append(weights)
        return Rollout(frozen.final(x), torch.cat(all_weights, 2))

    def _sparse(self, layer: int, x: Tensor, weights: Tensor, rotary: Rotary) -> Tensor:
        frozen = self.frozen
        normed, choice = frozen.normed(layer, x), weights.argmax(-1)
        parts = [
            (action, chosen)
            for index, action in enumerate(self.actions)
            if (chosen := choice == index).any()
        ]
        queries = keys_values = output = x.new_empty(0)
        for action, chosen in parts:
            if action == SKIP:
                y, kv = frozen.skip(layer, x[chosen], normed[chosen])
                output = _put(output, chosen, y)
            else:
                q, kv = frozen.split(layer, frozen.qkv(layer, action, normed[chosen]))
                queries = _put(queries, chosen, q)
            keys_values = _put(keys_values, chosen, kv)
        running = [(action, chosen) for action, chosen in parts if action != SKIP]
        if running:
            attention = frozen.attend(layer, queries, keys_values, rotary)
            for action, chosen in running:
                y = frozen.complete(layer, action, x[chosen], attention[chosen])
                output = _put(output, chosen, y)
        return output

    def outputs(self, layer: int, x: Tensor, weights: Tensor, rotary: Rotary) -> list[Tensor]:
        """Output of every action, `[B, T, D]` each, over the K/V that `weights` select.

        The first action carries the gradient of all precisions: their Jacobians differ by the
        rounding of the weights only, so the others are added as constant differences.
        """
        frozen = self.frozen
        normed = frozen.normed(layer, x)
        base, *others = (action for action in self.actions if action != SKIP)
        q, kv = frozen.split(layer, frozen.qkv(layer, base, normed))
        queries: dict[Action, Tensor] = {}
        skipped, kv_skipped = frozen.skip(layer, x, normed)
        keys_values = {SKIP: kv_skipped.detach()}
        with torch.no_grad():
            for action in others:
                projected = frozen.qkv(layer, action, normed)
                queries[action], keys_values[action] = frozen.split(layer, projected)
        mixed = kv
        for action in self.actions[1:]:
            weight = weights[..., self.actions.index(action), None]
            mixed = mixed + weight * (keys_values[action] - kv.detach())
        y = frozen.complete(layer, base, x, frozen.attend(layer, q, mixed, rotary))
        result: dict[Action, Tensor] = {base: y, SKIP: skipped}
        with torch.no_grad():
            for action in others:
                attention = frozen.attend(layer, queries[action], mixed, rotary)
                result[action] = frozen.complete(layer, action, x, attention) - y
        for action in others:
            result[action] = result[action] + y
        return [result[action] for action in self.actions]

    def _dense(self, layer: int, x: Tensor, weights: Tensor, rotary: Rotary) -> Tensor:
        outputs = self.outputs(layer, x, weights, rotary)
        total = x.new_zeros(())
        for index, output in enumerate(outputs):
            total = total + weights[..., index : index + 1] * output
        return total

    def reference(self, ids: Tensor, action: Action) -> Tensor:
        """Input of the LM head with every layer at one action, `[B, T, D]`."""
        weights = torch.zeros(len(self.actions))
        weights[self.actions.index(action)] = 1.0
        with torch.no_grad():
            return torch.cat([self._uniform(part, weights) for part in ids.split(_SEQUENCES)])

    def _uniform(self, ids: Tensor, weights: Tensor) -> Tensor:
        every = weights.expand(*ids.shape, self.layers, -1)
        return self.run(ids, lambda state: every[:, :, state.layers]).final

    def kl(self, reference: Tensor, final: Tensor, head: Action | None = None) -> Tensor:
        """KL(reference || path) in nats of each token.

        Args:
            reference: input of the LM head, `[..., D]`.
            final: likewise of the path.
            head: the path's LM head; None takes the one of mixed paths, as the reference does.
        """
        result: Tensor = _HeadKL.apply(
            final.flatten(0, -2), reference.flatten(0, -2), self.frozen, head or self.frozen.head
        )
        return result.view(final.shape[:-1])

    def mean_kl(self, reference: Tensor, final: Tensor, heads: Sequence[Action]) -> list[float]:
        """Mean of `kl` over the decided tokens with each head, without gradient.

        Args:
            reference: input of the LM head, `[B, T, D]`.
            final: likewise of the path.
            heads: the path's.
        """
        totals = [0.0] * len(heads)
        theirs, ours = (x[:, self.prompt_tokens :].flatten(0, 1) for x in (reference, final))
        with torch.no_grad():
            for a, b in zip(theirs.split(_CHUNK), ours.split(_CHUNK), strict=True):
                log_p = self.frozen.logits(a).float().log_softmax(-1)
                p = log_p.exp()
                for number, head in enumerate(heads):
                    log_q = self.frozen.logits(b, head).float().log_softmax(-1)
                    totals[number] += float((p * (log_p - log_q)).sum())
        return [total / len(theirs) for total in totals]


class _HeadKL(torch.autograd.Function):
    """KL through the LM head without keeping `[tokens, V]` for the backward pass."""

    @staticmethod
    def forward(ctx: Any, final: Tensor, reference: Tensor, frozen: Frozen, head: Action) -> Tensor:
        kl, gradients = [], []
        needs = ctx.needs_input_grad[0]
        for ours, theirs in zip(final.split(_CHUNK), reference.split(_CHUNK), strict=True):
            p = frozen.logits(theirs).float().log_softmax(-1)
            logits = frozen.logits(ours, head).float()
            q = logits.log_softmax(-1)
            difference = p - q
            p.exp_()
            kl.append((p * difference).sum(-1))  # autocast would round a dot product to BF16
            if needs:  # of KL with respect to the logits: q - p
                weight = frozen.heads[head].weight
                slope = (q.exp_() - p) * frozen.logits_slope(logits)
                gradients.append(slope.to(weight.dtype) @ weight)
        if needs:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(kl)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None], None, None, None


_SEQUENCES = 4  # that a reference pass runs at once
_CHUNK = 64  # tokens whose logits exist at once: larger buffers cost page faults, twice as slow


def _put(target: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
    """Writes rows `[n, N]` where `chosen` `[B, T]` is true; allocates on first use."""
    if target.numel() == 0:
        target = rows.new_zeros(*chosen.shape, rows.shape[-1])
    target[chosen] = rows
    return target
