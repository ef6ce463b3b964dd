"""One tiny random model per family, and its bundle compared with transformers.

`python tests/families.py` prints the table of docs/reference/models.md from the same figures.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import LLAMA3_ROPE, TINY, VARIANTS, logits_of, reference_logits, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import dash_onnx
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.rows import Rows
from dash_onnx.runtime.sequence import SequenceState

LAYERS = 3
FULL = ("full",) * LAYERS
WINDOW = 40
LENGTHS = (1, 2, 37, WINDOW + 5)
DECODED = 8  # tokens decoded after each prompt
PROMPT = 5  # tokens before mixed paths

_SIZES = {
    **TINY,
    "num_hidden_layers": LAYERS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32
_SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_QWEN2 = {**_SOME_WINDOWS, "tie_word_embeddings": True}
_QWEN3 = {**_SOME_WINDOWS, "head_dim": 32}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}
_GEMMA2 = {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}
_TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_GEMMA3 = {**_GEMMA, "sliding_window_pattern": 2, "rope_parameters": _TWO_ROPES}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "original_max_position_embeddings": 64,
}
_LONG = {**_WIDE, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 64}
_PHI3 = {**_LONG, "sliding_window": WINDOW}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.11,
    "residual_multiplier": 0.3,
    "logits_scaling": 2.5,
}
_HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_STABLELM = {**_WIDE, "rope_parameters": _HALF}
_QUARTER = {**_WIDE, "partial_rotary_factor": 0.25}
_BIASED = {**_STABLELM, "use_qkv_bias": True}
_NEOX = {**_STABLELM, "num_key_value_heads": 2}
_HALF_ODD = {**_WIDE, "head_dim": 32, "rope_parameters": _HALF}
_GLM = {**_HALF_ODD, "attention_bias": True}
_LISTED = ["sliding_attention", "full_attention", "sliding_attention"]
_WINDOWS = {"sliding_window": WINDOW, "layer_types": _LISTED}
_ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
_HUNYUAN = {"head_dim": 16, "rope_parameters": _ALPHA}
_NO_WINDOWS = {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS}
_MINISTRAL = {**_WINDOWS, "head_dim": 32}
_OLMO3_ROPES = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_OLMO3 = {**_WINDOWS, "rope_parameters": _OLMO3_ROPES}
_GRANITE_SWA = {**_GRANITE, **_WINDOWS, "layer_rope_theta": [1e4, 0, 5e5]}
_GRANITE_HYBRID = {
    **_GRANITE,
    "layer_types": ["attention"] * LAYERS,
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "mamba_n_heads": 8,
}
_VAULT = {**_GEMMA2, "layer_types": _LISTED}
_QUERY_SCALE = {
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.5,
    },
}
_COHERE = {"logit_scale": 0.7}
_COHERE2 = {**_COHERE, **_WINDOWS}
_NANOCHAT = {"final_logit_softcapping": 4.0}
_OLMO = {"clip_qkv": None}
_STARCODER2 = {"sliding_window": WINDOW}
_HYPERCLOVAX = {**_GRANITE, "use_post_norm": True}
_LFM2 = {
    "layer_types": ["conv", "full_attention", "conv"],
    "block_multiple_of": 32,
    "intermediate_size": 144,
    "conv_bias": True,
}
_QWEN35 = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_QWEN2_MOE = {
    **_MOE,
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": 96,
    "mlp_only_layers": [1],
}
_QWEN3_MOE = {
    **_MOE,
    "head_dim": 32,
    "norm_topk_prob": True,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
}
_MELLUM = {
    **_MOE,
    **_WINDOWS,
    "head_dim": 32,
    "rope_parameters": _TWO_ROPES,
    "mlp_layer_types": ["sparse", "dense", "sparse"],
}
_LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
_MIXTRAL = {**_LOCAL, "sliding_window": WINDOW}
_FLEX_OLMO = {"num_experts": 6, "num_experts_per_tok": 3}
_OLMOE = {**_OLMO, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False}
_LFM2_MOE = {
    **_LFM2,
    **_MOE,
    "num_dense_layers": 1,
    "intermediate_size": 96,
    "routed_scaling_factor": 1.5,
}
_GPT_OSS = {
    **_WINDOWS,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    "swiglu_limit": 0.5,
}
_QWEN35_MOE = {
    **_QWEN35,
    **_WIDE,
    **_MOE,
    "shared_expert_intermediate_size": 96,
    "linear_key_head_dim": 32,
}
_QWEN3_NEXT = {
    **_QWEN35,
    **_MOE,
    "num_experts": 8,
    "norm_topk_prob": True,
    "shared_expert_intermediate_size": 96,
}
_SOLAR = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "head_dim": 32,
    "partial_rotary_factor": 1.0,
}
_ROUTED = {k: v for k, v in _SOLAR.items() if "rotary" not in k} | {"first_k_dense_replace": 1}
_GLM4_MOE = {**_ROUTED, "attention_bias": True, "rope_parameters": _HALF}
_DOTS1 = {**_ROUTED, "sliding_window": WINDOW, "max_window_layers": 1}
_SHARING = {**_MOE, "head_dim": 32, "num_shared_experts": 1}
_LATER = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_EXAONE_MOE = {
    **_SHARING,
    **_WINDOWS,
    **_LATER,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
_HY_V3 = {**_SHARING, **_LATER, "router_scaling_factor": 1.5}
_AFMOE = {
    **_SHARING,
    **_WINDOWS,
    "num_dense_layers": 1,
    "num_shared_experts": 2,
    "route_scale": 1.5,
    "mup_enabled": True,
}
_ERNIE_MOE = {
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_intermediate_size": 64,
    "moe_num_shared_experts": 2,
    "head_dim": 32,
    "use_bias": True,  # of the LM head, too, whose weight is tied
}
_HUNYUAN_MOE = {**_HUNYUAN, "num_experts": 6, "moe_topk": [2] * LAYERS}
_MINIMAX = {**_LOCAL, "head_dim": 32, "rope_parameters": _HALF}
_GRANITE_SHARED = {**_GRANITE, **_LOCAL, "shared_intermediate_size": 96}
_GRANITE_MOE_SWA = {**_GRANITE_SWA, **_GRANITE_SHARED}
_FLINT = {
    **_MOE,
    **_WINDOWS,
    "head_dim": 32,
    "norm_topk_prob": True,
    "shared_expert_intermediate_size": 96,
    "mlp_only_layers": [0],
}
_PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": WINDOW,
    "head_dim": 16,
    "global_head_dim": 32,
    "rope_parameters": {**_TWO_ROPES, "full_attention": _PROPORTIONAL},
    "final_logit_softcapping": 4.0,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": TINY["vocab_size"],
    "num_kv_shared_layers": 1,
    "use_double_wide_mlp": True,
}
_LARGE = {"num_kv_shared_layers": 0, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
_GEMMA4_LARGE = {**_GEMMA4, **_LARGE, "hidden_size_per_layer_input": 0}
_GEMMA4_UNIFIED = {k: v for k, v in {**_GEMMA4, **_LARGE}.items() if "per_layer" not in k}
_PARALLEL, _IN_TURN = {"use_parallel_residual": True}, {"use_parallel_residual": False}


@dataclass(frozen=True)
class Case:
    """A model to build.

    Attributes:
        family: its `model_type`.
        special: what differs from Llama, for the table.
        config: config entries other than the sizes.
        max_length: context length of the export.
        lengths: lengths of prompts.
    """

    family: str
    special: str
    config: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    lengths: tuple[int, ...] = LENGTHS


CASES: dict[str, Case] = {
    "llama": Case("llama", "any kind of RoPE", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": Case("mistral", "windows", {"sliding_window": WINDOW, "head_dim": 32}),
    "qwen2": Case("qwen2", "Q/K/V bias, windows in some layers", _QWEN2),
    "qwen3": Case("qwen3", "Q/K norm of each head", _QWEN3),
    "gemma2": Case("gemma2", "four norms a layer, windows in half of them, softcaps", _GEMMA2),
    "gemma3": Case("gemma3_text", "as Gemma 2; Q/K norm, a RoPE for each kind of layer", _GEMMA3),
    "phi3": Case("phi3", "partial rotary, windows, short longrope", _PHI3),
    "phi3 long": Case("phi3", "long longrope", _LONG, 128, (100,)),
    "smollm3": Case("smollm3", "layers without RoPE", {"no_rope_layer_interval": 2}),
    "olmo2": Case("olmo2", "norms after attention and MLP, Q/K norm of all heads"),
    "granite": Case("granite", "multipliers", _GRANITE),
    "stablelm": Case("stablelm", "LayerNorm, partial rotary, Q/K/V bias", _BIASED),
    "stablelm parallel": Case("stablelm", "MLP parallel to attention", {**_STABLELM, **_PARALLEL}),
    "stablelm odd": Case("stablelm", "any part of a head rotated", _QUARTER),
    "gpt_neox": Case(
        "gpt_neox", "MLP parallel to attention, no gate, biases", {**_NEOX, **_PARALLEL}
    ),
    "gpt_neox in turn": Case("gpt_neox", "MLP after attention", {**_NEOX, **_IN_TURN}),
    "apertus": Case("apertus", "xIELU without gate, Q/K norm of each head"),
    "arcee": Case("arcee", "squared ReLU without gate"),
    "bitnet": Case("bitnet", "squared ReLU, norms in front of the second products"),
    "cohere": Case(
        "cohere", "one LayerNorm a layer, MLP parallel to attention, factor on the logits", _COHERE
    ),
    "cohere2": Case("cohere2", "as Cohere; RoPE in layers with windows alone", _COHERE2),
    "cwm": Case("cwm", "windows in some layers", {**_WINDOWS, "rope_parameters": LLAMA3_ROPE}),
    "ernie4_5": Case("ernie4_5", "RoPE of neighboring dimensions", {"head_dim": 32}),
    "exaone": Case("exaone", "names of GPT-2"),
    "exaone4": Case(
        "exaone4", "norms after attention and MLP, Q/K norm, RoPE in layers with windows", _WINDOWS
    ),
    "exaone4 without windows": Case("exaone4", "RoPE in all layers", _NO_WINDOWS),
    "gemma": Case("gemma", "norms of 1 + w, factor on embeddings", {"head_dim": 32}),
    "glm": Case("glm", "RoPE of neighboring dimensions in half of a head, Q/K/V bias", _GLM),
    "glm4": Case("glm4", "as GLM; four norms a layer", _GLM),
    "granitemoehybrid": Case("granitemoehybrid", "as Granite; no RoPE", _GRANITE_HYBRID),
    "granite_swa": Case("granite_swa", "as Granite; windows, sinks, a RoPE a layer", _GRANITE_SWA),
    "helium": Case("helium", "RoPE of neighboring dimensions", {"head_dim": 16}),
    "hunyuan_v1_dense": Case("hunyuan_v1_dense", "Q/K norm after RoPE", _HUNYUAN),
    "hyperclovax": Case("hyperclovax", "multipliers, four norms a layer", _HYPERCLOVAX),
    "internlm3": Case("internlm3", "none", {"head_dim": 16}),
    "iquestcoder": Case("iquestcoder", "none", {"head_dim": 16}),
    "jais2": Case("jais2", "LayerNorm, squared ReLU without gate, biases"),
    "ministral": Case("ministral", "windows in some layers", _MINISTRAL),
    "ministral3": Case("ministral3", "queries scaled by their position", _QUERY_SCALE),
    "nanochat": Case("nanochat", "norms without weights, also of embeddings; softcap", _NANOCHAT),
    "nemotron": Case("nemotron", "LayerNorm of 1 + w, squared ReLU without gate", _HALF_ODD),
    "olmo": Case("olmo", "LayerNorm without weights", _OLMO),
    "olmo3": Case("olmo3", "as OLMo 2; windows, a RoPE for each kind of layer", _OLMO3),
    "persimmon": Case("persimmon", "LayerNorm, also of Q/K; partial rotary", _NEOX),
    "phi": Case("phi", "LayerNorm, MLP parallel to attention, partial rotary, biases", _STABLELM),
    "seed_oss": Case("seed_oss", "Q/K/V bias", {"head_dim": 16}),
    "starcoder2": Case("starcoder2", "LayerNorm, no gate, biases, windows", _STARCODER2),
    "vaultgemma": Case("vaultgemma", "as Gemma 2; two norms a layer", _VAULT),
    "lfm2": Case("lfm2", "short convolutions in some layers", _LFM2),
    "qwen3_5": Case("qwen3_5_text", "Gated DeltaNet in some layers, gated attention", _QWEN35),
    "qwen3_moe": Case("qwen3_moe", "as Qwen 3, windows in all layers; experts", _QWEN3_MOE),
    "qwen2_moe": Case("qwen2_moe", "as Qwen 2; experts and a shared one", _QWEN2_MOE),
    "olmoe": Case("olmoe", "Q/K norm of all heads; experts", _OLMOE),
    "lfm2_moe": Case("lfm2_moe", "as LFM 2; experts with sigmoid routing", _LFM2_MOE),
    "mixtral": Case("mixtral", "windows; experts", _MIXTRAL),
    "mellum": Case("mellum", "as Qwen 3, a RoPE for each kind of layer; experts", _MELLUM),
    "granitemoe": Case("granitemoe", "as Granite; experts", {**_GRANITE, **_LOCAL}),
    "flex_olmo": Case("flex_olmo", "as OLMo 2; experts", _FLEX_OLMO),
    "qwen3_5_moe": Case("qwen3_5_moe_text", "as Qwen 3.5; experts and a shared one", _QWEN35_MOE),
    "qwen3_next": Case("qwen3_next", "as Qwen 3.5; experts and a shared one", _QWEN3_NEXT),
    "glm4_moe": Case(
        "glm4_moe",
        "partial rotary, Q/K/V bias; experts with sigmoid routing, and shared ones",
        _GLM4_MOE,
    ),
    "glm4_moe normed": Case(
        "glm4_moe", "Q/K norm of each head", {**_GLM4_MOE, "use_qk_norm": True}
    ),
    "dots1": Case("dots1", "as Qwen 3; experts as in GLM 4.5", _DOTS1),
    "solar_open": Case("solar_open", "experts as in GLM 4.5", _SOLAR),
    "exaone_moe": Case(
        "exaone_moe", "as Qwen 3, RoPE in layers with windows; experts as in GLM 4.5", _EXAONE_MOE
    ),
    "ernie4_5_moe": Case(
        "ernie4_5_moe", "as ERNIE 4.5; experts, chosen with a bias, and shared ones", _ERNIE_MOE
    ),
    "afmoe": Case(
        "afmoe", "four norms a layer, Q/K norm, gated attention; experts as in GLM 4.5", _AFMOE
    ),
    "minimax_m2": Case(
        "minimax_m2",
        "Q/K norm of all heads, partial rotary; experts with sigmoid routing",
        _MINIMAX,
    ),
    "hy_v3": Case("hy_v3", "as Qwen 3; experts as in GLM 4.5", _HY_V3),
    "hunyuan_v1_moe": Case(
        "hunyuan_v1_moe", "Q/K norm after RoPE; experts and a shared one", _HUNYUAN_MOE
    ),
    "granitemoeshared": Case(
        "granitemoeshared", "as Granite; experts and a shared one", _GRANITE_SHARED
    ),
    "granitemoe_swa": Case(
        "granitemoe_swa", "as Granite; windows, sinks; experts and a shared one", _GRANITE_MOE_SWA
    ),
    "flint": Case(
        "flint", "as Qwen 3, windows, sinks; experts with sigmoid routing, and a shared one", _FLINT
    ),
    "gemma4": Case("gemma4_text", "as Gemma 3; V norm, per-layer embeddings, shared K/V", _GEMMA4),
    "gemma4 large": Case("gemma4_text", "values from keys, heads by kind of layer", _GEMMA4_LARGE),
    "gemma4 unified": Case("gemma4_unified_text", "as Gemma 4's large models", _GEMMA4_UNIFIED),
    "gpt_oss": Case("gpt_oss", "windows, sinks, biases; experts with a bounded gate", _GPT_OSS),
}


def config_of(family: str, change: dict[str, Any]) -> PretrainedConfig:
    """A tiny config of a family."""
    config: PretrainedConfig = AutoConfig.for_model(family, **{**_SIZES, **change})
    return config


def save_random(folder: Path, case: Case) -> Path:
    """Writes the model: every bias and norm has an effect, weights are exact in FP16."""
    config = config_of(case.family, case.config)
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        values = torch.randn_like(parameter)
        if parameter.dim() == 2 or "experts" in name:
            values *= 0.15
        elif parameter.dim() == 3:  # convolutions
            values *= 0.4
        elif name.endswith("A_log"):  # a memory of about 20 tokens
            values = 0.3 * values - 3.0
        elif name.endswith(".bias"):
            values *= 0.3
        else:  # Gemma before 4 adds 1 to the weights of its norms
            added = "gemma" in case.family and not case.family.startswith("gemma4")
            values = 0.3 * values + (0.0 if added else 1.0)
            if case.family.startswith("gemma4") and "q_norm" in name:  # the only scale on attention
                values *= 0.25
        parameter.data = values.half().float()
    for name, buffer in model.named_buffers():
        if name.endswith(("expert_bias", "correction_bias")):
            buffer.copy_(0.3 * torch.randn_like(buffer))
        elif name.endswith("layer_scalar"):
            buffer.copy_(0.7 + 0.3 * torch.rand_like(buffer))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def reference_of(folder: Path) -> PreTrainedModel:
    """The model in transformers."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model


