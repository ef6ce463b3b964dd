"""Tokens as a reader sees them: their text, and what kind of text it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from dash_onnx.core.text import TextCodec

TokenKind: TypeAlias = Literal[
    "word start", "word continuation", "punctuation", "digit", "whitespace", "special"
]
KINDS: tuple[TokenKind, ...] = get_args(TokenKind)

_PART = "\ufffd"  # decoded form of a token that holds only some bytes of a character


@dataclass(frozen=True)
class Token:
    """One token of a text.

    Attributes:
        text: its text, including a leading space.
        kind: class by which figures are grouped.
    """

    text: str
    kind: TokenKind


def describe(codec: TextCodec, ids: Sequence[int]) -> tuple[Token, ...]:
    """The tokens of a text; whether one continues a word depends on the one before it."""
    added = codec.tokenizer.get_added_tokens_decoder()
    special = {token for token, entry in added.items() if entry.special}
    tokens: list[Token] = []
    before = ""
    for token in map(int, ids):
        text = codec.piece(token)
        tokens.append(Token(text, "special" if token in special else _kind(text, before)))
        before = "" if token in special else text
    return tuple(tokens)


def visible(text: str, limit: int) -> str:
    """A short form of a token's text with visible white space."""
    shown = "".join(_MARKS.get(char, char if char.isprintable() else "·") for char in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


_MARKS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def _kind(text: str, before: str) -> TokenKind:
    content = text.strip()
    if not content:
        return "whitespace"
    if content[0].isnumeric():
        return "digit"
    if not any(_in_word(char) for char in content):
        return "punctuation"
    continues = before != "" and _in_word(before[-1]) and not text[0].isspace()
    return "word continuation" if continues else "word start"


def _in_word(char: str) -> bool:
    return char.isalnum() or char == _PART
