"""Maps tensor names that differ from those of transformers, and selects the text part of a model.

A multimodal checkpoint holds a language model among other networks, under a prefix. Its config has
a `text_config`, from which the language model is exported as a model of its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

_GRANITE_EXPERTS = (
    (r"^(.+\.block_sparse_moe)\.input_linear\.weight$", r"\1.experts.gate_up_proj"),
    (r"^(.+\.block_sparse_moe)\.output_linear\.weight$", r"\1.experts.down_proj"),
    (r"^(.+\.block_sparse_moe)\.router\.layer\.weight$", r"\1.router.weight"),
)
_MIXTRAL = ((r"^(.+)\.block_sparse_moe\.", r"\1.mlp."),)
_QWEN35 = ((r"^model\.language_model\.", "model."),)

_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "ernie4_5_moe": ((r"^(.+\.mlp)\.moe_statics\.", r"\1.gate.moe_statics."),),
    "exaone": (
        (r"^transformer\.wte\.", "model.embed_tokens."),
        (r"^transformer\.ln_f\.", "model.norm."),
        (r"^transformer\.h\.(\d+)\.ln_1\.", r"model.layers.\1.input_layernorm."),
        (r"^transformer\.h\.(\d+)\.ln_2\.", r"model.layers.\1.post_attention_layernorm."),
        (
            r"^transformer\.h\.(\d+)\.attn\.attention\.out_proj\.",
            r"model.layers.\1.self_attn.o_proj.",
        ),
        (r"^transformer\.h\.(\d+)\.attn\.attention\.", r"model.layers.\1.self_attn."),
        (r"^transformer\.h\.(\d+)\.mlp\.c_fc_0\.", r"model.layers.\1.mlp.gate_proj."),
        (r"^transformer\.h\.(\d+)\.mlp\.c_fc_1\.", r"model.layers.\1.mlp.up_proj."),
        (r"^transformer\.h\.(\d+)\.mlp\.c_proj\.", r"model.layers.\1.mlp.down_proj."),
    ),
    "exaone_moe": ((r"^(.+\.mlp)\.e_score_correction_bias$", r"\1.gate.e_score_correction_bias"),),
    "flint": ((r"^(.+\.self_attn)\.softmax_offset$", r"\1.sinks"),),
    "granitemoe": _GRANITE_EXPERTS,
    "granitemoe_swa": _GRANITE_EXPERTS,
    "granitemoeshared": _GRANITE_EXPERTS,
    "hy_v3": (
        (r"^(.+\.mlp)\.router\.gate\.", r"\1.gate."),
        (r"^(.+\.mlp)\.expert_bias$", r"\1.e_score_correction_bias"),
        (r"^(.+\.mlp)\.shared_mlp\.", r"\1.shared_experts."),
    ),
    "minimax_m2": _MIXTRAL,
    "mixtral": _MIXTRAL,
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    "qwen3_5_moe_text": _QWEN35,
    "qwen3_5_text": _QWEN35,
}
"""Patterns and replacements by `model_type`; the first match applies."""

_TEXT = (
    (r"^language_model\.(model|lm_head)\.", r"\1."),
    (r"^model\.(?:language_model|text_model)\.", "model."),
    (r"^(model\.(?:embed_tokens|layers|norm)|lm_head)\.", r"\1."),
)
"""The same for language models in multimodal checkpoints; their other tensors are dropped."""

MULTIMODAL: dict[str, str | None] = {
    "exaone4_5": None,
    "gemma3": None,
    "gemma4": None,
    "gemma4_unified": None,
    "idefics3": None,
    "internvl": None,
    "lfm2_vl": None,
    "lighton_ocr": None,
    "llava": None,
    "llava_next": None,
    "llava_onevision": None,
    "minicpmv4_6": None,
    "mistral3": None,
    "qwen2_5_vl": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen3_5": None,
    "qwen3_5_moe": None,
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "smolvlm": None,
}
"""Multimodal models by `model_type`: the family that their language model belongs to, or None
if `text_config` names it. Qwen's rotate by three positions, which are equal for text."""

_SECTIONS = ("mrope_section", "mrope_interleaved")  # how frequencies are split among positions

Renaming = Callable[[str], str | None]
"""Maps a name in the files to that in transformers; None if the model has no such tensor."""


def renaming(model_type: str) -> Renaming:
    """The renaming for the tensors of a model."""
    multimodal = model_type in MULTIMODAL
    rules = _TEXT if multimodal else _RENAMED.get(model_type, ())

    def renamed(name: str) -> str | None:
        for pattern, replacement in rules:
            if re.match(pattern, name):
                return re.sub(pattern, replacement, name)
        return None if multimodal else name

    return renamed


def text_type(raw: dict[str, Any]) -> str:
    """The `model_type` of the language model that a config.json describes."""
    kind = str(raw.get("model_type"))
    if kind not in MULTIMODAL:
        return kind
    inside = raw.get("text_config")
    named = inside.get("model_type") if isinstance(inside, dict) else None
    return MULTIMODAL[kind] or str(named)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model in a multimodal one, as the config of a model of its own."""
    text = copy.deepcopy(config.get_text_config())
    text.tie_word_embeddings = config.tie_word_embeddings
    if (kind := MULTIMODAL[config.model_type]) is None:
        return text
    values = text.to_dict()
    rope = {key: v for key, v in (values["rope_parameters"] or {}).items() if key not in _SECTIONS}
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    values = {key: v for key, v in values.items() if key not in ("model_type", "architectures")}
    if kind == "qwen3_moe":  # as Qwen's VL models always do
        values["norm_topk_prob"] = True
    return CONFIG_MAPPING[kind](**{**values, "rope_parameters": rope})
