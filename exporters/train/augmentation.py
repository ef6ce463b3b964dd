"""Text augmentation: the model's own text in layouts that people's text has and its own has not."""

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
"""Rewrites a text; what it varies it draws."""

_WIDTHS = (45, 90)  # characters of a wrapped line


def spaced(text: str, _: random.Random) -> str:
    """Punctuation apart from words, as corpora are tokenized."""
    return re.sub(r" +", " ", re.sub(r"(?<!\w)[^\w\s]|[^\w\s](?!\w)", r" \g<0> ", text))


def wrapped(text: str, draw: random.Random) -> str:
    """Lines of one width, as books and mails have them."""
    width = draw.randint(*_WIDTHS)
    lines = text.split("\n")
    return "\n".join(textwrap.fill(line, width, break_long_words=False) for line in lines)


def lower(text: str, _: random.Random) -> str:
    """Lower case, as hasty writers have it."""
    return text.lower()


SHARES: tuple[tuple[Layout, float], ...] = ((spaced, 0.4), (wrapped, 0.4), (lower, 0.15))
"""Of the rows that get each layout; drawn one by one, so that a row may get several."""


def augmented(
    ids: Tensor,
    tokenizer: Tokenizer,
    seed: int,
    shares: Sequence[tuple[Layout, float]] = SHARES,
) -> Tensor:
    """The same text with some rows rewritten, `[B, T]`.

    A scorer that saw one layout only takes the others for another kind of text.

    Args:
        ids: `[B, T]`, special tokens among them.
        tokenizer: that reads them, and reads their text again.
        seed: of what is drawn for each row.
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
        parts = re.split(f"({special})", text)  # in turns: text, a special token, text, ...
        for layout in layouts:
            parts[::2] = [layout(part, draw) for part in parts[::2]]
        read = tokenizer.encode("".join(parts), add_special_tokens=False).ids[: len(row)]
        # Other layouts mostly take more tokens. Where they do not, the row's own end follows.
        rows[number] = torch.cat([row.new_tensor(read), row[len(read) :]])
    return torch.stack(rows)
