"""Builds the peers' models from the weights that dash-export would read.

python benchmarks/build_peers.py MODEL build/peers

For a GGUF file also those of llama.cpp and OpenVINO, which need the extra llama-cpp.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.sources import open_source

_GENAI = ("int4", "int8", "fp32", "fp16")
_GGUF = ("q4_0", "openvino-int4")


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


def requantize(model: Path, out: Path, kind: str) -> None:
    """Writes a GGUF file in another type, as `llama-quantize --allow-requantize` does."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = (str(path).encode() for path in (model, out))
    if code := llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)):
        sys.exit(f"build_peers.py: error: llama.cpp cannot write {out} ({code})")


def compress(model: Path, out: Path) -> None:
    """Writes a GGUF file as a folder for OpenVINO, its layers in INT4 and its head in INT8."""
    import nncf
    import openvino
    import openvino_genai

    with TemporaryDirectory(dir=out.parent) as folder:
        full = Path(folder) / "full.gguf"
        requantize(model, full, "F16")
        openvino_genai.LLMPipeline(str(full), "CPU", enable_save_ov_model=True)
        read = openvino.Core().read_model(full.with_name("openvino_model.xml"))
        fallback = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        )
        mode = nncf.CompressWeightsMode.INT4_ASYM
        small = nncf.compress_weights(
            read, mode=mode, group_size=128, ratio=1.0, advanced_parameters=fallback
        )
        out.mkdir(exist_ok=True)
        openvino.save_model(small, out / "openvino_model.xml")
        for file in Path(folder).glob("openvino_*tokenizer.*"):
            file.rename(out / file.name)


def main() -> None:
    """Builds all peers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what dash-export takes")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=(*_GENAI, *_GGUF),
        help="q4_0 is of llama.cpp, openvino-int4 of OpenVINO, all others of ORT GenAI "
        "(default: all but fp16; without a GGUF file those of ORT GenAI)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    is_gguf = arguments.model.endswith(".gguf")
    wanted = arguments.precisions or [*_GENAI[:3], *(_GGUF if is_gguf else ())]
    if not is_gguf and {*wanted} & {*_GGUF}:
        parser.error(f"{' and '.join(_GGUF)} need a GGUF file")
    source, out = arguments.out / "hf", arguments.out
    save_folder(arguments.model, source)
    for precision in wanted:
        if precision in _GENAI:
            build(source, out / precision, precision, arguments.device)
    if "q4_0" in wanted:
        requantize(Path(arguments.model), out / "q4_0.gguf", "Q4_0")
    if "openvino-int4" in wanted:
        compress(Path(arguments.model), out / "openvino-int4")


if __name__ == "__main__":
    main()
