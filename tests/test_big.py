"""The random checkpoints of the benchmarks: exportable, and the same for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.quantize.ternary import ternary
from dash_onnx.exporters.sources import open_source

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 288}
OF_KIND: dict[str, dict[str, Any]] = {
    "1b": {"head_dim": 32, "num_key_value_heads": 1},
    "lfm2-1.2b": {"num_key_value_heads": 1},
    "lfm2-8b-a1b": {"num_key_value_heads": 1, "moe_intermediate_size": 32, "num_experts": 4},
    "qwen3.5-0.8b": {
        "head_dim": 32, "num_key_value_heads": 1, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", OF_KIND)
def test_a_shape_is_one_model_for_the_export_and_for_llama_cpp(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import big
    import big_gguf

    folder, file = tmp_path / "model", tmp_path / "model.gguf"
    config = big.shaped(shape, 4, **SMALL, **OF_KIND[shape])
    weights = big.stored(folder, big.write(folder, config))
    big_gguf.save_gguf(file, config, big.tokenizer(), weights, "F16")
    source = open_source(str(folder), REGISTRY)
    assert source.config.num_hidden_layers == 4
    tensors = gguf.GGUFReader(file).tensors
    stored = sum(int(tensor.n_elements) for tensor in tensors)
    files = folder.glob("*.safetensors")
    assert stored == sum(value.numel() for file in files for value in load_file(file).values())
    if shape in ("1b", "lfm2-1.2b"):  # which the export reads from GGUF, too
        other = open_source(str(file), REGISTRY)
        name = "model.layers.2.self_attn.v_proj.weight"
        torch.testing.assert_close(other.weights[name], source.weights[name].float())


def test_a_ternary_checkpoint_is_found_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import big

    config = big.shaped("qwen3-1.7b", 2, **SMALL, head_dim=32, num_key_value_heads=1)
    big.write(tmp_path, config, ternary=True)
    weight = open_source(str(tmp_path), REGISTRY).weights["model.layers.1.mlp.down_proj.weight"]
    assert len(weight.unique()) == 3 and ternary(weight.float(), 2, 32) is not None
