"""Undoes what llama.cpp's converter does to a model's tensors: names, order and values.

Source: llama.cpp, conversion/{gemma,gpt_oss,gptneox,lfm2,llama,qwen}.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PretrainedConfig

from dash_onnx.exporters.quantize.blockwise import Quantized

# llama.cpp rotates adjacent pairs in these, so their Q and K rows are stored in that order.
_INTERLEAVED_ROPE = ("arcee", "granite", "granitemoe", "llama", "mistral3", "smollm3")
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3", "qwen35")  # stored as the factor they multiply by
_CONVOLUTIONS = (".conv.conv.weight", ".conv1d.weight")  # stored `[D, kernel]`
# Tensors `[E, N, K]` or `[E, N]` of all experts of a layer; transformers also stacks these.
_EXPERTS = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "gate_up_proj_bias": ("gate_proj.bias", "up_proj.bias"),
    "down_proj": ("down_proj.weight",),
    "down_proj_bias": ("down_proj.bias",),
}
_ELSEWHERE = {
    "attn_sub_norm.weight": "inner_attn_ln.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
    "dt_bias": "dt_proj.bias",
    "expert_bias": "expert_bias.bias",
    "ffn_sub_norm.weight": "ffn_layernorm.weight",
    "layer_scalar": "layer_scalar.weight",
    "sinks": "sinks.weight",
}


@dataclass(frozen=True)
class Layout:
    """Layout of the tensors of one file.

    Attributes:
        architecture: `general.architecture`.
        config: config of the model.
    """

    architecture: str
    config: PretrainedConfig

    def parts(self, name: str) -> tuple[str, ...]:
        """Names, as the gguf package maps them, of the tensors that a weight is stored in."""
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(".experts") and last in _EXPERTS:
            prefix = prefix.replace(".block_sparse_moe.", ".mlp.")
            return tuple(f"{prefix}.{part}" for part in _EXPERTS[last])
        ending = next((one for one in _ELSEWHERE if name.endswith(f".{one}")), None)
        return (name if ending is None else name.removesuffix(ending) + _ELSEWHERE[ending],)

    def joined(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        """Joins the stored parts of a weight; without data, the result has only the right shape."""
        if name.endswith(_CONVOLUTIONS):
            return parts[0][:, None]
        if name.endswith(".shared_expert_gate.weight"):  # a single row, `[D]` in older files
            return parts[0].view(1, -1)
        if self.architecture == "gpt-oss" and ".experts." in name:
            # Gate and up rows alternate, matrices are transposed.
            weight = torch.stack(parts, 2).flatten(1, 2)
            return weight.transpose(1, 2) if weight.dim() == 3 else weight
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def values(self, name: str, values: np.ndarray) -> np.ndarray:
        """Values `[N, ...]` of a stored tensor as the model has them."""
        if self.architecture in _NORMS_PLUS_ONE and name.endswith("norm.weight"):
            return values if ".linear_attn." in name else values - np.float32(1)
        if name.endswith(".A_log"):
            with np.errstate(divide="ignore", invalid="ignore"):  # damaged ones: not finite
                values = np.log(-values)
        return self._columns(values) if self._reorders(name) else self._rows(name, values)

    def packed(self, name: str, packed: Quantized) -> Quantized | None:
        """Integers of a stored matrix in the order of the model; None if heads split blocks."""
        if not self._reorders(name):
            return packed.map(partial(self._rows, name))
        whole = self.config.linear_value_head_dim % packed.block_size == 0
        return packed.map(self._columns) if whole else None

    def _reorders(self, name: str) -> bool:
        """Whether the columns are stored in another order."""
        return self.architecture == "qwen35" and name.endswith(".linear_attn.out_proj.weight")

    def _columns(self, values: np.ndarray) -> np.ndarray:
        """Columns, or blocks of them, `[N, K, ...]` in the order of the model."""
        return np.ascontiguousarray(self._by_key_head(values.swapaxes(0, 1), 0).swapaxes(0, 1))

    def _rows(self, name: str, values: np.ndarray) -> np.ndarray:
        """Rows, along the first axis, in the order of the model."""
        shape, config = values.shape, self.config
        heads = config.num_attention_heads
        if self.architecture in _INTERLEAVED_ROPE:
            kv_heads = getattr(config, "num_key_value_heads", None) or heads
            counts = {"q_proj": heads, "k_proj": kv_heads}
            count = next((n for part, n in counts.items() if f".{part}." in name), None)
            if count is not None:
                paired = values.reshape(count, shape[0] // count // 2, 2, *shape[1:])
                return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(shape)
        if self.architecture == "gptneox" and ".query_key_value." in name:
            # Stored: all queries, all keys, all values; in the model: head by head.
            by_kind = values.reshape(3, heads, shape[0] // heads // 3, *shape[1:])
            return np.ascontiguousarray(by_kind.swapaxes(0, 1)).reshape(shape)
        if self.architecture == "qwen35" and ".linear_attn." in name:
            last = name.removesuffix(".weight").rpartition(".")[2]
            if last in ("in_proj_qkv", "conv1d"):
                both = 2 * config.linear_num_key_heads * config.linear_key_head_dim
                return self._by_key_head(values, both)
            if last in ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias"):
                return self._by_key_head(values, 0)
        return values

    def _by_key_head(self, values: np.ndarray, start: int) -> np.ndarray:
        """Groups value heads by key head from row `start` on; stored, they cycle over key heads."""
        keys, heads = self.config.linear_num_key_heads, self.config.linear_num_value_heads
        shape = values.shape
        size = (shape[0] - start) // heads
        in_turn = values[start:].reshape(heads // keys, keys, size, *shape[1:])
        by_key = in_turn.swapaxes(0, 1).reshape(shape[0] - start, *shape[1:])
        return np.concatenate([values[:start], by_key])
