"""Writes a checkpoint with random weights in the shape of a published model, shard by shard.

    python benchmarks/big.py FOLDER --shape lfm2-1.2b --gguf FILE
    dash-export FOLDER BUNDLE --effort none
    dash-bench BUNDLE --peer llama.cpp:FILE --skip quality

Speed and memory do not depend on the values of weights, so the last command shows what real models
of this shape would take. `--gguf` needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)


def _llama(layers: int, width: int, inner: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": width // heads,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }


def _lfm2(model_type: str, layers: int, attending: tuple[int, ...], **own: Any) -> dict[str, Any]:
    kinds = ["full_attention" if layer in attending else "conv" for layer in range(layers)]
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 65536,
        "max_position_embeddings": 128000,
        **own,
    }


_DENSE = {"intermediate_size": 8192, "block_auto_adjust_ff_dim": False}
_EXPERTS = {"intermediate_size": 7168, "moe_intermediate_size": 1792, "num_experts": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": _llama(16, 2048, 8192, 32),
    "3b": _llama(28, 3072, 8192, 24),
    "8b": _llama(32, 4096, 14336, 32),
    "qwen3-1.7b": _llama(28, 2048, 6144, 16) | {"model_type": "qwen3", "vocab_size": 151936},
    "lfm2-1.2b": _lfm2("lfm2", 16, (2, 5, 8, 10, 12, 14), **_DENSE),
    "lfm2-8b-a1b": _lfm2("lfm2_moe", 24, (2, 6, 10, 14, 18, 21), **_EXPERTS),
    "qwen3.5-0.8b": {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 24,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 6,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "max_position_embeddings": 262144,
    },
}
"""Shapes of Llama 3, LFM 2 and Qwen 3.5, in transformers' terms."""


def main() -> None:
    """Writes the folder, with one shard per layer and one for the rest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--layers", type=int, help="fewer or more than the shape has")
    parser.add_argument("--ternary", action="store_true", help="weights of layers are -s, 0 or s")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same for llama.cpp, in Q4_0")
    arguments = parser.parse_args()
    folder, config = arguments.folder, shaped(arguments.shape, arguments.layers)
    weight_map = write(folder, config, ternary=arguments.ternary)
    if arguments.gguf:
        from big_gguf import save_gguf

        save_gguf(arguments.gguf, config, tokenizer(), stored(folder, weight_map))


def write(folder: Path, config: PreTrainedConfig, *, ternary: bool = False) -> dict[str, str]:
    """Writes a random model; returns the file of each weight.

    Args:
        folder: folder to write.
        config: the shape.
        ternary: whether weights of layers have three values, as in BitNet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    shapes = {name: x.shape for name, x in model.state_dict().items() if name != "lm_head.weight"}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: weight(shapes[name], generator, ternary=ternary and ".layers." in name)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    print(f"{folder}: {total / 1e9:.2f} billion parameters")
    return weight_map


def shaped(shape: str, layers: int | None = None, **own: Any) -> PreTrainedConfig:
    """A shape's configuration, with the requested number of layers.

    Args:
        shape: its name.
        layers: None takes all.
        own: sizes that replace those of the shape.
    """
    sizes = {**SHAPES[shape], **own}
    if layers:
        sizes["num_hidden_layers"] = layers
        if pattern := sizes.get("layer_types"):
            sizes["layer_types"] = [pattern[layer % len(pattern)] for layer in range(layers)]
    common = {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1}
    return AutoConfig.for_model(**sizes, **common, dtype="bfloat16")


def stored(folder: Path, weight_map: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by name, a shard at a time."""
    for file in dict.fromkeys(weight_map.values()):
        yield from load_file(folder / file).items()


def weight(shape: torch.Size, generator: torch.Generator, *, ternary: bool = False) -> torch.Tensor:
    """Norms of ones, and matrices as initialized for training, or only their signs and zeros."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    found = torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
    return found.sign() * (found.abs() > 0.01) * 0.02 if ternary else found


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one of two bytes, since llama.cpp expects a merge."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt"]
    ids = {token: index for index, token in enumerate(alphabet)}
    found = Tokenizer(models.BPE(ids, [("Ġ", "t")]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    main()
