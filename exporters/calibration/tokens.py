"""Chooses the calibration tokens: from the user's text, or from what the model writes itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache

from dash_onnx.core.facts import Calibration
from dash_onnx.core.text import Message
from dash_onnx.exporters.calibration.draw import Ids, draw
from dash_onnx.exporters.calibration.records import plain
from dash_onnx.exporters.calibration.reference import streamed_model
from dash_onnx.exporters.calibration.sampling import DOCUMENT_TOKEN, sample_tokens
from dash_onnx.exporters.calibration.texts import TextSource, names_of
from dash_onnx.exporters.sources import Source

SINK_TOKENS = 4
"""First tokens that soak up attention and carry massive activations (StreamingLLM, 2309.17453)."""

SEQUENCES = 64
LENGTH = 256


def calibration_ids(
    source: Source, texts: Sequence[TextSource], seed: int, least_tokens: int = 0
) -> tuple[Ids, Calibration]:
    """Returns token ids `[sequences, length]` and where they came from.

    Args:
        texts: the user's own; none lets the model write the text itself.
        seed: of the sampling.
        least_tokens: that the texts must hold.

    Raises:
        SourceError: a text cannot be read, or all are too short.
    """
    ids = _from_text(source, texts, least_tokens) if texts else _self_generated(source, seed)
    return ids, Calibration(
        source=names_of(texts) or "self-generated",
        sequences=ids.shape[0],
        tokens=ids.size,
        sink_tokens=SINK_TOKENS,
        seed=seed,
        sha256=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
    )


def _from_text(source: Source, texts: Sequence[TextSource], least_tokens: int) -> Ids:
    def render(messages: Sequence[Message]) -> str:
        if source.tokenizer.chat_template is None:
            return plain(messages)
        return str(source.tokenizer.apply_chat_template(list(messages), tokenize=False))

    def encode(text: str) -> Ids:
        ids = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, np.int64)

    length = min(LENGTH, source.config.max_position_embeddings)
    least = max(2 * length, least_tokens)
    return draw(
        texts,
        render,
        encode,
        sequences=SEQUENCES,
        length=length,
        least=least,
        purpose="calibration",
    )


def _self_generated(source: Source, seed: int) -> Ids:
    """From where documents start.

    A chat-tuned model writes chats after its start token; documents are the better calibration
    (docs/decisions/0039).
    """
    model: Any = streamed_model(source)
    starts = (source.generation_config.bos_token_id, source.tokenizer.bos_token_id)
    start = next((token for token in starts if token), 0)
    start = source.tokenizer.get_vocab().get(DOCUMENT_TOKEN, start)
    length = min(LENGTH, source.config.max_position_embeddings)
    # transformers 5 calls the argument `past_key_values` at first, `cache` later.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    cache = {name: DynamicCache(config=model.config)}

    def next_logits(tokens: torch.Tensor, _: int) -> torch.Tensor:
        logits: torch.Tensor = model(tokens, **cache).logits[:, -1]
        return logits

    first, generator = torch.full((SEQUENCES,), start), torch.Generator().manual_seed(seed)
    with tqdm(total=length - 1, desc="calibration text", unit="tok", disable=None) as bar:
        ids: Ids = sample_tokens(next_logits, first, length, generator, bar.update).numpy()
    return ids
