"""Teacher-forced decoding with a bundle's layers on any paths, vectorised over tokens.

As a decision process: tokens are episodes, layers are steps. The state of a decision is the input
of the layer before its segment (what the runtime knows while that layer runs), the action is what a
layer does for the token, its cost is in profiled milliseconds, and the reward at the end is
-KL(reference || path) of the token.

One pass equals decoding token by token: the keys and values of every token are those that its own
actions wrote, so later tokens attend to the results of earlier decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch.utils.checkpoint import checkpoint

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.core.progress import Loop
from dash_onnx.exporters.train.dequantized import Beside, DequantizedModel, Tensor

_SEQUENCES = 4  # sequences per pass without a gradient


@dataclass(frozen=True)
class State:
    """What the decisions for a segment of layers may depend on.

    Attributes:
        layers: the segment, n layers from layer i on.
        hidden: `[B, T, D]`, input of layer i-1 (of layer 0 itself for i = 0).
    """

    layers: slice
    hidden: Tensor


Decide: TypeAlias = Callable[[State], Tensor]
"""Maps the state of a segment to its decisions, `[B, T, n, A]`: one-hot over the actions."""


@dataclass(frozen=True)
class Rollout:
    """The result of one pass over `[B, T]` tokens.

    Attributes:
        final: input of the LM head, `[B, T, D]`.
        states: state of each segment.
        decisions: decisions of each segment `[B, T, n, A]`, those for the prompt as executed.
    """

    final: Tensor
    states: list[State]
    decisions: list[Tensor]

    @property
    def paths(self) -> Tensor:
        """Action indices `[B, T, L]`."""
        return torch.cat(self.decisions, 2).argmax(-1)


class Environment:
    """Runs sequences on the decided paths.

    Attributes:
        model: the model whose layers run.
        actions: meaning of the indices of decisions, most expensive first, `skip` last.
        prompt_tokens: first tokens of each sequence; they run at the most expensive action.
        layers: number of layers L.
        segments: ranges of layers that are decided at once.
    """

    def __init__(
        self,
        model: DequantizedModel,
        actions: tuple[Action, ...],
        prompt_tokens: int,
        decision_points: tuple[int, ...],
    ):
        """Each decision point begins a segment."""
        self.model, self.actions, self.prompt_tokens = model, actions, prompt_tokens
        self.layers = model.manifest.model.num_layers
        self.segments = [slice(*pair) for pair in pairwise((0, *decision_points, self.layers))]

    def run(self, ids: Tensor, decide: Decide, dense: bool = False) -> Rollout:
        """Runs one pass.

        Args:
            ids: `[B, T]`.
            decide: called once per segment, in order.
            dense: compute every action for every token, so that there is a gradient with respect to
                the decisions; else each token runs only its own action.
        """
        beside = self.model.embedding.beside(ids)
        x = before = self.model.embedding(ids)
        states, all_decisions = [], []
        step = self._dense if dense else self._sparse
        for layers in self.segments:
            states.append(State(layers, before.detach()))
            decisions = decide(states[-1])
            prompt = torch.zeros_like(decisions[:, : self.prompt_tokens])
            prompt[..., 0] = 1.0
            decisions = torch.cat([prompt, decisions[:, self.prompt_tokens :]], 1)
            if dense:
                decisions.requires_grad_()
            all_decisions.append(decisions)
            for number, layer in enumerate(range(layers.start, layers.stop)):
                before, x = x, step(layer, x, decisions[:, :, number], beside)
        return Rollout(self.model.final(x), states, all_decisions)

    def parts(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Splits sequences into parts for passes without a gradient.

        Small parts stay in the CPU's caches; if each pass dequantizes the layers, fewer passes are
        faster.
        """
        return ids.split(_SEQUENCES if self.model.keeps_layers else 4 * _SEQUENCES)

    def run_path(self, ids: Tensor, path: Sequence[int]) -> Tensor:
        """Input of the LM head `[B, T, D]` if all tokens take the same path, without gradient.

        Args:
            ids: `[B, T]`.
            path: action index of each layer.
        """
        one_hot = torch.nn.functional.one_hot(torch.tensor(path), len(self.actions)).float()

        def decide(state: State) -> Tensor:
            return one_hot[state.layers].expand(*state.hidden.shape[:2], -1, -1)

        with torch.no_grad():
            return torch.cat([self.run(part, decide).final for part in self.parts(ids)])

    def reference(self, ids: Tensor) -> Tensor:
        """`run_path` with every layer at the most expensive action."""
        return self.run_path(ids, (0,) * self.layers)

    def _sparse(self, layer: int, x: Tensor, decisions: Tensor, beside: Beside) -> Tensor:
        model, normed = self.model, self.model.normed(layer, x)
        choice = decisions.argmax(-1)  # [B, T]
        chosen = {
            action: rows
            for index, action in enumerate(self.actions)
            if (rows := choice == index).any()
        }
        queries = keys_values = output = x.new_empty(0)
        for action, rows in chosen.items():
            if action == SKIP:
                y, kv = model.skip(layer, x[rows], normed[rows])
                output = _put(output, rows, y)
            else:
                q, kv = model.qkv(layer, action, normed[rows])
                queries = _put(queries, rows, q)
            keys_values = _put(keys_values, rows, kv)
        chosen.pop(SKIP, None)
        if chosen:
            attention = model.attend(layer, queries, keys_values, beside)
            for action, rows in chosen.items():
                y = model.complete(layer, action, x[rows], attention[rows])
                output = _put(output, rows, y)
        return output

    def _dense(self, layer: int, x: Tensor, decisions: Tensor, beside: Beside) -> Tensor:
        total = x.new_zeros(())
        for index, output in enumerate(self.outputs(layer, x, decisions, beside)):
            total = total + decisions[..., index : index + 1] * output
        return total

    def outputs(self, layer: int, x: Tensor, decisions: Tensor, beside: Beside) -> list[Tensor]:
        """Output `[B, T, D]` of every action, over the K/V that the decisions select.

        The first action carries the gradient of all precisions: their Jacobians differ only
        by the rounding of the weights, so the others are added as constant differences.

        Args:
            layer: layer index.
            x: its input, `[B, T, D]`.
            decisions: `[B, T, A]`.
            beside: what layers read in addition to it.
        """
        model, (base, *others) = self.model, self.actions[:-1]
        keys_values: list[Tensor] = []  # these are constants: the first run computes them
        differences: list[Tensor] = []

        def run(x: Tensor, decisions: Tensor) -> tuple[Tensor, Tensor]:
            known, normed = bool(differences), model.normed(layer, x)
            query, kv = model.qkv(layer, base, normed)
            skipped, kv_skipped = model.skip(layer, x, normed)
            queries: list[Tensor] = []
            if not known:
                with torch.no_grad():
                    for action in others:
                        projected = model.qkv(layer, action, normed)
                        queries.append(projected[0])
                        keys_values.append(projected[1])
            mixed = kv
            for index, other in enumerate([*keys_values, kv_skipped.detach()], 1):
                mixed = mixed + decisions[..., index, None] * (other - kv.detach())
            y = model.complete(layer, base, x, model.attend(layer, query, mixed, beside))
            if not known:
                with torch.no_grad():
                    for action, q in zip(others, queries, strict=True):
                        attention = model.attend(layer, q, mixed, beside)
                        differences.append(model.complete(layer, action, x, attention) - y)
            return y, skipped

        if model.keeps_layers or not torch.is_grad_enabled():
            y, skipped = run(x, decisions)
        else:  # the backward pass runs it again: no weights or activations are kept until then
            y, skipped = checkpoint(
                run, x, decisions, use_reentrant=False, preserve_rng_state=False
            )
        return [y, *(difference + y for difference in differences), skipped]

    def kl(self, reference: Tensor, final: Tensor) -> Tensor:
        """KL(reference || path) in nats of each token, `[...]`, with the LM head of mixed paths.

        Args:
            reference: input of the LM head, `[..., D]`.
            final: input of the LM head on the path, `[..., D]`.
        """
        result: Tensor = _HeadKL.apply(final.flatten(0, -2), reference.flatten(0, -2), self.model)
        return result.view(final.shape[:-1])

    @torch.no_grad()
    def mean_kl(
        self,
        reference: Tensor,
        finals: Sequence[Tensor],
        heads: Sequence[Action],
        label: str | None = None,
    ) -> list[list[float]]:
        """Mean KL(reference || path) of the decided tokens in nats, for each path and LM head.

        Args:
            reference: input of the LM head, `[B, T, D]`.
            finals: input of the LM head on each path, `[B, T, D]`.
            heads: precisions of the LM heads.
            label: progress label, if it takes long enough to show progress.
        """
        totals = torch.zeros(len(finals), len(heads), dtype=torch.float64)
        theirs, *ours = (x[:, self.prompt_tokens :].flatten(0, 1) for x in (reference, *finals))
        parts = torch.arange(len(theirs)).split(self.model.chunk)
        for rows in Loop(label, parts) if label else parts:
            p = self.model.logits(theirs[rows]).float().log_softmax(-1)
            for path, final in enumerate(ours):
                for number, head in enumerate(heads):
                    q = self.model.logits(final[rows], head).float().log_softmax(-1)
                    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True)
                    totals[path, number] += kl.sum(-1).sum(dtype=torch.float64)
        return [[float(x) / len(theirs) for x in row] for row in totals]


class _HeadKL(torch.autograd.Function):
    """KL through the LM head without keeping logits `[tokens, V]` for the backward pass."""

    @staticmethod
    def forward(ctx: Any, final: Tensor, reference: Tensor, model: DequantizedModel) -> Tensor:
        kl, gradients = [], []
        needs = ctx.needs_input_grad[0]
        parts = (x.split(model.chunk) for x in (final, reference))
        for ours, theirs in zip(*parts, strict=True):
            p = model.logits(theirs).float().log_softmax(-1)
            logits = model.logits(ours).float()
            q = logits.log_softmax(-1)
            difference = p - q
            p.exp_()
            kl.append((p * difference).sum(-1))  # autocast would round a dot product to BF16
            if needs:  # of KL with respect to the logits: q - p
                weight = model.lm_head(model.head).weight
                slope = (q.exp_() - p) * model.logits_slope(logits)
                gradients.append(slope.to(weight.dtype) @ weight)
        if needs:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(kl)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None], None, None


def _put(target: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
    """Writes rows `[n, N]` where `chosen` `[B, T]` is true; allocates on first use."""
    if target.numel() == 0:
        target = rows.new_zeros(*chosen.shape, rows.shape[-1])
    target[chosen] = rows
    return target
