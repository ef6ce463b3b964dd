"""Writes a checkpoint with random weights in the shape of a Llama 3, shard by shard.

    python benchmarks/big.py FOLDER
    dash-export FOLDER OUT --effort none --variants int8 --calibration TEXT

The second command shows what the export of such a model needs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES = {  # layers, width, width inside the MLP, heads
    "1b": (16, 2048, 8192, 32),
    "3b": (28, 3072, 8192, 24),
    "8b": (32, 4096, 14336, 32),
}


def main() -> None:
    """Writes the folder; a shard for each layer and one for the rest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--layers", type=int, help="fewer or more than the shape has")
    arguments = parser.parse_args()
    folder, (layers, width, inner, heads) = arguments.folder, SHAPES[arguments.shape]
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=arguments.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=width // heads,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: weight(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    print(f"{folder}: {total / 1e9:.2f} billion parameters")


def weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
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
