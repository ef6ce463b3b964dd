"""From generated tokens to text: chunks, each with the facts about its token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dash_onnx.core.text import Detokenizer, TextCodec
from dash_onnx.runtime.results import Chunk, FinishReason, GeneratedToken


class TextWriter:
    """Turns the tokens of one generation into chunks of text: of its thoughts, then of its answer.

    The white space around thoughts belongs to neither.
    """

    def __init__(
        self,
        codec: TextCodec,
        prompt_tokens: int,
        stop: Sequence[str],
        before: Sequence[int] = (),
        shown: Collection[int] = (),
    ):
        """Begins; holds back what may become one of the stop strings.

        Args:
            codec: the vocabulary.
            prompt_tokens: tokens of the prompt, for the chunks.
            stop: strings that end the text.
            before: the last ids of the text that is continued, if it is not a new answer.
            shown: ids of special tokens that are text.
        """
        self._codec, self._prompt_tokens = codec, prompt_tokens
        self._detokenizer, tags = Detokenizer(codec, before), codec.tags
        self._heads = tags.heads if tags is not None else frozenset[int]()
        self._tags = self._heads.union((tags or ())[:2])
        self._naming = False  # whether a channel's name is written, which is not text
        self._stop, self._shown, self._held, self._count = stop, shown, "", 0
        self._fresh = False  # white space that comes now is around thoughts
        self._thinking = False

    def add(self, step: GeneratedToken) -> Chunk:
        """The chunk of a token; one with a finish reason is the last."""
        self._count += 1
        if step.thinking != self._thinking:
            self._thinking, self._fresh, self._held = step.thinking, True, ""
        reason, held = step.finish_reason, self._held
        if step.thinking and step.token in self._tags:
            held += self._detokenizer.finish()
            self._detokenizer, self._naming = Detokenizer(self._codec), step.token in self._heads
        elif step.thinking and self._naming:
            self._naming = "\n" not in self._codec.piece(step.token)
        elif reason != "stop":  # the EOS token itself is not text
            held += self._detokenizer.add(step.token)
            if step.token in self._shown and not step.thinking:
                held += self._codec.piece(step.token)
        if reason is not None:
            held += self._detokenizer.finish()
        if self._fresh:
            held = held.lstrip()
            self._fresh = not held
        text, reasoning = "", ""
        if step.thinking:
            reasoning = held.rstrip()
            self._held = held[len(reasoning) :]
        else:
            text, reason = self._answer(held, reason)
        told = step.token, step.path, step.ms, reason, step.draft, step.logprobs, step.thinking
        return Chunk(
            *told,
            text=text,
            reasoning=reasoning,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._count,
        )

    def _answer(self, held: str, reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        """The text that cannot become a stop string, and the finish reason if one ends it."""
        cut = min((at for at in (held.find(word) for word in self._stop) if at >= 0), default=-1)
        if cut >= 0:
            text, held, reason = held[:cut], "", "stop"
        elif reason is not None:
            text, held = held, ""
        else:
            safe = min((begins(held, word) for word in self._stop), default=len(held))
            text, held = held[:safe], held[safe:]
        self._held = held
        return text, reason


def begins(text: str, word: str) -> int:
    """Where a word begins in a text, perhaps cut off by its end; if nowhere, the text's length."""
    if (at := text.find(word)) >= 0:
        return at
    sizes = range(min(len(word) - 1, len(text)), 0, -1)
    return len(text) - next((size for size in sizes if text.endswith(word[:size])), 0)
