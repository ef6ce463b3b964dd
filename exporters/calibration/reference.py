"""The source model in transformers with streamed weights: only a few layers in memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from dash_onnx.exporters.sources import Source, Table

_KEEP_BYTES = 1 << 30  # layers stay loaded if all of them in FP32 fit in this


def streamed_model(source: Source) -> PreTrainedModel:
    """Builds the transformers model in FP32, each decoder layer loaded only while it runs.

    Only the rows of per-layer embeddings that the tokens use are loaded.

    Source: the hooks follow the idea of accelerate's disk offloading; here the weights come
    from any `Weights`, GGUF included.
    """
    config = source.config
    if "lm_head.weight" in source.weights and config.tie_word_embeddings:
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False  # as transformers does where the two differ
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    decoder = model.get_decoder()
    layers = dict(decoder.layers.named_children())
    prefix = next(name for name, module in model.named_modules() if module is decoder.layers)
    inside = {
        f"{prefix}.{index}.{name}"
        for index, layer in layers.items()
        for name, _ in layer.named_parameters()
    }
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings():
            _stream_rows(module, Table(source.weights, f"{name}.weight"))
            inside.add(f"{name}.weight")
    outside = {
        name: source.weights[name].float()
        for name, _ in model.named_parameters()
        if name not in inside and name in source.weights
    }
    model.load_state_dict(outside, strict=False, assign=True)
    model.tie_weights()

    layer_bytes = 4 * sum(p.numel() for layer in layers.values() for p in layer.parameters())
    keep = layer_bytes <= _KEEP_BYTES
    for index, layer in layers.items():
        _stream(layer, source, f"{prefix}.{index}.", keep)
    return model


def _stream_rows(embedding: torch.nn.Embedding, table: Table) -> None:
    def load(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        ids, places = arguments[0].unique(return_inverse=True)
        rows = torch.cat([table[index : index + 1] for index in ids.tolist()])
        module.weight = torch.nn.Parameter(rows.float(), requires_grad=False)
        return (places,)

    embedding.padding_idx = None  # it would be a row of these
    embedding.register_forward_pre_hook(load)


def _stream(layer: torch.nn.Module, source: Source, prefix: str, keep: bool) -> None:
    def load(module: torch.nn.Module, _: Any) -> None:
        names = [name for name, p in module.named_parameters() if p.is_meta]
        if names:  # buffers are weights where the files have them
            buffers = (name for name, _ in module.named_buffers())
            names += [name for name in buffers if prefix + name in source.weights]
            state = {name: stored(module, name) for name in names}
            module.load_state_dict(state, strict=False, assign=True)

    def stored(module: torch.nn.Module, name: str) -> torch.Tensor:
        if name.endswith("bias") and prefix + name not in source.weights:  # as of some GGUF files
            return torch.zeros(module.get_parameter(name).shape)
        return source.weights[prefix + name].float()

    def drop(module: torch.nn.Module, _args: Any, _output: Any) -> None:
        module.to("meta")

    layer.register_forward_pre_hook(load)
    if not keep:
        layer.register_forward_hook(drop)
