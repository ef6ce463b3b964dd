"""Writes a checkpoint with random weights in the shape of a Llama 3.2, shard by shard.

What an export of it needs is what docs/export.md tells: `python benchmarks/big.py FOLDER`, then
`dash-export FOLDER OUT --effort none --variants int8 --calibration TEXT`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHAPES = {"3b": (28, 3072, 24), "1b": (16, 2048, 32)}  # layers, width, heads
INNER, KV_HEADS, VOCABULARY = 8192, 8, 128256


def main() -> None:
    """Writes the folder; a shard for the embedding and one for each layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--layers", type=int, help="fewer or more than the shape has")
    arguments = parser.parse_args()
    folder, (layers, width, heads) = arguments.folder, SHAPES[arguments.shape]
    layers = arguments.layers or layers
    folder.mkdir(parents=True)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=width,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=KV_HEADS,
        head_dim=width // heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    total, weight_map = 0, {}
    for number, shapes in enumerate(shards(layers, width, width // heads * KV_HEADS), 1):
        name = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        tensors = {key: weight(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(2 * tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    print(f"{folder}: {total / 2e9:.2f} billion parameters")


def shards(layers: int, width: int, keys: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes by name; `keys`: width of all keys of a token."""
    yield {"model.embed_tokens.weight": (VOCABULARY, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (INNER, width),
            "mlp.up_proj": (INNER, width),
            "mlp.down_proj": (width, INNER),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms of ones, and matrices as a model begins its training."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    found = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    main()
