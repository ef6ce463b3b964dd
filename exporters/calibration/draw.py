"""Draws token sequences from the user's texts: spread over each, in proportion to the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from weakref import WeakSet

import numpy as np

from dash_onnx.core.arrays import Ids
from dash_onnx.core.documents import Render
from dash_onnx.core.errors import SourceError
from dash_onnx.exporters.calibration.excerpt import BETWEEN, Excerpt, excerpt
from dash_onnx.exporters.calibration.texts import TextSource, names_of

_CHARACTERS = 16  # read for each requested token: far more than a token takes in any language
_SPLIT = 1.1  # tokens per character; a character known to the tokenizer takes at most one
_SAMPLE = 65536  # characters on which this is measured

_log = logging.getLogger(__name__)
_warned: WeakSet[TextSource] = WeakSet()  # export and training both read a source: once is enough


def draw(
    sources: Sequence[TextSource],
    render: Render,
    encode: Callable[[str], Ids],
    *,
    sequences: int,
    length: int,
    least: int,
    purpose: str,
    begin: Ids,
) -> Ids:
    """Token ids `[B, length]`, int64, in the order of the sources.

    Without weights the sources are concatenated, so that each counts by its size.

    Args:
        sources: at least one; either all have weights or none has.
        render: turns a conversation into text.
        encode: tokenizes to `[S]`, without special tokens.
        sequences: requested number of sequences; B is lower where the texts are too short.
        length: tokens per sequence.
        least: minimum number of tokens that the texts must hold.
        purpose: what the tokens are for, in messages.
        begin: ids that the model expects at the beginning of every text, such as BOS.

    Raises:
        SourceError: a source cannot be read, or the texts are too short.
    """
    passage = _CHARACTERS * length
    characters = sequences * passage
    parts = [source.content.excerpt(render, characters, passage) for source in sources]
    for source, part in zip(sources, parts, strict=True):
        _check_language(source, excerpt(part.text, _SAMPLE, passage), encode)
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        texts = [encode(part.text) for part in parts]
    else:
        texts, weights = [encode(_joined(parts, characters, passage))], [1.0]
    shares = [weight / sum(weights) for weight in weights]
    # The shares are kept even where one text is short: then there are fewer tokens in total.
    allowed = [int(len(ids) / share) for ids, share in zip(texts, shares, strict=True)]
    if (most := min(allowed)) < least:
        found = f"{names_of(sources)} has {most} tokens"
        if len(texts) > 1:
            short = allowed.index(most)
            found = (
                f"{sources[short].name} has {len(texts[short])} tokens, with which its weight "
                f"allows {most} in all"
            )
        raise SourceError(f"{found}; {purpose} needs at least {least}")
    limits = [len(ids) // length for ids in texts]
    counts = _counts(min(sequences, most // length), shares, limits)
    if sum(counts) < (needed := min(sequences, least // length)):
        raise SourceError(
            f"{names_of(sources)} hold {sum(counts)} passages of {length} tokens; {purpose} needs "
            f"at least {needed}: join short texts in one file"
        )
    own = length - len(begin)
    rows = [
        np.concatenate([begin, ids[start : start + own]])
        for ids, count in zip(texts, counts, strict=True)
        for start in np.linspace(0, len(ids) - own, count).astype(int)
    ]
    return np.stack(rows)


def _joined(parts: Sequence[Excerpt], characters: int, passage: int) -> str:
    """All parts as one text; if that is too long, each part is cut in proportion to its size."""
    total = sum(part.size for part in parts)
    if total <= characters:
        return BETWEEN.join(part.text for part in parts)
    return BETWEEN.join(
        excerpt(part.text, characters * part.size // total, passage) for part in parts
    )


def _counts(total: int, shares: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Number of sequences per text, by largest remainder; sums to `total` if the limits allow."""
    wanted = [total * share for share in shares]
    counts = [min(int(number), limit) for number, limit in zip(wanted, limits, strict=True)]
    for _ in range(total - sum(counts)):
        left = [index for index, count in enumerate(counts) if count < limits[index]]
        if left:
            counts[max(left, key=lambda index: wanted[index] - counts[index])] += 1
    return counts


def _check_language(source: TextSource, text: str, encode: Callable[[str], Ids]) -> None:
    rate = len(encode(text)) / max(1, len(text))
    if rate <= _SPLIT or source in _warned:
        return
    _warned.add(source)
    _log.warning(
        "%s is a text that the tokenizer does not know: it splits it into bytes (%.1f tokens per "
        "character); calibration will be poor, so use text in a language that the model knows",
        source.name,
        rate,
    )
