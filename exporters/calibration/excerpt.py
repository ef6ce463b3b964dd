"""An excerpt of a text: passages from all over it, for a text may be larger than is needed."""

from __future__ import annotations

from dataclasses import dataclass

BETWEEN = "\n\n"
"""What separates one text from the next."""


@dataclass(frozen=True)
class Excerpt:
    """Part of what a source holds.

    Attributes:
        text: of all of its parts.
        size: characters of the whole source, estimated where it is not read to its end.
    """

    text: str
    size: int


def excerpt(text: str, characters: int, passage: int) -> str:
    """A text of about `characters` characters at most: whole, or passages at equal distances.

    Args:
        text: to take it from.
        characters: that are wanted.
        passage: characters of each passage.
    """
    if len(text) <= characters:
        return text
    count = max(1, characters // passage)
    length = min(passage, characters)
    starts = (index * (len(text) - length) // max(1, count - 1) for index in range(count))
    return BETWEEN.join(text[start : start + length] for start in starts)
