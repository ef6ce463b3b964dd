"""Training text: what the model writes itself, or the user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dash_onnx.core.actions import Action
from dash_onnx.core.errors import SourceError
from dash_onnx.core.progress import Phase
from dash_onnx.core.text import Message, TextCodec
from dash_onnx.exporters.calibration.sampling import DOCUMENT_TOKEN, NextLogits, sample_tokens
from dash_onnx.exporters.calibration.texts import calibration_text, plain
from dash_onnx.exporters.train.dequantized import DequantizedModel, Tensor
from dash_onnx.exporters.train.options import LEAST_SEQUENCES

_BATCH = 96  # sequences generated side by side


def training_ids(
    model: DequantizedModel,
    codec: TextCodec,
    files: Sequence[Path],
    sequences: int,
    length: int,
    seed: int,
) -> Tensor:
    """Token ids `[sequences, length]`, int64, shuffled.

    Args:
        model: writes the text where there are no files.
        codec: its tokenizer.
        files: text, or JSON lines with prompts and responses or with messages.
        sequences: how many are wanted; files may hold fewer, but at least `LEAST_SEQUENCES`.
        length: tokens of each; cut to the model's context.
        seed: of the sampling and the order.

    Raises:
        SourceError: a file is missing, not text, not of this form, or all are too short.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(length, model.manifest.model.max_length)
    if not files:
        first = _first_tokens(model, codec, sequences, generator)
        return _generated(model, first, length, generator)

    def render(messages: Sequence[Message]) -> str:
        if codec.chat_template is None:
            return plain(messages)
        return codec.render_chat(messages, answer_next=False)

    ids = torch.from_numpy(codec.encode(calibration_text(files, render)))
    count = min(len(ids) // length, sequences)
    if count < LEAST_SEQUENCES:
        names = ", ".join(map(str, files))
        least = LEAST_SEQUENCES * length
        raise SourceError(f"{names} has {len(ids)} tokens; training needs at least {least}")
    starts = torch.linspace(0, len(ids) - length, count).long()  # spread over all of it
    rows = torch.stack([ids[start : start + length] for start in starts.tolist()])
    return rows[torch.randperm(count, generator=generator)]


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
    with Phase("training text", total=total, unit="tokens") as bar:
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