@dataclass
class Pair:
    """A model in transformers, and its bundle in the runtime."""

    case: Case
    bundle: Path
    reference: PreTrainedModel

    @cached_property
    def model(self) -> Model:
        """The loaded bundle."""
        return dash_onnx.load(self.bundle)

    @classmethod
    def build(cls, case: Case, folder: Path) -> Pair:
        """Saves and exports the model; MatMulNBits computes exactly (accuracy level 0)."""
        source, out = save_random(folder / "source", case), folder / "out"
        options = ExportOptions(
            variants=VARIANTS,
            wide=False,
            attention="both",
            max_length=case.max_length,
            calibration=(write_text(folder / "text.txt"),),
            accuracy_level=0,
        )
        export(str(source), out, options)
        return cls(case, out, reference_of(source))

    def wanted(self, ids: np.ndarray) -> np.ndarray:
        """Logits of transformers after each token, `[T, V]`."""
        return reference_logits(self.reference, ids)

    def prefill(self, ids: np.ndarray, policy: str) -> np.ndarray:
        """Logits of the runtime after each token of a prompt."""
        logits: np.ndarray = self.model.logits(ids, policy=policy)
        return logits

    def decode(self, ids: np.ndarray, prompt: int, policy: str) -> np.ndarray:
        """Logits of the runtime after each token that follows the prompt."""
        return logits_of(self.model.score(ids, prompt_tokens=prompt, policy=policy))

    def runs(self, policy: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Logits of transformers and the runtime, for every prompt and its continuation."""
        for length in self.case.lengths:
            ids = random_ids(length + DECODED)
            wanted = self.wanted(ids)
            yield wanted[:length], self.prefill(ids[:length], policy)
            yield wanted[length:], self.decode(ids, length, policy)

    def full_difference(self) -> float:
        """Largest difference of the logits with all layers in `full`."""
        return max(float(np.abs(wanted - got).max()) for wanted, got in self.runs("full"))

    def returned_difference(self) -> float:
        """Largest difference of the logits after a sequence was truncated.

        It drops a pass of wrong tokens, and then everything after the first half of the prompt.
        """
        path, differences = FixedPath(FULL, "full"), []
        for length in self.case.lengths:
            ids = random_ids(length + DECODED)
            wanted, sequence = self.wanted(ids), self.model.new_sequence()
            sequence.prefill(ids[:length], FULL, "full")
            sequence.forward(random_ids(DECODED), path)
            for back in (length, length // 2):
                for position in range(sequence.truncate(back), len(ids)):
                    got, _ = sequence.forward(int(ids[position]), path)
                    differences.append(float(np.abs(got - wanted[position]).max()))
        return max(differences)

    def batch_difference(self, model: Model) -> float:
        """Largest difference in a batch of rows of different lengths, on a model of this bundle."""
        lengths, differences = (50, 3, 44), []
        ids = random_ids(max(max(lengths) + DECODED, self.case.lengths[0]))
        wanted, batch = self.wanted(ids), Rows.new(model._sessions, len(lengths))
        for row, length in zip(batch.states, lengths, strict=True):
            row.prefill(ids[:length], FULL, "full")
        for step in range(DECODED):
            rows = [0, 2] if step % 2 else [0, 1, 2]  # one row pauses in between
            at = [batch.states[row].length for row in rows]
            deciders = [FixedPath(FULL, "full")] * len(rows)
            logits, _ = batch.forward(rows, [[int(ids[i])] for i in at], deciders)
            for got, position in zip(logits, at, strict=True):
                differences.append(float(np.abs(got[0] - wanted[position]).max()))
        return max(differences)

    def int8_error(self) -> float:
        """Largest ||int8 - wanted|| / ||wanted|| of the logits of a run.

        For mixtures of experts, the median over tokens: rounding sends a token whose scores are
        nearly tied to another expert, and then no bound on rounding applies.
        """
        runs = list(self.runs("int8"))
        if self.model.manifest.block.experts is not None:
            wanted, got = (np.concatenate(side) for side in zip(*runs, strict=True))
            errors = np.linalg.norm(wanted - got, axis=-1) / np.linalg.norm(wanted, axis=-1)
            return float(np.median(errors))
        return max(
            float(np.linalg.norm(wanted - got) / np.linalg.norm(wanted)) for wanted, got in runs
        )

    def kv_errors(self) -> tuple[float, float]:
        """Errors of the K/V cache after random paths, against transformers on the same inputs.

        States depend on all tokens, so they are compared after texts all `full` or all skipped.

        Returns:
            ||ours - wanted|| / ||wanted||, the largest over all layers, for tokens that ran a
            layer in `full`, and for those that skipped it.
        """
        rng, length = np.random.default_rng(5), max(30, self.case.lengths[0])
        ids = random_ids(length)
        paths = rng.choice(["full", "skip"], (length, LAYERS))
        paths[:PROMPT] = "full"
        paths[:, 0] = "full"
        sequence, cache = self._ran(ids, paths)
        errors: dict[str, list[float]] = {"full": [], "skip": []}
        order = REGISTRY[self.case.family].head_order(
            self.model.manifest.ropes[0], self.model.manifest.model.head_dim
        )
        for layer in self.model.manifest.attending:
            keys, values = cache[layer].keys[0].numpy(), cache[layer].values[0].numpy()
            wanted = keys if order is None else keys[..., order], values
            buffers = sequence.kv.keys[layer], sequence.kv.values[layer]
            for ours, theirs in zip(buffers, wanted, strict=True):
                got = ours.array[0, :, :length]
                for action, found in errors.items():
                    chosen = paths[:, layer] == action
                    if chosen.any():
                        difference = np.linalg.norm((got - theirs)[:, chosen])
                        found.append(float(difference / np.linalg.norm(theirs[:, chosen])))
        for action, found in errors.items() if self.model.manifest.recurrence else ():
            paths[PROMPT:] = action
            sequence, cache = self._ran(ids, paths)
            assert sequence.kv.states is not None
            for name, present in sequence.kv.states.present.items():
                kind, _, layer = name.partition(".")
                if kind == "conv":
                    states = cache[int(layer)].conv_states[0].numpy()
                    theirs = states[..., -present.shape[1] :].swapaxes(1, 2)
                else:
                    theirs = cache[int(layer)].recurrent_states[0].numpy()
                difference = np.linalg.norm(present.array - theirs)
                found.append(float(difference / np.linalg.norm(theirs)))
        return max(errors["full"]), max(errors["skip"])

    def _ran(self, ids: np.ndarray, paths: np.ndarray) -> tuple[SequenceState, list[Any]]:
        """A sequence after running tokens on paths, and transformers' cache for the same inputs."""
        sequence = self.model.new_sequence()
        inputs = np.zeros((LAYERS, len(ids), _SIZES["hidden_size"]), np.float32)
        for position, token in enumerate(ids):
            sequence.advance(1)
            sequence.embed(int(token))
            for layer, action in enumerate(paths[position]):
                inputs[layer, position] = sequence.hidden[layer % 2].array[0, 0]
                sequence.run(layer, action)
        return sequence, self._cache_of(ids, inputs)

    def _cache_of(self, ids: np.ndarray, inputs: np.ndarray) -> list[Any]:
        """The cache of each layer in transformers, from given inputs."""
        family = REGISTRY[self.case.family]
        stream = family.scales(self.reference.config).stream

        def instead(layer: int) -> Callable[..., Any]:
            x = stream * torch.from_numpy(inputs[layer])[None]
            return lambda _module, arguments: (x, *arguments[1:])

        layers = self.reference.get_decoder().layers
        hooks = [layer.register_forward_pre_hook(instead(i)) for i, layer in enumerate(layers)]
        with torch.inference_mode():
            result = self.reference(torch.from_numpy(ids)[None], use_cache=True)
        for hook in hooks:
            hook.remove()
        cache = getattr(result, "cache", None) or result.past_key_values
        return list(cache.layers)


def attending_plainly(bundle: Path, copy: Path) -> Model:
    """The runtime with plain operators in all passes, by the profile of a copy."""
    manifest = Bundle(shutil.copytree(bundle, copy)).manifest
    passes = manifest.costs.passes
    assert passes is not None
    faster = ((-1e3,) * len(passes.rows),) * len(passes.contexts)
    changed = replace(passes, plain_rows=passes.rows, plain_ms=faster)
    replace_manifest(copy, replace(manifest, costs=replace(manifest.costs, passes=changed)))
    return dash_onnx.load(copy)


def random_ids(count: int) -> np.ndarray:
    """Random token ids without special tokens."""
    return np.random.default_rng(count).integers(2, _SIZES["vocab_size"], count)


def write_text(path: Path) -> Path:
    """A calibration text."""
    path.write_text("".join(f"the keeper counts {n} ships at night {n * n}\n" for n in range(60)))
    return path


def table() -> str:
    """The Markdown table of docs/reference/models.md."""
    rows = [
        "| model_type | difference from Llama | full: largest difference of logits"
        " | after going back | in a batch | int8: relative error | KV of a skip: relative error |",
        f"{'|---' * 7}|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            pair = Pair.build(case, Path(folder) / name)
            differences = (
                pair.full_difference(),
                pair.returned_difference(),
                pair.batch_difference(pair.model),
            )
            errors = f"{pair.int8_error():.1%} | {pair.kv_errors()[1]:.0%}"
            figures = " | ".join([f"{one:.0e}" for one in differences])
            rows.append(f"| `{case.family}` | {case.special} | {figures} | {errors} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
