"""An excerpt of a text: passages from all over it, for a text may be larger than is needed."""

from __future__ import annotations

from dataclasses import dataclass

PASSAGE = 4096
"""Characters of a passage: a few sequences long, so that most sequences lie within one."""

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


def excerpt(text: str, characters: int) -> str:
    """A text of about `characters` characters at most: whole, or passages at equal distances."""
    if len(text) <= characters:
        return text
    count = max(1, characters // PASSAGE)
    length = min(PASSAGE, characters)
    starts = (index * len(text) // count for index in range(count))
    return BETWEEN.join(text[start : start + length] for start in starts)
