"""Training text: what the model writes itself, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from dash_onnx.core.actions import Action
from dash_onnx.core.text import Message, TextCodec
from dash_onnx.exporters.calibration.draw import draw
from dash_onnx.exporters.calibration.records import plain
from dash_onnx.exporters.calibration.sampling import DOCUMENT_TOKEN, NextLogits, sample_tokens
from dash_onnx.exporters.calibration.texts import TextSource
from dash_onnx.exporters.train.dequantized import DequantizedModel, Tensor
from dash_onnx.exporters.train.options import LEAST_SEQUENCES

_BATCH = 96  # sequences generated side by side


def training_ids(
    model: DequantizedModel,
    codec: TextCodec,
    texts: Sequence[TextSource],
    sequences: int,
    length: int,
    seed: int,
) -> Tensor:
    """Token ids `[sequences, length]`, int64, shuffled.

    Args:
        model: writes the text where there is none.
        codec: its tokenizer.
        texts: the user's own.
        sequences: how many are wanted; texts may hold fewer, but at least `LEAST_SEQUENCES`.
        length: tokens of each; cut to the model's context.
        seed: of the sampling and the order.

    Raises:
        SourceError: a text cannot be read, or all are too short.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(length, model.manifest.model.max_length)
    if not texts:
        first = _first_tokens(model, codec, sequences, generator)
        return _generated(model, first, length, generator)

    def render(messages: Sequence[Message]) -> str:
        if codec.chat_template is None:
            return plain(messages)
        return codec.render_chat(messages, answer_next=False)

    rows = draw(
        texts,
        render,
        codec.encode,
        sequences=sequences,
        length=length,
        least=LEAST_SEQUENCES * length,
        purpose="training",
    )
    return torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)]


def _first_tokens(
    model: DequantizedModel, codec: TextCodec, sequences: int, generator: torch.Generator
) -> Tensor:
    """Half begin as the tokenizer begins a text (often a chat), half as documents begin.

    Where the vocabulary has no token for that, with random tokens (LLM-QAT, arXiv 2305.17888).
    """
    vocab = min(model.manifest.model.vocab_size, codec.tokenizer.get_vocab_size())
    first = torch.randint(vocab, (sequences,), generator=generator)
    document = codec.tokenizer.token_to_id(DOCUMENT_TOKEN)
    if document is not None:
        first[:] = document
    start = codec.start_token_id
    if start is not None:
        first[::2] = start
    return first


def _generated(
    model: DequantizedModel, first: Tensor, length: int, generator: torch.Generator
) -> Tensor:
    """What the model writes at its best precision, `[sequences, length]`."""
    parts = first.split(_BATCH)
    total = len(parts) * (length - 1)
    with tqdm(total=total, desc="training text", unit="tok", disable=None) as bar:
        rows = [
            sample_tokens(decoder(model, len(part), length), part, length, generator, bar.update)
            for part in parts
        ]
    return torch.cat(rows)


def decoder(model: DequantizedModel, sequences: int, length: int) -> NextLogits:
    """Decodes sequences from the first token on; none is longer than `length`."""
    action: Action = model.actions[0]
    caches = [model.new_cache(sequences, length) for _ in model.manifest.layers]
    rotary = model.rotary(length)

    def next_logits(tokens: Tensor, position: int) -> Tensor:
        x = model.embed(tokens)
        for layer, cache in enumerate(caches):
            queries, keys_values = model.qkv(layer, action, model.normed(layer, x))
            attention = model.attend_cached(layer, queries, keys_values, rotary, cache, position)
            x = model.complete(layer, action, x, attention)
        return model.logits(model.final(x))[:, 0]

    return next_logits
