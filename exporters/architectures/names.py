"""Names of the weights of a family."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Names:
    """Weight names of a family, those of a layer relative to `layers.N.`; None: no such weight.

    Attributes:
        qkv: query, key and value projections, and that of the heads' gates if it is a matrix of its
            own; one name where the model stores them stacked.
        gate_up: gate and up projections; one name where the model stores them stacked, or has no
            gate.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str | None = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str | None = None
    k_norm: str | None = None
    output: str = "self_attn.o_proj"
    output_norm: str | None = None
    post_norm: str | None = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str | None = "mlp.down_proj"
    down_norm: str | None = None
    output_sub_norm: str | None = None
    down_sub_norm: str | None = None
    sinks: str | None = None


LLAMA = Names()
"""The names in most families."""

HEAD_NORMS = Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
"""With norms of queries and keys, as in most later families."""

GEMMA = Names(
    output_norm="post_attention_layernorm",
    post_norm="pre_feedforward_layernorm",
    down_norm="post_feedforward_layernorm",
)
"""With a norm on either side of attention and MLP."""

GEMMA3 = replace(GEMMA, q_norm=HEAD_NORMS.q_norm, k_norm=HEAD_NORMS.k_norm)
"""With a norm on either side, and norms of queries and keys."""

NORMS_BEHIND = replace(GEMMA3, input_norm=None, post_norm=None)
"""With norms only after attention and MLP, and norms of queries and keys."""

HUNYUAN = Names(q_norm="self_attn.query_layernorm", k_norm="self_attn.key_layernorm")
"""With norms of queries and keys under other names."""
