"""Thoughts: what a model writes between tags such as <think> before it answers."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Tokenizer

_TAGS = (  # each pair with the text before and after the second one
    ("<think>", "\n", "</think>", "\n\n"),  # Qwen 3, SmolLM 3, DeepSeek's distilled models
    ("[THINK]", "", "[/THINK]", ""),  # Ministral 3
    ("<seed:think>", "", "</seed:think>", ""),  # Seed-OSS
    ("<|START_THINKING|>", "", "<|END_THINKING|>", ""),  # Command R7B
    ("<|channel>", "", "<channel|>", ""),  # Gemma 4
    ("<|channel|>", "<|end|><|start|>assistant<|channel|>final", "<|message|>", ""),  # gpt-oss
)
_NAMED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "<|channel>": (("<|channel>",), ()),
    "<|channel|>": (("<|channel|>", "<|start|>", "<|end|>"), ("final", "\u0120to")),
}
"""By tag: the tags that a channel's name follows; the name of the answer's, if it has one, and the
word before a recipient, which makes a message a call."""


class Tags(NamedTuple):
    """The tags of a model.

    Attributes:
        open: id of the token before thoughts.
        close: id of the token after them.
        ending: ids that end thoughts which have reached their limit; `close` is one of them.
        heads: ids that a name follows, up to `close` or a new line, which is not text.
        final: id of the name that makes `close` end thoughts; None: it always does.
        to: id of the word in a header that makes a message a call, which has no limit.
    """

    open: int
    close: int
    ending: tuple[int, ...]
    heads: frozenset[int] = frozenset()
    final: int | None = None
    to: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Tags | None:
        """The first tags that the vocabulary has; None where it has none."""
        for opening, before, closing, after in _TAGS:
            heads, names = _NAMED.get(opening, ((), ()))
            wanted = (opening, closing, *heads, *names)
            known = ((text, tokenizer.token_to_id(text)) for text in wanted)
            ids = {text: number for text, number in known if number is not None}
            if not ids.keys() >= {*wanted}:
                continue
            head, tail = (
                tokenizer.encode(text, add_special_tokens=False).ids for text in (before, after)
            )
            ending = (*head, ids[closing], *tail)
            named = frozenset(ids[text] for text in heads)
            return cls(ids[opening], ids[closing], ending, named, *(ids[name] for name in names))
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
        self._answers = tags is not None and tags.final is None  # whether `close` ends them
        self.open = tags is not None and last == tags.open
        self._name: list[int] | None = None  # ids since a head, up to `close`
        self._called = False  # whether the message, or its header so far, is a call
        if self.open and not self._answers:
            self._name = []
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
        if (tags := self._tags) is not None and belongs:
            self._count += not (opened or (self._called and self._name is None))
            closes = token == tags.close and self._answers
            self.open = (self.open or opened) and not closes
            if tags.final is not None:
                self._named(token, tags)
            self._limit()
        return belongs

    def _named(self, token: int, tags: Tags) -> None:
        """Follows the names of channels."""
        if token == tags.open:  # perhaps behind a role
            self._called = self._called and self._name is not None and self._name[0] in tags.heads
            self._name = []
        elif token == tags.close:
            self._name = None
        elif token in tags.heads:
            self._name, self._called = [token], False
        elif self._name is not None:
            self._name.append(token)
            self._called = self._called or token == tags.to
            self._answers = self._name[0] == tags.final

    def _limit(self) -> None:
        reached = self._most is not None and self._count >= self._most
        if self._tags is None or not (self.open and reached) or self.due:
            return
        if self._name is None and not self._called:
            self.due = [*self._tags.ending]
        elif self._name == [] and self._tags.final is not None:
            self.due = [self._tags.final, self._tags.close]
