"""Training text: what the model writes itself, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.text import Message, TextCodec
from dash_onnx.exporters.calibration.draw import draw
from dash_onnx.exporters.calibration.records import plain
from dash_onnx.exporters.calibration.self_written import DOCUMENT_TOKEN, write_text
from dash_onnx.exporters.calibration.texts import TextSource
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.options import LEAST_SEQUENCES


def training_ids(
    bundle: Bundle,
    codec: TextCodec,
    texts: Sequence[TextSource],
    sequences: int,
    length: int,
    seed: int,
) -> Tensor:
    """Token ids `[sequences, length]`, int64, shuffled.

    Args:
        bundle: writes the text where there is none.
        codec: its tokenizer.
        texts: the user's own.
        sequences: how many are wanted; texts may hold fewer, but at least `LEAST_SEQUENCES`.
        length: tokens of each; cut to the model's context.
        seed: of the sampling and the order.

    Raises:
        SourceError: a text cannot be read, or all are too short.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(length, bundle.manifest.model.max_length)
    if not texts:
        first = _first_tokens(bundle, codec, sequences, generator).numpy()
        drawing = np.random.default_rng(seed)
        return torch.from_numpy(write_text(bundle, first, length, drawing, "training text"))

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
