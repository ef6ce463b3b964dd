"""Thoughts: what a model writes between tags such as <think> before it answers."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Tokenizer

_TAGS = (  # each pair with the white space before and after the second one
    ("<think>", "\n", "</think>", "\n\n"),  # Qwen 3, SmolLM 3, DeepSeek's distilled models
    ("[THINK]", "", "[/THINK]", ""),  # Ministral 3
    ("<seed:think>", "", "</seed:think>", ""),  # Seed-OSS
)


class Tags(NamedTuple):
    """The tags of a model.

    Attributes:
        open: id of the token before thoughts.
        close: id of the token after them.
        ending: ids that end thoughts which have reached their limit; `close` is one of them.
    """

    open: int
    close: int
    ending: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Tags | None:
        """The first tags that the vocabulary has; None where it has none."""
        for opening, before, closing, after in _TAGS:
            first, last = tokenizer.token_to_id(opening), tokenizer.token_to_id(closing)
            if first is not None and last is not None:
                head, tail = (
                    tokenizer.encode(space, add_special_tokens=False).ids
                    for space in (before, after)
                )
                return cls(first, last, (*head, last, *tail))
        return None


class Thoughts:
    """Where one answer is: before its thoughts, inside or after them.

    Attributes:
        open: whether the next token is inside them.
        opening: id of the token that may begin them now; None if none may.
        due: ids that must come next, because they have reached their limit.
    """

    def __init__(self, tags: Tags | None = None, last: int | None = None, most: int | None = None):
        """Begins an answer.

        Args:
            tags: those of the model; None: it has no thoughts.
            last: the tag that the prompt ends with, if any.
            most: most tokens between the tags; None: no limit.
        """
        self._tags, self._most, self._count = tags, most, 0
        self.open = tags is not None and last == tags.open
        self.opening = tags.open if tags is not None and last is None else None
        self.due: list[int] = []
        self._limit()

    def took(self, token: int) -> bool:
        """Advances past a token of the answer; returns whether it belongs to its thoughts.

        Their tags do, and the white space that follows them when they reach their limit.
        """
        opened = token == self.opening
        belongs = opened or self.open or bool(self.due)
        self.opening, self.due = None, self.due[1:]
        if self._tags is not None and belongs:
            self._count += not opened
            self.open = (self.open or opened) and token != self._tags.close
            self._limit()
        return belongs

    def _limit(self) -> None:
        reached = self._most is not None and self._count >= self._most
        if self._tags is not None and self.open and reached and not self.due:
            self.due = [*self._tags.ending]
