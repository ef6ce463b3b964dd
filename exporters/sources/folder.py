"""A local folder in Hugging Face format. Reads safetensors only: never pickle, never code."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.core.text import read_json
from dash_onnx.exporters.sources.bitnet import BitLinearWeights
from dash_onnx.exporters.sources.experts import TRANSPOSED, StackedExperts
from dash_onnx.exporters.sources.license import documents_in, license_of_card
from dash_onnx.exporters.sources.mxfp4 import Mxfp4Weights
from dash_onnx.exporters.sources.names import MULTIMODAL, Renaming, renaming, text_config, text_type
from dash_onnx.exporters.sources.source import (
    PICKLED,
    Shapes,
    Source,
    Weights,
    check_layers,
    check_supported,
    finite,
    layers_in,
    left_of,
    one_template,
    readable,
)

_ORIGINAL = "give the weights in BF16, FP16 or FP32: another release of the model may have them"
_HEADLESS = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering)$")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TEKKEN = ("ministral", "mistral", "mistral3")  # model types that may have its tokens
# No code from a folder runs: transformers refuses it; without this it would ask on the terminal.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class SafetensorsWeights(Shapes):
    """Tensors of one or more safetensors files, each memory-mapped only while in use."""

    def __init__(self, folder: Path, renamed: Renaming):
        """Opens the files that hold the weights; names are mapped to those of transformers.

        Raises:
            SourceError: a file is missing or damaged.
        """
        shards = _shards(folder)
        if not shards:
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
            copied = (folder / "embed.onnx").exists()
            bundle = "; if it is a bundle, dash.json is missing: copy it again" if copied else ""
            raise SourceError(
                f"{folder} has no safetensors weights{PICKLED if pickled else bundle}"
            )
        super().__init__({})
        self._places: dict[str, tuple[Path, str]] = {}  # file, and name in it
        self._read_so_far = set[str]()
        for shard in shards:
            path = folder / shard
            if Path(shard).name != shard:  # links in the folder are fine: the hub's cache has them
                raise SourceError(
                    f"{folder / _INDEX} names {shard!r}, which leaves the folder; refused"
                )
            if not path.is_file():
                raise SourceError(f"{path} is missing; {_INDEX} lists it")
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        if (known := renamed(name)) is None:
                            continue
                        self._places[known] = path, name
                        self.shapes[known] = tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise SourceError(f"{path} is not a valid safetensors file ({error})") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Weights`."""
        return self._read(name, slice(start, stop))

    def _read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if name not in self._places:
            raise SourceError(f"the weights have no tensor {name!r}")
        self._read_so_far.add(name)
        path, stored = self._places[name]
        # Kept open, a file would hold every page ever read in this process's memory.
        with safe_open(path, framework="pt") as file:
            weight = file.get_tensor(stored) if rows is None else file.get_slice(stored)[rows]
        # BitNet and MXFP4 have bytes; other integers, and floats of one byte, have scales beside.
        if weight.dtype != torch.uint8:
            if not weight.is_floating_point() or weight.element_size() == 1:
                raise UnsupportedError(f"{name} is quantized ({weight.dtype}); {_ORIGINAL}")
        return finite(name, weight)

    def unread(self, prefix: str) -> list[str]:
        """See `Weights`."""
        return left_of(self.shapes, self._read_so_far, prefix)


def has_weights(folder: Path) -> bool:
    """Whether all safetensors that a folder names are there."""
    shards = _shards(folder)
    return bool(shards) and all((folder / shard).is_file() for shard in shards)


