"""A slow, independent reference of one layer under each action, in plain torch.

It shares nothing with the graphs but the quantized integers' meaning.
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from dash_onnx.core.manifest import Manifest


class SlowModel:
    """Token by token, one action per layer; keeps K/V as growing lists of tensors.

    Attributes:
        keys, values: per layer, one `[H_kv, d]` tensor per token.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        weights: dict[str, list[dict[str, torch.Tensor]]],
        manifest: Manifest,
    ):
        """Takes per action and layer the weight matrices by name, already dequantized.

        Those of `skip` are `skip_proj` (keys, values, and what the compensation reads), and
        `expand_proj` where the bundle has a compensation rank.
        """
        self.model = model
        self.weights = weights
        self.manifest = manifest
        self.rotary = LlamaRotaryEmbedding(model.config)
        layers = manifest.model.num_layers
        self.keys: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self.values: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    @torch.inference_mode()
    def token(self, token: int, path: tuple[str, ...]) -> torch.Tensor:
        """Hidden state `[D]` after the last layer."""
        x = self.model.model.embed_tokens.weight[token].float()
        position = torch.tensor([[len(self.keys[0])]])
        cos, sin = self.rotary(x[None, None], position)
        for index, action in enumerate(path):
            x = self._layer(index, action, x, cos[0, 0], sin[0, 0])
        return x

    def _layer(
        self, index: int, action: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        facts = self.manifest.model
        norms = self.model.model.layers[index]
        w = self.weights[action][index]
        normed = norms.input_layernorm(x)
        heads, kv_heads, d = facts.num_heads, facts.num_kv_heads, facts.head_dim
        if action == "skip":
            sizes = [0, kv_heads * d, kv_heads * d, self.manifest.compensation_rank]
            q, k, v, reduced = (w["skip_proj"] @ normed).split(sizes)
        else:
            q, k, v = (w["qkv_proj"] @ normed).split([heads * d, kv_heads * d, kv_heads * d])
        q, k = q.view(1, -1, 1, d), k.view(1, kv_heads, 1, d)
        q, k = apply_rotary_pos_emb(q, k, cos[None, None], sin[None, None])
        self.keys[index].append(k[0, :, 0])
        self.values[index].append(v.view(kv_heads, d))
        if action == "skip":
            scaled = self.manifest.layers[index].scale * x
            return scaled + w["expand_proj"] @ reduced if len(reduced) else scaled
        keys = torch.stack(self.keys[index], 1).repeat_interleave(heads // kv_heads, 0)
        values = torch.stack(self.values[index], 1).repeat_interleave(heads // kv_heads, 0)
        scores = (q[0] @ keys.transpose(1, 2)) / math.sqrt(d)  # [H, 1, T]
        attended = (scores.softmax(-1) @ values)[:, 0].reshape(-1)
        x = x + w["o_proj"] @ attended
        gate, up = (w["gate_up_proj"] @ norms.post_attention_layernorm(x)).chunk(2)
        return x + w["down_proj"] @ (torch.nn.functional.silu(gate) * up)
