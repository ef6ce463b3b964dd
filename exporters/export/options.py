"""The options of an export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from dash_onnx.core.actions import DEFAULT_VARIANTS, PRECISIONS, WIDE, WIDENED, Action, Form
from dash_onnx.core.block import AttentionForms
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.facts import INT8_INPUTS, KVCacheType, ModelFacts, Target
from dash_onnx.exporters.architectures.base import ModelSpec
from dash_onnx.exporters.calibration.texts import TextLike, TextSource, text_sources
from dash_onnx.exporters.device import TrainDevice
from dash_onnx.runtime.ort import Device

_LARGE_BLOCK, _BLOCK, _GGUF_BLOCK = 128, 64, 32  # the last is the block size of GGUF's types
_LARGE_HEAD = 1 << 26  # weights; at 28 million an INT2 head takes longer than an INT4 one
_RANK = 64  # see docs/decisions/0002
_CHOICE_PAYS = 8_000_000  # weights of a layer, see docs/decisions/0108


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export.

    Attributes:
        variants: precisions of each layer, highest first; if empty, INT2 alone where it holds the
            weights exactly on a CPU, else INT8 and INT4.
        wide: also write the wide form for passes of many rows; only with INT4 or INT2 on a CPU.
        device: determines the operators and the dtype of activations.
        train_device: where PyTorch calibrates and quantizes.
        max_length: context in tokens; None uses the model's own.
        block_size: weights that share one quantization scale; None uses 32 for GGUF files whose
            integers are kept, else 128 for a large model and 64 for others, or a smaller one
            that divides its sizes.
        calibration: texts, see `text_sources`; if empty, the model writes the text itself.
        min_tokens: minimum length of the texts, as the training after the export requires.
        compensation_rank: rank of a skipped layer's map; see `Manifest`. None uses the first
            multiple of the block size that is at least 64.
        accuracy_level: compute type of MatMulNBits: 0 (automatic), 1 (FP32), 2 (FP16), 3 (BF16) or
            4 (INT8 activations). None uses 4 on the CPU, 0 on CUDA.
        kv_cache: element type of the KV cache.
        attention: implementations of attention in each layer; None includes both if choosing one,
            which takes about eight microseconds, is a small part of the layer's time.
        requantize: requantize weights that the source stores as integers.
        overwrite: replace an existing bundle, or what an interrupted export of another one left.
        seed: seed for all random choices.
        revision: branch, tag or commit of a hub id.
        ternary: whether INT2 holds the weights exactly, see `suited`.
        exact: whether the first layer keeps its integers, so that GPTQ rounds nothing; see
            `suited`.
    """

    variants: tuple[Action, ...] = ()
    wide: bool = True
    device: Device = "cpu"
    train_device: TrainDevice = "cpu"
    max_length: int | None = None
    block_size: int | None = None
    calibration: tuple[TextLike, ...] = ()
    min_tokens: int = 0
    accuracy_level: int | None = None
    compensation_rank: int | None = None
    kv_cache: KVCacheType = "float"
    attention: AttentionForms | None = None
    requantize: bool = False
    overwrite: bool = False
    seed: int = 0
    revision: str | None = None
    ternary: bool = False
    exact: bool = False

    def resolved(self, kind: str, spec: ModelSpec) -> ExportOptions:
        """Fills what the user left open with values that suit the model and its kind of source.

        Args:
            kind: kind of the source.
            spec: description of the model.

        Raises:
            UnsupportedError: the block size, rank or a precision chosen by the user does not suit
                it.
        """
        facts, experts = spec.facts, spec.block.experts
        usual: tuple[Action, ...] = DEFAULT_VARIANTS
        if self.ternary and self.device == "cpu":
            usual = ("int2",)
        if unknown := {*self.variants} - {*PRECISIONS}:
            names = ", ".join(PRECISIONS)
            raise UnsupportedError(f"variants: {min(unknown)!r} is none of {names}")
        variants = tuple(one for one in PRECISIONS if one in (self.variants or usual))
        if experts is not None and (self.device != "cpu" or "int2" in variants):
            raise UnsupportedError(
                "mixtures of experts run on the CPU, in full, int8 and int4: choose other "
                "--variants or --device cpu"
            )
        sizes = {
            "hidden size": facts.hidden_size,
            "intermediate size": facts.intermediate_size,
            "attention width": facts.num_heads * facts.head_dim,
        }
        if experts is not None:  # their products refuse blocks that do not divide the width
            sizes["width of experts"] = experts.width
            if experts.shared_width:
                sizes["width of the shared expert"] = experts.shared_width
        if spec.recurrence is not None:
            sizes["width of values"] = spec.recurrence.value_width
        if spec.block.per_layer_width:
            sizes["width of per-layer embeddings"] = spec.block.per_layer_width
        kept = kind == "gguf" and not self.requantize and not self.ternary
        large = (_LARGE_BLOCK,) if facts.large or self.ternary else ()
        fitting = (b for b in (*large, _BLOCK) if not any(size % b for size in sizes.values()))
        block = self.block_size or (_GGUF_BLOCK if kept else next(fitting, _GGUF_BLOCK))
        for name, size in sizes.items():
            if size % block:
                raise UnsupportedError(f"block_size {block} does not divide the {name} {size}")
        if block < 16 or block & (block - 1):
            raise UnsupportedError(f"block_size {block} is not a power of two of at least 16")
        rank = self.compensation_rank
        rank = min(block * -(-_RANK // block) if rank is None else rank, facts.hidden_size)
        if rank % block or rank < 0:
            raise UnsupportedError(
                f"compensation_rank {rank} must be 0 or a multiple of block_size {block}"
            )
        # INT8 activations: 50 times faster than level 0 for INT8 weights on x86.
        fast = INT8_INPUTS if self.device == "cpu" else 0
        level = fast if self.accuracy_level is None else self.accuracy_level
        # Experts have no wide form: each of them sees only a few of the rows.
        wide = self.wide and experts is None
        wide = wide and self.device == "cpu" and not {*WIDENED}.isdisjoint(variants)
        # It takes four times the memory of INT2, and ternary models are made to be small.
        wide = wide and (bool(self.variants) or not self.ternary)
        attention = self.attention
        if attention is None:
            attention = "both" if facts.layer_parameters >= _CHOICE_PAYS else "grouped"
        if self.device != "cpu" or self.kv_cache != "float":
            attention = "grouped"
        return replace(
            self,
            variants=variants,
            wide=wide,
            attention=attention,
            block_size=block,
            compensation_rank=rank,
            accuracy_level=level,
        )

    @cached_property
    def texts(self) -> tuple[TextSource, ...]:
        """The sources that `calibration` names.

        Raises:
            SourceError: a spelling is not valid.
        """
        return text_sources(self.calibration)

    @property
    def calibrates(self) -> bool:
        """Whether GPTQ rounds a precision, which needs the inputs of every product."""
        return not {*WIDENED}.isdisjoint(self.variants)

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms of each layer except `skip`, which always exists; for resolved options."""
        return (*self.variants, WIDE) if self.wide else self.variants

    def head_precisions(self, facts: ModelFacts, biased: bool = False) -> tuple[Action, ...]:
        """Precisions of the LM heads; a large one in INT2 too, if it can rescore with INT8 weights.

        Args:
            facts: sizes of the model.
            biased: whether its LM head has a bias.
        """
        alone: tuple[Action, ...] = ("int8", "int4") if self.ternary else ("int4",)
        heads = tuple(a for a in self.variants if a != "int2") or alone
        large = facts.vocab_size * facts.hidden_size >= _LARGE_HEAD
        previews = large and not biased and self.device == "cpu" and {"int8", "int4"} <= {*heads}
        return (*heads, "int2") if previews else heads

    @property
    def target(self) -> Target:
        """What the graphs are built for; for resolved options."""
        assert self.block_size is not None and self.accuracy_level is not None
        assert self.attention is not None
        dtype: Literal["float32", "float16"] = "float32" if self.device == "cpu" else "float16"
        sizes = self.block_size, self.accuracy_level
        ragged = self.device == "cpu"
        forms = self.kv_cache, self.attention
        return Target(self.device, dtype, *sizes, *forms, ragged, self.ternary)
