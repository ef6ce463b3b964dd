"""The bundle's layers in torch: what its graphs compute, differentiable, from the same weights.

The weights are read from the bundle and dequantized, not taken from the source model, so the policy
is trained on exactly the layers that it will choose between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.core.block import ATTENTIONS, Recurrence
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import head_path, layer_path
from dash_onnx.core.errors import BundleError
from dash_onnx.core.manifest import Manifest
from dash_onnx.exporters.device import kept_bytes
from dash_onnx.exporters.graphs.ends import EXACT_TOKENS, rescores
from dash_onnx.exporters.train.attention import attention, by_head, rotated
from dash_onnx.exporters.train.embedding import Beside, Embedding
from dash_onnx.exporters.train.experts import experts_of
from dash_onnx.exporters.train.recurrent import kept_of, mixed
from dash_onnx.exporters.train.stored import StoredLinear, norm_of, projections_of

Tensor: TypeAlias = torch.Tensor
F = torch.nn.functional


# The C library maps each block of over 32 MB afresh and the system clears its pages, a fifth of the
# time of passes with larger logits. With few tokens at once, the product is slow.
_LOGITS_BYTES = 30 << 20
_EXPAND = "expand_proj"

Projections: TypeAlias = dict[str, StoredLinear]
"""The linear layers of a decoder layer under one action, by name."""

_NORMS = (
    *("input_norm", "q_norm", "k_norm", "v_norm", "output_norm", "post_norm", "down_norm"),
    *("delta_norm", "per_layer_norm", "output_sub_norm", "down_sub_norm"),
)
_VECTORS = (
    "sinks",
    "xielu",
    "conv",
    "conv.bias",
    "decay",
    "decay_bias",
    "choice_bias",
    "layer_scalar",
)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class DequantizedModel:
    """The layers of a bundle under each action; only the compensation is ever trained.

    Shapes: B sequences, T tokens each, D hidden size, H heads, H_kv key/value heads, d head size,
    V vocabulary. Tensors are float32 unless noted.

    Attributes:
        manifest: manifest of the bundle.
        actions: actions it holds weights for, most expensive first; the last is `skip`.
        heads: precisions of the LM heads.
        head: highest of `heads`, used by the reference.
        chunk: number of tokens whose logits should exist at once.
        keeps_layers: whether all layers stay dequantized; for larger models only the one that runs
            does.
        rounds_inputs: whether quantized products round their input to INT8, as `MatMulNBits` does
            at accuracy level 4. Off while training, for the time that it takes.
    """

    rounds_inputs = False

    def __init__(self, bundle: Bundle, actions: tuple[Action, ...], dtype: torch.dtype):
        """Reads the norms; everything else is dequantized when it is needed.

        Args:
            bundle: bundle to read from.
            actions: the precisions to hold.
            dtype: type of the stored matrices; norms and hidden states stay float32.

        Raises:
            BundleError: a file is missing or damaged.
        """
        self.manifest: Manifest = bundle.manifest
        self.actions: tuple[Action, ...] = (*(a for a in actions if a != SKIP), SKIP)
        self._bundle = bundle
        facts, self._block = self.manifest.model, self.manifest.block
        self._heads = facts.num_heads
        self._sources = {attention.source for attention in self.manifest.attention}
        self._scales = [layer.scale for layer in self.manifest.layers]
        self._dtype = dtype
        small = [
            self._tensors(layer_path(index, self.actions[0]), (*_NORMS, *_VECTORS))
            for index in range(facts.num_layers)
        ]
        self._norms = [
            {name: norm_of(found, name) for name in _NORMS if name in found} for found in small
        ]
        self._vectors = [
            {name: torch.tensor(found[name]).float() for name in _VECTORS if name in found}
            for found in small
        ]
        self._loaded: dict[tuple[int, Action], Projections] = {}
        self._compensation: list[Tensor] = []
        self.keeps_layers = True
        layer = sum(
            one.weight.nbytes for action in self.actions for one in self._layer(0, action).values()
        )
        self.keeps_layers = facts.num_layers * layer <= kept_bytes()
        # INT8 replaces `full` here as in the layers.
        exported = self.manifest.exported_heads
        self.heads = tuple(a for a in exported if a != "full" or "int8" not in exported)
        self._lm_heads: dict[Action, StoredLinear] = {}
        norm = self._tensors(head_path(self.heads[0]), ("final_norm",))
        self._final_norm = norm_of(norm, "final_norm")
        self.chunk = min(max(_LOGITS_BYTES // (4 * facts.vocab_size), 16), 64)
        self.head: Action = self.heads[0]

    def _layer(self, index: int, action: Action) -> Projections:
        found = self._loaded.get((index, action))
        if found is None:
            if not self.keeps_layers:
                others = [key for key in self._loaded if key[0] != index]
                for key in others:
                    del self._loaded[key]
            found = self._projections(self._tensors(layer_path(index, action)), action)
            if action == SKIP and self._compensation:
                expand = replace(found[_EXPAND], weight=self._compensation[index])
                found[_EXPAND] = expand
            self._loaded[index, action] = found
        return found

    def _projections(self, found: dict[str, np.ndarray], action: Action) -> Projections:
        return projections_of(found, self.manifest.target, self._dtype, action)

    def _tensors(self, path: str, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Tensors of a graph: those with the given names, or all."""
        file = self._bundle.verified(path)
        tensors = onnx.load(file, load_external_data=False).graph.initializer
        chosen = [t for t in tensors if not names or t.name.partition(".")[0] in names]
        try:
            return {t.name: numpy_helper.to_array(t, str(file.parent)) for t in chosen}
        except onnx.checker.ValidationError as error:  # such as for a hard link, which onnx refuses
            raise BundleError(f"cannot read {file}: {error}") from None

    @cached_property
    def embedding(self) -> Embedding:
        """The start of a pass."""
        return Embedding(self._bundle)

    def normed(self, layer: int, x: Tensor) -> Tensor:
        """The input of attention, from the input of a layer, `[..., D]` -> `[..., D]`."""
        return self._norm(layer, "input_norm", x)

    def _norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        norm = self._norms[layer].get(name)
        return x if norm is None else norm(x, self._block)

    def _project(self, layer: int, action: Action, name: str, x: Tensor) -> Tensor:
        """`[..., K]` -> `[..., N]`; in lower precision under autocast."""
        return self._product(x, self._layer(layer, action)[name])

    def qkv(self, layer: int, action: Action, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[..., H * d]`; keys and values stacked, `[..., 2 * H_kv * d]`; not rotated.

        Norms after the rotation are left to `attend`. For a layer without attention: what only the
        token itself reads, and what later tokens read too.
        """
        if (sizes := self._recurrence(layer)) is not None:
            projected = self._project(layer, action, "in_proj", normed)
            gates = self._gates(layer, action, normed)
            width = sizes.channels * (2 if gates is None else 1)
            later = kept_of(projected[..., :width], gates, self._vectors[layer])
            return projected[..., width:], later
        kv_heads, size = self.manifest.model.heads_of(self.manifest.attention[layer])
        qkv, width = self._project(layer, action, "qkv_proj", normed), self._heads * size
        shared = self.manifest.attention[layer].source is not None
        kept = 0 if shared else 2 * kv_heads * size
        queries, keys_values, gates = qkv.split([width, kept, qkv.shape[-1] - width - kept], -1)
        if self._block.heads_normed == "before":
            queries = self._norm(layer, "q_norm", queries)
        return torch.cat([queries, gates], -1), self._key_normed(layer, keys_values)

    def _key_normed(self, layer: int, keys_values: Tensor) -> Tensor:
        if "k_norm" not in self._norms[layer] or self._block.heads_normed == "after":
            return keys_values
        keys, values = keys_values.chunk(2, -1)
        values = self._norm(layer, "v_norm", values)
        return torch.cat([self._norm(layer, "k_norm", keys), values], -1)

    def attend(self, layer: int, queries: Tensor, keys_values: Tensor, beside: Beside) -> Tensor:
        """Causal attention: `[B, T, H * d]`, `[B, T, 2 * H_kv * d]` -> `[B, T, H * d]`.

        Arguments are as returned by `qkv`: with gates after the queries if heads are gated, and
        with other contents if the layer has no attention. The layer's own token embedding, if any,
        is appended to the result.
        """
        result = self._mixed(layer, queries, keys_values, beside)
        if beside.per_layer is not None:
            result = torch.cat([result, beside.per_layer[:, :, layer].to(result)], -1)
        return result

    def _mixed(self, layer: int, queries: Tensor, keys_values: Tensor, beside: Beside) -> Tensor:
        if (sizes := self._recurrence(layer)) is not None:
            result = mixed(queries, keys_values, self._vectors[layer], sizes)
            if sizes.value_heads:
                result = self._norm(layer, "delta_norm", result) * F.silu(queries)
            return result
        if layer in self._sources:  # the backward pass may run this again: the first value counts
            beside.shared.setdefault(layer, keys_values)
        if (source := self.manifest.attention[layer].source) is not None:
            keys_values = beside.shared[source]
        kv_heads, size = self.manifest.model.heads_of(self.manifest.attention[layer])
        width = self._heads * size
        queries, gates = queries[..., :width], queries[..., width:]
        keys, values = keys_values.chunk(2, -1)
        q, k, v = (by_head(x, size) for x in (queries, keys, values))
        if (rope := self.manifest.attention[layer].rope) is not None:
            q, k = (rotated(x, *beside.rotary[rope]) for x in (q, k))
        if self._block.heads_normed == "after":
            q, k = self._norm(layer, "q_norm", q), self._norm(layer, "k_norm", k)
        if (scale := self._block.query_scale) is not None:
            blocks = torch.arange(q.shape[2]) // scale.length
            q = q * (1 + scale.beta * torch.log1p(blocks.float()))[:, None]
        groups = self._heads // kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        window, sinks = self.manifest.attention[layer].window, self._vectors[layer].get("sinks")
        result = attention(q, k, v, self._block, window, sinks).transpose(1, 2).flatten(2)
        return result * gates.sigmoid() if self._block.heads_gated else result

    def complete(self, layer: int, action: Action, x: Tensor, attention: Tensor) -> Tensor:
        """Output of a layer from its input `[..., D]` and the result of `attend`."""
        width = attention.shape[-1] - self._block.per_layer_width
        attention, own = attention[..., :width], attention[..., width:]
        attention = self._norm(layer, "output_sub_norm", attention)
        projected = self._project(layer, action, "o_proj", attention)
        attended = x + self._norm(layer, "output_norm", projected)
        y = self._feed_forward(layer, action, x, attended)
        if self._block.per_layer_width:
            gate = self._activation(layer)(self._project(layer, action, "per_layer_gate", y))
            added = self._project(layer, action, "per_layer_output", gate * own)
            y = y + self._norm(layer, "per_layer_norm", added)
        return y * self._vectors[layer].get("layer_scalar", 1.0)

    def _feed_forward(self, layer: int, action: Action, x: Tensor, attended: Tensor) -> Tensor:
        """Output of a layer, from its input and what its attention makes of it, all `[..., D]`."""
        read, layers = attended, self._layer(layer, action)
        if self._block.parallel:
            read = x if "post_norm" in self._norms[layer] else self.normed(layer, x)
        read, added = self._norm(layer, "post_norm", read), None
        if "router" in layers:
            assert self._block.experts is not None
            choice_bias = self._vectors[layer].get("choice_bias")
            added = experts_of(layers, choice_bias, self._block.experts, read, self._input)
        if "gate_up_proj" in layers:
            mlp = self._mlp(layer, action, read)
            if "shared_gate" in layers:
                mlp = mlp * self._project(layer, action, "shared_gate", read).sigmoid()
            added = mlp if added is None else added + mlp
        assert added is not None
        return attended + self._norm(layer, "down_norm", added)

    def _mlp(self, layer: int, action: Action, x: Tensor) -> Tensor:
        activation, up = self._activation(layer), self._project(layer, action, "gate_up_proj", x)
        if self._block.gated:
            gate, up = up.chunk(2, -1)
            up = activation(gate) * up
        else:
            up = activation(up)
        return self._project(layer, action, "down_proj", self._norm(layer, "down_sub_norm", up))

    def _activation(self, layer: int) -> Callable[[Tensor], Tensor]:
        if self._block.activation != "xielu":
            return _ACTIVATIONS[self._block.activation]
        linear, square, elu = self._vectors[layer]["xielu"]
        return lambda x: linear * x + square * F.relu(x).square() + elu * F.elu(x)

    def skip(self, layer: int, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Compensated output `[..., D]`; keys and values `[..., 2 * H_kv * d]`."""
        if "skip_proj" not in self._layer(layer, SKIP):
            return self._scales[layer] * x, x[..., :0]
        projected = self._project(layer, SKIP, "skip_proj", normed)
        width = projected.shape[-1] - self.manifest.compensation_rank
        keys_values, reduced = projected[..., :width], projected[..., width:]
        y = self._scales[layer] * x
        if _EXPAND in self._layer(layer, SKIP):
            y = y + self._project(layer, SKIP, _EXPAND, reduced)
        if self._recurrence(layer) is not None:
            return y, kept_of(keys_values, self._gates(layer, SKIP, normed), self._vectors[layer])
        return y, self._key_normed(layer, keys_values)

    def _recurrence(self, layer: int) -> Recurrence | None:
        """Sizes of a layer without attention."""
        attends = self.manifest.mixer_of(layer) in ATTENTIONS
        return None if attends else self.manifest.recurrence

    def _gates(self, layer: int, action: Action, normed: Tensor) -> Tensor | None:
        if self.manifest.mixer_of(layer) != "gated_delta":
            return None
        return self._project(layer, action, "gates", normed)

    def compensation(self) -> list[Tensor]:
        """Per layer, the `[D, r]` map from the reduced input to what a skip adds, in float32.

        From the first call on, `skip` uses these same tensors: changing one changes its results.
        Empty if skipped layers are only scaled.
        """
        if not self._compensation and self.manifest.compensation_rank:
            layers = range(self.manifest.model.num_layers)
            skips = (self._tensors(layer_path(index, SKIP)) for index in layers)
            self._compensation = [
                self._projections(skip, SKIP)[_EXPAND].weight.float() for skip in skips
            ]
            self._loaded.clear()
        return self._compensation

    def final(self, x: Tensor) -> Tensor:
        """Input of the LM head, `[..., D]`."""
        return self._final_norm(x, self._block)

    def lm_head(self, precision: Action) -> StoredLinear:
        """The LM head of a precision, `[V, D]`."""
        if precision not in self._lm_heads:
            found = self._tensors(head_path(precision), ("lm_head",))
            self._lm_heads[precision] = self._projections(found, precision)["lm_head"]
        return self._lm_heads[precision]

    @cached_property
    def _exact_tokens(self) -> dict[Action, int]:
        """For each head that rescores, the number of tokens that it does so for."""
        return {
            head: count
            for head, count in EXACT_TOKENS.items()
            if head in self.heads and rescores(self._bundle.verified(head_path(head)))
        }

    def logits(self, final: Tensor, head: Action | None = None) -> Tensor:
        """Logits `[..., V]` from the result of `final`; by default from the head of mixed paths."""
        head = head or self.head
        logits = self._product(final, self.lm_head(head))
        if (count := self._exact_tokens.get(head)) is not None:
            _, tokens = logits.topk(min(count, logits.shape[-1]))
            rows = self.lm_head("int8").weight[tokens]  # [..., tokens, D]
            exact = (rows.float() @ final.float()[..., None]).squeeze(-1)
            logits = logits.scatter(-1, tokens, exact.to(logits.dtype))
        cap = self._block.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits)

    def logits_slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the softcap, given its output logits; 1 if there is no softcap."""
        cap = self._block.logit_softcap
        return 1.0 if cap is None else cap - logits.square() / cap

    def _product(self, x: Tensor, linear: StoredLinear) -> Tensor:
        return F.linear(self._input(x, linear), linear.weight, linear.bias)

    def _input(self, x: Tensor, linear: StoredLinear) -> Tensor:
        """What a linear layer multiplies, `[..., K]`: rounded, if it is."""
        if not self.rounds_inputs or not linear.block_size:
            return x
        rounded = _rounded(x.detach(), linear.block_size)
        return x + (rounded - x).detach() if x.requires_grad else rounded  # gradients as without


def _rounded(x: Tensor, block_size: int) -> Tensor:
    """`[..., K]` rounded to INT8, with one scale for each block of a row."""
    missing = -x.shape[-1] % block_size
    padded = F.pad(x.float(), (0, missing)) if missing else x.float()
    blocks = padded.unflatten(-1, (-1, block_size))
    scales = torch.linalg.vector_norm(blocks, math.inf, -1, keepdim=True).clamp_min(1e-30) / 127
    return (blocks / scales).round_().mul_(scales).flatten(-2)[..., : x.shape[-1]]
