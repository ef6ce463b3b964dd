"""Training text: what the model writes itself, or the user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import SourceError
from dash_onnx.core.text import Message, TextCodec
from dash_onnx.exporters.calibration.self_written import DOCUMENT_TOKEN, write_text
from dash_onnx.exporters.calibration.texts import calibration_text, plain
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.options import LEAST_SEQUENCES


def training_ids(
    bundle: Bundle,
    codec: TextCodec,
    files: Sequence[Path],
    sequences: int,
    length: int,
    seed: int,
) -> Tensor:
    """Token ids `[sequences, length]`, int64, shuffled.

    Args:
        bundle: writes the text where there are no files.
        codec: its tokenizer.
        files: text, or JSON lines with prompts and responses or with messages.
        sequences: how many are wanted; files may hold fewer, but at least `LEAST_SEQUENCES`.
        length: tokens of each; cut to the model's context.
        seed: of the sampling and the order.

    Raises:
        SourceError: a file is missing, not text, not of this form, or all are too short.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(length, bundle.manifest.model.max_length)
    if not files:
        first = _first_tokens(bundle, codec, sequences, generator).numpy()
        drawing = np.random.default_rng(seed)
        return torch.from_numpy(write_text(bundle, first, length, drawing, "training text"))

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
    bundle: Bundle, codec: TextCodec, sequences: int, generator: torch.Generator
) -> Tensor:
    """Half begin as the tokenizer begins a text (often a chat), half as documents begin.

    Where the vocabulary has no token for that, with random tokens (LLM-QAT, arXiv 2305.17888).
    """
    vocab = min(bundle.manifest.model.vocab_size, codec.tokenizer.get_vocab_size())
    first = torch.randint(vocab, (sequences,), generator=generator)
    document = codec.tokenizer.token_to_id(DOCUMENT_TOKEN)
    if document is not None:
        first[:] = document
    start = codec.start_token_id
    if start is not None:
        first[::2] = start
    return first
