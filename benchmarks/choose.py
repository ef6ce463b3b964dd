"""The table of docs/guide/choose.md: what bundles need, from shapes alone.

python benchmarks/choose.py
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dash_onnx.cli.forecast import REACHED, bytes_read
from dash_onnx.core.actions import Action
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.exporters.export.sizes import Sizes, sizes_of
from dash_onnx.exporters.sources import Shapes, Source

SPEED = 40e9  # bytes per second that a machine reads from memory
SHAPES = {  # layers, width, width inside the MLP, heads, K/V heads, tokens
    "0.1 B, such as SmolLM2-135M": (30, 576, 1536, 9, 3, 49152),
    "0.5 B, such as Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 151936),
    "1 B, such as Llama-3.2-1B": (16, 2048, 8192, 32, 8, 128256),
    "3 B, such as Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128256),
    "8 B, such as Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128256),
}


def main() -> None:
    """Prints the rows, in GB and tokens per second."""
    for name, shape in SHAPES.items():
        small, usual = needs(shape, wide=False), needs(shape, wide=True)
        cells = (
            usual.bundle,
            small.run["int4"],
            small.run["int8"],
            usual.run["policy"],
            1024 * usual.kv_per_token,
        )
        forms: tuple[Action, ...] = ("int4", "int8")
        speeds = (REACHED[form] * SPEED / bytes_read(form, usual) for form in forms)
        row = [
            *(f"{cell / 1e9:.2g}" for cell in cells),
            *(f"{speed:.2g}" if speed < 10 else f"{speed:.0f}" for speed in speeds),
        ]
        print(f"| {name} | {' | '.join(row)} |")


def needs(shape: tuple[int, ...], *, wide: bool) -> Sizes:
    """Sizes of a bundle with INT8 and INT4, with or without the wide form."""
    layers, width, inner, heads, kv_heads, tokens = shape
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=tokens,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        named = LlamaForCausalLM(config).named_parameters()
    weights = Shapes({name: tuple(weight.shape) for name, weight in named})
    unused: Any = None  # sizes depend on neither tokenizer nor sampling
    source = Source("folder", "shape", config, weights, unused, unused, ())
    return sizes_of(source, ExportOptions(wide=wide))


if __name__ == "__main__":
    main()
