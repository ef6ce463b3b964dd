"""Training text: what the model writes itself, or the user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dash_onnx.core.actions import Action
from dash_onnx.core.errors import SourceError
from dash_onnx.core.text import Message, TextCodec
from dash_onnx.exporters.calibration.sampling import DOCUMENT_TOKEN, NextLogits, sample_tokens
from dash_onnx.exporters.calibration.texts import calibration_text, plain
from dash_onnx.exporters.train.frozen import Frozen, Tensor

LENGTH = 256
"""Tokens of a training sequence."""

LEAST_SEQUENCES = 8

_BATCH = 96  # sequences generated side by side


def training_ids(
    frozen: Frozen, codec: TextCodec, files: Sequence[Path], sequences: int, seed: int
) -> Tensor:
    """Token ids `[sequences, length]`, shuffled.

    Args:
        frozen: the model, which writes the text where there are no files.
        codec: its tokenizer.
        files: text, or JSON lines with prompts and responses or with messages.
        sequences: how many are wanted; files may hold fewer, but at least 8.
        seed: of the sampling and the order.

    Raises:
        SourceError: a file is missing, not text, not of this form, or all are too short.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(LENGTH, frozen.manifest.model.max_length)
    if not files:
        first = _first_tokens(frozen, codec, sequences, generator)
        return _generated(frozen, first, length, generator)

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
    frozen: Frozen, codec: TextCodec, sequences: int, generator: torch.Generator
) -> Tensor:
    """Half begin as the tokenizer begins a text (often a chat), half as documents begin.

    Where the vocabulary has no token for that, with random tokens (LLM-QAT, arXiv 2305.17888).
    """
    vocab = min(frozen.manifest.model.vocab_size, codec.tokenizer.get_vocab_size())
    first = torch.randint(vocab, (sequences,), generator=generator)
    document = codec.tokenizer.token_to_id(DOCUMENT_TOKEN)
    if document is not None:
        first[:] = document
    start = codec.start_token_id
    if start is not None:
        first[::2] = start
    return first


def _generated(frozen: Frozen, first: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """What the model writes at its best precision, `[sequences, length]`."""
    parts = first.split(_BATCH)
    total = len(parts) * (length - 1)
    with tqdm(total=total, desc="training text", unit="tok", disable=None) as bar:
        rows = [
            sample_tokens(decoder(frozen, len(part), length), part, length, generator, bar.update)
            for part in parts
        ]
    return torch.cat(rows)


def decoder(frozen: Frozen, sequences: int, length: int) -> NextLogits:
    """Decodes sequences from the first token on; none is longer than `length`."""
    action: Action = frozen.actions[0]
    caches = [frozen.new_cache(sequences, length) for _ in frozen.manifest.layers]
    tables = frozen.rotary(length)

    def next_logits(tokens: Tensor, position: int) -> Tensor:
        now = slice(position, position + 1)
        rotary = [(cos[now], sin[now]) for cos, sin in tables]
        x = frozen.embed(tokens)
        for layer, cache in enumerate(caches):
            normed = frozen.normed(layer, x)
            queries, keys_values = frozen.split(layer, frozen.qkv(layer, action, normed))
            attention = frozen.attend_cached(layer, queries, keys_values, rotary, cache, position)
            x = frozen.complete(layer, action, x, attention)
        return frozen.logits(frozen.final(x))[:, 0]

    return next_logits
