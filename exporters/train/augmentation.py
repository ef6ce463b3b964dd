"""Text augmentation: puts the model's own text into layouts that occur only in human text."""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from tokenizers import Tokenizer

from dash_onnx.exporters.train.dequantized import Tensor

Layout: TypeAlias = Callable[[str, random.Random], str]
"""Rewrites a text, with any variation drawn from the random generator."""

_WIDTHS = (45, 90)  # characters per wrapped line


def spaced(text: str, _: random.Random) -> str:
    """Separates punctuation from words, as in tokenized corpora."""
    return re.sub(r" +", " ", re.sub(r"(?<!\w)[^\w\s]|[^\w\s](?!\w)", r" \g<0> ", text))


def wrapped(text: str, draw: random.Random) -> str:
    """Wraps lines at one width, as in books and emails."""
    width = draw.randint(*_WIDTHS)
    lines = text.split("\n")
    return "\n".join(textwrap.fill(line, width, break_long_words=False) for line in lines)


def lower(text: str, _: random.Random) -> str:
    """Converts to lower case, as in hasty writing."""
    return text.lower()


SHARES: tuple[tuple[Layout, float], ...] = ((spaced, 0.4), (wrapped, 0.4), (lower, 0.15))
"""Share of the rows that get each layout; drawn independently, so a row may get several."""


def augmented(
    ids: Tensor,
    tokenizer: Tokenizer,
    seed: int,
    shares: Sequence[tuple[Layout, float]] = SHARES,
) -> Tensor:
    """The same text with some rows rewritten, `[B, T]`.

    A scorer trained on a single layout mistakes the others for a different kind of text.

    Args:
        ids: `[B, T]`, special tokens among them.
        tokenizer: decodes them, and encodes the rewritten text.
        seed: seed of what is drawn for each row.
        shares: the layouts, each with its probability.
    """
    draw = random.Random(seed)
    tokens = tokenizer.get_added_tokens_decoder().values()
    special = "|".join(re.escape(token.content) for token in tokens if token.special) or "(?!)"
    rows = list(ids)
    for number, row in enumerate(ids):
        layouts = [layout for layout, share in shares if draw.random() < share]
        if not layouts:
            continue
        text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
        parts = re.split(f"({special})", text)  # alternating: text, a special token, text, ...
        for layout in layouts:
            parts[::2] = [layout(part, draw) for part in parts[::2]]
        read = tokenizer.encode("".join(parts), add_special_tokens=False).ids[: len(row)]
        # Most rewritten rows take more tokens. Shorter ones are filled up with the row's own end.
        rows[number] = torch.cat([row.new_tensor(read), row[len(read) :]])
    return torch.stack(rows)
