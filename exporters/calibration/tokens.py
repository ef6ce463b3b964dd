"""Chooses the calibration tokens: from the user's text, or from what the model writes itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from dash_onnx.core.errors import SourceError
from dash_onnx.core.facts import Calibration
from dash_onnx.core.progress import Phase
from dash_onnx.core.text import Message
from dash_onnx.exporters.calibration.reference import streamed_model
from dash_onnx.exporters.calibration.sampling import DOCUMENT_TOKEN, sample_tokens
from dash_onnx.exporters.calibration.texts import calibration_text, plain
from dash_onnx.exporters.sources import Source

SINK_TOKENS = 4
"""First tokens that soak up attention and carry massive activations (StreamingLLM, 2309.17453)."""

SEQUENCES = 64
LENGTH = 256

Ids = npt.NDArray[np.int64]


def calibration_ids(
    source: Source, files: Sequence[Path], seed: int, least_tokens: int = 0
) -> tuple[Ids, Calibration]:
    """Returns token ids `[sequences, length]` and where they came from.

    Args:
        files: see `calibration_text`; none lets the model write the text itself.
        seed: of the sampling.
        least_tokens: that the files must hold.

    Raises:
        SourceError: the file is missing, not text, or too short.
    """
    ids = _from_text(source, files, least_tokens) if files else _self_generated(source, seed)
    return ids, Calibration(
        source=", ".join(path.name for path in files) or "self-generated",
        sequences=ids.shape[0],
        tokens=ids.size,
        sink_tokens=SINK_TOKENS,
        seed=seed,
        sha256=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
    )


def _from_text(source: Source, files: Sequence[Path], least_tokens: int) -> Ids:
    def render(messages: Sequence[Message]) -> str:
        if source.tokenizer.chat_template is None:
            return plain(messages)
        return str(source.tokenizer.apply_chat_template(list(messages), tokenize=False))

    text = calibration_text(files, render)
    ids = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    length = min(LENGTH, source.config.max_position_embeddings)
    least = max(2 * length, least_tokens)
    if len(ids) < least:
        names = ", ".join(map(str, files))
        raise SourceError(f"{names} has {len(ids)} tokens; calibration needs at least {least}")
    count = min(SEQUENCES, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)  # spread over the whole file
    return np.stack([np.asarray(ids[start : start + length], np.int64) for start in starts])


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
    with Phase("calibration text", total=length - 1, unit="tokens") as bar:
        ids: Ids = sample_tokens(next_logits, first, length, generator, bar.update).numpy()
    return ids
