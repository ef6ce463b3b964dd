"""Builds ORT GenAI's models from the weights that dash-export would read.

python benchmarks/build_peers.py MODEL build/peers
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.sources import open_source

_PRECISIONS = ("int4", "int8", "fp32", "fp16")
_CPU = _PRECISIONS[:3]


def save_folder(model: str, folder: Path) -> None:
    """Writes a source model as a Hugging Face folder with FP16 safetensors."""
    source = open_source(model, REGISTRY)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(source.config)
    names = [name for name, _ in empty.named_parameters() if name in source.weights]
    weights = {name: source.weights[name].half().contiguous() for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source.config.architectures = source.config.architectures or ["LlamaForCausalLM"]
    source.config.dtype = torch.float16
    source.config.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    source.generation_config.save_pretrained(folder)


def build(source: Path, out: Path, precision: str, device: str) -> None:
    """Runs GenAI's model builder with its defaults for the device."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(source), "-o", str(out), "-p", precision, "-e", device]
    command += ["-c", str(out.parent / "cache")]
    subprocess.run(command, check=True, stdout=sys.stderr)


def main() -> None:
    """Builds all peers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what dash-export takes")
    parser.add_argument("out", type=Path)
    parser.add_argument("--precisions", nargs="+", choices=_PRECISIONS, default=_CPU)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    source = arguments.out / "hf"
    save_folder(arguments.model, source)
    for precision in arguments.precisions:
        build(source, arguments.out / precision, precision, arguments.device)


if __name__ == "__main__":
    main()
