"""The forms that people's text comes in and the model's own does not."""

from __future__ import annotations

import random
import re
import textwrap

import torch
from tokenizers import Tokenizer

from dash_onnx.exporters.train.frozen import Tensor

_WIDTHS = (45, 90)  # characters of a wrapped line


def in_other_forms(ids: Tensor, tokenizer: Tokenizer, seed: int) -> Tensor:
    """The same text `[B, T]`, parts of it as corpora, books and hasty writers would have it.

    A scorer that saw one form only takes the others for other text: see docs/decisions/0016.

    Args:
        ids: `[B, T]`, special tokens among them.
        tokenizer: that reads them, and reads their text again.
        seed: of what is drawn for each row.
    """
    draw = random.Random(seed)
    tokens = tokenizer.get_added_tokens_decoder().values()
    special = "|".join(re.escape(token.content) for token in tokens if token.special) or "(?!)"
    rows = list(ids)
    for number, row in enumerate(ids):
        forms = [form for form, share in _SHARES if draw.random() < share]
        if not forms:
            continue
        text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
        parts = re.split(f"({special})", text)  # in turns: text, a special token, text, ...
        for form in forms:
            parts[::2] = [form(part, draw) for part in parts[::2]]
        read = tokenizer.encode("".join(parts), add_special_tokens=False).ids[: len(row)]
        # Other forms mostly take more tokens. Where they do not, the row's own end follows.
        rows[number] = torch.cat([row.new_tensor(read), row[len(read) :]])
    return torch.stack(rows)


def _spaced(text: str, _: random.Random) -> str:
    """Punctuation apart from words, as corpora are tokenized."""
    return re.sub(r" +", " ", re.sub(r"(?<!\w)[^\w\s]|[^\w\s](?!\w)", r" \g<0> ", text))


def _wrapped(text: str, draw: random.Random) -> str:
    """Lines of one width, as books and mails have them."""
    width = draw.randint(*_WIDTHS)
    lines = text.split("\n")
    return "\n".join(textwrap.fill(line, width, break_long_words=False) for line in lines)


def _lower(text: str, _: random.Random) -> str:
    return text.lower()


_SHARES = ((_spaced, 0.4), (_wrapped, 0.4), (_lower, 0.15))  # of the rows, each drawn by itself
