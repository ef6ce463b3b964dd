"""Training text: what the model writes itself, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.documents import renderer
from dash_onnx.core.text import TextCodec
from dash_onnx.exporters.calibration.draw import draw
from dash_onnx.exporters.calibration.self_written import self_written
from dash_onnx.exporters.calibration.texts import TextSource
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.options import MIN_SEQUENCES


def training_ids(
    bundle: Bundle,
    codec: TextCodec,
    texts: Sequence[TextSource],
    sequences: int,
    length: int,
    seed: int,
) -> Tensor:
    """Token ids `[sequences, length]`, int64, in random order.

    Args:
        bundle: writes the text if there are no `texts`.
        codec: its tokenizer.
        texts: the user's own.
        sequences: requested number; texts may hold fewer, but at least `MIN_SEQUENCES`.
        length: tokens per sequence; capped at the model's context.
        seed: seed for sampling and order.

    Raises:
        SourceError: a text cannot be read, or all are too short.
    """
    if not texts:
        ids = self_written(bundle, codec, sequences, length, seed, "training text")
        return torch.as_tensor(ids)

    length = min(length, bundle.manifest.model.max_length)
    rows = draw(
        texts,
        renderer(codec),
        partial(codec.encode, add_special_tokens=False),
        sequences=sequences,
        length=length,
        least=MIN_SEQUENCES * length,
        purpose="training",
        begin=codec.begin,
    )
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(rows[torch.randperm(len(rows), generator=generator, device="cpu")])
