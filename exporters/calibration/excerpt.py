"""An excerpt of a text: passages from all over it, since a text may be larger than needed."""

from __future__ import annotations

from dataclasses import dataclass

BETWEEN = "\n\n"
"""What separates one text from the next."""


@dataclass(frozen=True)
class Excerpt:
    """Part of what a source holds.

    Attributes:
        text: its parts, joined.
        size: characters in the whole source, estimated where it is not read to its end.
    """

    text: str
    size: int


def excerpt(text: str, characters: int, passage: int) -> str:
    """The whole text, or evenly spaced passages, about `characters` characters at most.

    Args:
        text: the text to take it from.
        characters: requested length.
        passage: characters per passage.
    """
    if len(text) <= characters:
        return text
    count = max(1, characters // passage)
    length = min(passage, characters)
    starts = (index * (len(text) - length) // max(1, count - 1) for index in range(count))
    return BETWEEN.join(text[start : start + length] for start in starts)
