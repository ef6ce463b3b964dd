"""The model in training: what the graphs of a bundle compute, in torch, from their own weights.

Read from the bundle, not from the source model, so that what the policy is trained on is to the
last bit what it will steer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from dash_onnx.actions import SKIP, Action
from dash_onnx.bundle import Bundle
from dash_onnx.contract import EMBED_PATH, head_path, layer_path
from dash_onnx.exporters.graphs.build import OFFSETS
from dash_onnx.exporters.quantize import Bits, Quantized, dequantize
from dash_onnx.manifest import Manifest
from dash_onnx.rope import rotary_tables

Tensor: TypeAlias = torch.Tensor
F = torch.nn.functional


@dataclass(frozen=True)
class Product:
    """y = x @ weight.T + bias, weight `[N, K]`."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., K]` -> `[..., N]`; under autocast in its lower precision."""
        return F.linear(x, self.weight, self.bias)


Weights: TypeAlias = dict[str, Product]
"""By name of the linear layer."""


class Frozen:
    """The layers of a bundle under each action; nothing but the compensation is ever trained.

    Shapes: B sequences, T tokens each, D hidden size, H heads, H_kv key/value heads, d head size.

    Attributes:
        manifest: of the bundle.
        actions: those it holds weights for; `skip` always.
        heads: the LM heads, by precision.
        head: the one that mixed paths use.
    """

    def __init__(self, bundle: Bundle, actions: tuple[Action, ...], dtype: torch.dtype):
        """Reads and dequantizes every weight.

        Args:
            bundle: to read from.
            actions: the precisions to hold.
            dtype: of the stored matrices (norms and hidden states stay float32).
        """
        self.manifest: Manifest = bundle.manifest
        self.actions: tuple[Action, ...] = (*(a for a in actions if a != SKIP), SKIP)
        self._bundle = bundle
        facts = self.manifest.model
        self._heads, self._kv_heads, self._d = facts.num_heads, facts.num_kv_heads, facts.head_dim
        self.input_norms: list[Tensor] = []
        self._post_norms: list[Tensor] = []
        self._layers: list[dict[Action, Weights]] = []
        self._scales = [layer.scale for layer in self.manifest.layers]
        for index in range(facts.num_layers):
            weights: dict[Action, Weights] = {}
            for action in self.actions:
                found = self._tensors(layer_path(index, action))
                weights[action] = _products(found, self.manifest.target.block_size, dtype)
                if action != SKIP:
                    norms = found["input_norm"], found["post_norm"]
            self.input_norms.append(torch.tensor(norms[0]).float())
            self._post_norms.append(torch.tensor(norms[1]).float())
            self._layers.append(weights)
        heads: list[Action] = [a for a in self.manifest.exported_heads if a != "full"] or ["full"]
        self.heads: dict[Action, Product] = {}
        for precision in heads:
            found = self._tensors(head_path(precision))
            products = _products(found, self.manifest.target.block_size, dtype)
            self.heads[precision] = products["lm_head"]
            self._final_norm = torch.tensor(found["final_norm"]).float()
        mixed = self.manifest.heads[SKIP]
        self.head: Action = mixed if mixed in self.heads else next(iter(self.heads))
        self._epsilon = self._read_epsilon()

    def _tensors(self, path: str) -> dict[str, np.ndarray]:
        model = onnx.load(self._bundle.verified(path))
        return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}

    def _read_epsilon(self) -> float:
        model = onnx.load(self._bundle.verified(head_path(self.head)), load_external_data=False)
        norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
        return next(a.f for a in norm.attribute if a.name == "epsilon")

    @cached_property
    def _embedding(self) -> Tensor:
        found = self._tensors(EMBED_PATH)
        if "embedding" in found:
            return torch.tensor(found["embedding"])
        values, scales = found["embedding.values"], found["embedding.scales"].astype(np.float32)
        block = values.shape[1] // scales.shape[1]
        rows = values.reshape(*scales.shape, block)
        return dequantize(Quantized(rows, scales, None, values.shape, 8, block))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[B, T]` -> hidden states `[B, T, D]` float32."""
        return self._embedding[ids].float()

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[length, rotary_dim / 2]`."""
        cos, sin = rotary_tables(self.manifest.rope, length, "float32")
        return torch.from_numpy(cos), torch.from_numpy(sin)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last axis."""
        return F.rms_norm(x, (x.shape[-1],), weight, self._epsilon)

    def qkv(self, layer: int, action: Action, normed: Tensor) -> Tensor:
        """Stacked queries, keys and values `[..., (H + 2 * H_kv) * d]`, not rotated yet."""
        return self._layers[layer][action]["qkv_proj"](normed)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[..., H * d]`, and keys and values stacked `[..., 2 * H_kv * d]`."""
        width = self._heads * self._d
        return qkv[..., :width], qkv[..., width:]

    def attend(self, queries: Tensor, keys_values: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Causal attention: `[B, T, H * d]`, `[B, T, 2 * H_kv * d]` -> `[B, T, H * d]`."""
        keys, values = keys_values.chunk(2, -1)
        q = _rotated(self._by_head(queries), *rotary)
        k = _rotated(self._by_head(keys), *rotary)
        v = self._by_head(values)
        groups = self._heads // self._kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def new_cache(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Room for the keys and values of one layer, `[B, H_kv, length, d]` each."""
        shape = batch, self._kv_heads, length, self._d
        return torch.zeros(shape), torch.zeros(shape)

    def attend_cached(
        self,
        queries: Tensor,
        keys_values: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        position: int,
    ) -> Tensor:
        """Like `attend` for one token a sequence (T = 1) at `position`; extends the cache."""
        keys, values = keys_values.chunk(2, -1)
        k, v = cache
        k[:, :, position] = _rotated(self._by_head(keys), *rotary)[:, :, 0]
        v[:, :, position] = self._by_head(values)[:, :, 0]
        q = _rotated(self._by_head(queries), *rotary).float()
        q = q.view(len(q), self._kv_heads, -1, self._d)  # heads that share K/V as a group
        seen = slice(0, position + 1)
        out = F.scaled_dot_product_attention(q, k[:, :, seen], v[:, :, seen])
        return out.reshape(len(out), 1, -1)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self._d)).transpose(1, 2)  # [B, heads, T, d]

    def complete(self, layer: int, action: Action, x: Tensor, attention: Tensor) -> Tensor:
        """Output of a layer from its input `[..., D]` and the heads' outputs `[..., H * d]`."""
        weights = self._layers[layer][action]
        x = x + weights["o_proj"](attention)
        gate, up = weights["gate_up_proj"](self.norm(x, self._post_norms[layer])).chunk(2, -1)
        return x + weights["down_proj"](F.silu(gate) * up)

    def skip(self, layer: int, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Compensated output `[..., D]`; keys and values `[..., 2 * H_kv * d]`."""
        weights = self._layers[layer][SKIP]
        projected = weights["skip_proj"](normed)
        width = 2 * self._kv_heads * self._d
        keys_values, reduced = projected[..., :width], projected[..., width:]
        y = self._scales[layer] * x
        if "expand_proj" in weights:
            y = y + weights["expand_proj"](reduced)
        return y, keys_values

    def compensation(self) -> list[Tensor]:
        """Per layer the `[D, r]` map from the reduced input to what a skip adds, in FP32.

        From the first call on, `skip` uses these very tensors: changing one changes what it
        computes. Empty where skipped layers are only scaled.
        """
        found = []
        for weights in self._layers:
            product = weights[SKIP].get("expand_proj")
            if product is None:
                return []
            if product.weight.dtype != torch.float32:
                product = Product(product.weight.float(), product.bias)
                weights[SKIP]["expand_proj"] = product
            found.append(product.weight)
        return found

    def final(self, x: Tensor) -> Tensor:
        """Input of the LM head, `[..., D]`."""
        return self.norm(x, self._final_norm)

    def logits(self, final: Tensor, head: Action | None = None) -> Tensor:
        """Logits `[..., V]` from what `final` returns, by the head of mixed paths unless given."""
        return self.heads[head or self.head](final)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first `2 * cos.shape[-1]` dimensions of heads `[B, H, T, d]`."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _products(found: dict[str, np.ndarray], block_size: int, dtype: torch.dtype) -> Weights:
    products = {}
    for key, array in found.items():
        name, _, part = key.rpartition(".")
        if part == "weight":
            weight = torch.from_numpy(np.ascontiguousarray(array.T)).float()
        elif part == "values" and not name.endswith(OFFSETS):
            weight = _dequantized(found, name, block_size)
            if f"{name}{OFFSETS}.values" in found:  # see `Graph.matmul_nbits`
                offsets = _dequantized(found, f"{name}{OFFSETS}", block_size)
                offsets = offsets[:, : weight.shape[1] // block_size]
                weight = weight[: len(offsets)] + offsets.repeat_interleave(block_size, 1)
        else:
            continue
        bias = found.get(f"{name}.bias")
        products[name] = Product(
            weight.to(dtype), None if bias is None else torch.tensor(bias).to(dtype)
        )
    return products


def _dequantized(found: dict[str, np.ndarray], name: str, block_size: int) -> Tensor:
    values = found[f"{name}.values"]  # [N, blocks, bytes]
    bits: Bits = 8 if values.shape[2] == block_size else 4
    shape = values.shape[0], values.shape[1] * block_size
    scales = found[f"{name}.scales"].astype(np.float32)
    zero_points = found.get(f"{name}.zero_points")
    return dequantize(Quantized(values, scales, zero_points, shape, bits, block_size))