def _shards(folder: Path) -> list[str]:
    """Names of the files that hold the weights, which may be missing.

    Raises:
        SourceError: the index is damaged.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():  # as in transformers: an index here is of older shards
        return [_SINGLE]
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) for shard in weight_map.values()
        ):
            raise SourceError(f"{index} has no weight_map from tensors to files")
        return sorted(set(weight_map.values()))
    return sorted(file.name for file in folder.glob("*.safetensors"))


def open_folder(
    folder: Path,
    *,
    kind: Literal["hub", "folder"],
    name: str,
    supported: Collection[str],
    revision: str | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Source:
    """Opens a folder with config.json, a tokenizer and safetensors.

    Args:
        folder: the folder.
        kind: how the user named the model.
        name: name of the model.
        supported: the model types that have an exporter.
        revision: commit of a hub id.
        shapes: shapes of the tensors, if their files are not in the folder.

    Raises:
        SourceError: a part is missing or damaged.
        UnsupportedError: the architecture has no exporter, or the weights are quantized.
    """
    config_path = folder / "config.json"
    adapts = any(folder.glob("adapter_model.*")) or not config_path.is_file()
    if adapts and (folder / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"{folder} holds an adapter, such as LoRA's: merge it into its model first, with "
            "PEFT's merge_and_unload() and save_pretrained(), and save the tokenizer there, too"
        )
    if not config_path.is_file():
        raise SourceError(f"{folder} has no config.json: not a Hugging Face model folder")
    raw = _read_json(config_path)
    model_type = str(raw.get("model_type"))
    check_supported(text_type(raw), supported)
    made_for = raw.get("architectures")
    if isinstance(made_for, list) and made_for and all(_HEADLESS.search(str(n)) for n in made_for):
        raise UnsupportedError(f"{folder} holds a {made_for[0]}, which writes no text: no LM head")
    quantization = raw.get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    elsewhere = raw.get("compression_config") or (folder / "hf_quant_config.json").is_file()
    if (quantization and method not in ("bitnet", "mxfp4")) or elsewhere:
        held = f"{method}-quantized weights" if method else "quantized weights"
        raise UnsupportedError(f"{folder} holds {held}; {_ORIGINAL}")
    renamed = renaming(model_type)
    if shapes:
        known = ((renamed(name), shape) for name, shape in shapes.items())
        files = Shapes({name: shape for name, shape in known if name is not None})
    else:
        files = SafetensorsWeights(folder, renamed)
    weights: Weights = StackedExperts(files, model_type in TRANSPOSED)
    if method == "bitnet":
        weights = BitLinearWeights(weights, quantization)
    if method == "mxfp4":
        weights = Mxfp4Weights(weights)
    found = _without_drafts(raw, layers_in(files.shapes))
    if "num_hidden_layers" in raw:  # before lists of that length are built
        check_layers(folder, raw["num_hidden_layers"], found)
    config = readable(config_path, lambda: AutoConfig.from_pretrained(folder, **_LOCAL))
    if quantization:  # no longer applies: the weights are already converted
        del config.quantization_config
    if model_type in MULTIMODAL:
        config = readable(config_path, lambda: text_config(config))
    check_layers(folder, getattr(config, "num_hidden_layers", None), found)
    documents, tokenizer = documents_in(folder), _tokenizer(folder, model_type)
    return Source(
        kind=kind,
        name=name,
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        generation_config=_generation_config(folder, config, tokenizer.eos_token_id),
        files=tuple(path for path in sorted(folder.iterdir()) if path.is_file()),
        revision=revision,
        license=license_of_card(documents),
        documents=documents,
    )


def _without_drafts(raw: dict[str, Any], found: int) -> int:
    """The number of layers in files that may end with layers that predict further tokens."""
    claimed, drafts = raw.get("num_hidden_layers"), raw.get("num_nextn_predict_layers")
    if type(claimed) is int and 0 < claimed < found and drafts == found - claimed:
        return claimed
    return found


def _tokenizer(folder: Path, model_type: str) -> Any:
    """The tokenizer that tokenizer.json describes, or that transformers makes of other files.

    Raises:
        SourceError: there is none, it is damaged, or it needs code of the folder.
    """
    path = folder / "tokenizer.json"
    described, problem = path.is_file(), "cannot be read"
    if not described:
        path, problem = folder, "has no tokenizer.json, and none can be made of its other files"
        if (folder / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
            problem = "has no tokenizer.json; `pip install sentencepiece` to read tokenizer.model"
    # AutoTokenizer may build the class that tokenizer_config.json names, which forgets parts of
    # tokenizer.json: of Yi and SmolLM 2, for instance, how texts are split.
    kind = PreTrainedTokenizerFast if described else AutoTokenizer
    tokenizer = readable(path, lambda: kind.from_pretrained(folder, **_LOCAL), problem)
    if not getattr(tokenizer, "is_fast", False):
        raise SourceError(f"{folder} {problem}")
    if described and model_type in _TEKKEN and _splits_first(tokenizer):
        # Published files of this vocabulary split texts as another one does; transformers knows.
        tokenizer = readable(
            path, lambda: kind.from_pretrained(folder, fix_mistral_regex=True, **_LOCAL)
        )
    template = folder / "chat_template.json"  # of older models for images
    if tokenizer.chat_template is None and template.is_file():
        tokenizer.chat_template = _read_json(template).get("chat_template")
    tokenizer.chat_template = one_template(tokenizer.chat_template)
    return tokenizer


def _splits_first(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a tokenizer is Mistral's Tekken, with a pattern that splits texts."""
    steps = tokenizer.backend_tokenizer.pre_tokenizer
    return (
        isinstance(steps, pre_tokenizers.Sequence)
        and isinstance(steps[0], pre_tokenizers.Split)
        and tokenizer.backend_tokenizer.token_to_id("[INST]") is not None
    )


def _generation_config(folder: Path, config: PretrainedConfig, end: int | None) -> GenerationConfig:
    """How the model generates; `end`, the tokenizer's end token, also ends an answer."""
    path = folder / "generation_config.json"
    generation = GenerationConfig.from_model_config(config)
    if path.is_file():
        # It holds no code, and `trust_remote_code` would be kept as an option of the model.
        load = lambda: GenerationConfig.from_pretrained(folder, local_files_only=True)  # noqa: E731
        generation = readable(path, load)
    ids = generation.eos_token_id
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if end is not None and end not in ids:
        generation.eos_token_id = [*ids, end] if ids else end
    return generation


def _read_json(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise SourceError(f"{path} must hold a JSON object")
    return data
