"""Constrained answers, through llguidance: tokens that a grammar forbids are never drawn."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dash_onnx.core.errors import PolicyError
from dash_onnx.runtime.schema import closed

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from dash_onnx.core.text import TextCodec


_LOG = logging.getLogger(__name__)
_OPTIONS = {
    "whitespace_flexible": False,  # no unlimited white space
    "item_separator": ", ",  # as models write JSON: without the spaces their answers get worse
    "key_separator": ": ",
    "lenient": True,  # leaves out what a grammar cannot hold, and says so
}


def closed_schema(schema: Any) -> Any:
    """A JSON schema with only the properties that it lists, and patterns that a grammar can hold.

    Raises:
        PolicyError: llguidance is missing, or the schema is nested too deeply.
    """
    _llguidance()
    with _refusing():
        return closed(schema, _kept)


def with_options(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    """A closed JSON schema with llguidance's options.

    Raises:
        PolicyError: see `closed_schema`.
    """
    found = closed_schema(schema)
    if isinstance(found, bool):
        found = {} if found else {"enum": []}
    return {**found, "x-guidance": _OPTIONS}


def _kept(pattern: str) -> bool:
    """Whether a pattern of a schema is kept."""
    if not _holds(pattern):
        _LOG.warning("grammar: pattern %.100r is left out, as a grammar cannot hold it", pattern)
    return _holds(pattern)


@lru_cache(1 << 10)
def _holds(pattern: str) -> bool:
    """Whether a grammar can hold a pattern of a schema."""
    matcher = _llguidance().LLMatcher
    schema = json.dumps({"type": "string", "pattern": pattern})
    with contextlib.suppress(PolicyError), _refusing():
        return not matcher.validate_grammar(matcher.grammar_from_json_schema(schema))
    return False


@dataclass(frozen=True)
class Grammar:
    """Constrains an answer; created by one of its class methods.

    Attributes:
        source: the grammar as llguidance writes it.
    """

    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        """JSON on one line that matches a schema; True allows any JSON.

        Objects have only the properties that the schema lists, unless it says otherwise, as with
        `additionalProperties`. What a grammar cannot hold, such as `uniqueItems`, is left out, with
        a warning in the log.

        Raises:
            PolicyError: llguidance is missing, or the schema is not valid.
        """
        if not isinstance(schema, Mapping | bool):
            raise PolicyError(f"a JSON schema must be an object, not {type(schema).__name__}")
        return cls._made("json_schema", json.dumps(with_options(schema)))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that fully matches a regular expression in Rust's syntax.

        Raises:
            PolicyError: see `json_schema`.
        """
        return cls._made("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A context-free grammar in llguidance's variant of Lark's notation.

        Raises:
            PolicyError: see `json_schema`.
        """
        return cls._made("lark", text)

    @classmethod
    def _made(cls, kind: str, text: str) -> Grammar:
        matcher = _llguidance().LLMatcher
        with _refusing():
            return cls(getattr(matcher, f"grammar_from_{kind}")(text))


class Constraint:
    """What a grammar allows at each token of one answer."""

    def __init__(self, grammar: Grammar, tokenizer: LLTokenizer):
        """Begins an answer.

        Args:
            grammar: grammar of the answer.
            tokenizer: from `guidance_tokenizer`.

        Raises:
            PolicyError: the grammar is invalid, or too large.
        """
        matcher = _llguidance().LLMatcher
        with _refusing():
            wrong, told = matcher.validate_grammar_with_warnings(grammar.source, tokenizer)
            if wrong:
                raise ValueError(" ".join(told))
            if told:
                _LOG.warning("grammar: %.500r", " ".join(told))
            self._matcher, self._tokenizer = matcher(tokenizer, grammar.source), tokenizer
        self._bits = np.zeros((tokenizer.vocab_size + 31) // 32, np.int32)
        self._cuts: dict[bytes, list[int]] = {}  # how the model has split such text
        self._hinted, self._came = b"", list[int]()  # text of a hint, and the tokens since

    def masked(
        self, logits: npt.NDArray[np.floating], also: int | None = None
    ) -> npt.NDArray[np.floating]:
        """Logits `[V]` with those of forbidden tokens at minus infinity.

        Args:
            logits: logits of all tokens.
            also: a token that is allowed, whatever the grammar says.

        Raises:
            PolicyError: no token may follow.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)]
        if self._matcher.is_error() or not allowed.any():
            raise PolicyError(f"the grammar did not complete: {self._matcher.get_error()}")
        if also is not None:
            allowed[also] = 1
        return np.where(allowed, logits, np.array(-np.inf, logits.dtype))

    def took(self, *tokens: int) -> None:
        """Advances past tokens that the answer now has."""
        self._matcher.consume_tokens([*tokens])
        for token in tokens if self._hinted else ():
            self._came.append(token)
            made = self._tokenizer.decode_bytes(self._came)
            if made == self._hinted:
                self._cuts[made] = self._came
            if len(made) >= len(self._hinted):
                self._hinted, self._came = b"", []
                break

    def forced(self) -> list[int]:
        """The next tokens, if the grammar allows only one text, as the tokenizer splits it."""
        return self._matcher.compute_ff_tokens()

    def hint(self) -> list[int]:
        """Likely next tokens, of the only text that the grammar allows.

        They are not forced: the end of that text may be the beginning of a longer token. Such text
        is split as the model split it earlier in this answer, else as the tokenizer does.
        """
        text: bytes = self._matcher.compute_ff_bytes()
        if not self._hinted:
            self._hinted, self._came = text, []
        return self._cuts.get(text) or self._tokenizer.tokenize_bytes(text)


def guidance_tokenizer(text: TextCodec, vocab_size: int) -> LLTokenizer:
    """A tokenizer as llguidance reads it; takes a few tenths of a second.

    Raises:
        PolicyError: llguidance is missing, or the model has no end token: no answer could end.
    """
    if not text.eos_token_ids:
        raise PolicyError("this model has no end token, so a grammar cannot end an answer")
    tokenizer: LLTokenizer = _llguidance().LLTokenizer(
        text.tokenizer.to_str(), n_vocab=vocab_size, eos_token=sorted(text.eos_token_ids)
    )
    return tokenizer


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's Rust part may panic, which is no Exception
        raise PolicyError(f"the grammar is refused: {error}") from None


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise PolicyError(
            "a grammar needs the package llguidance: `pip install llguidance`"
        ) from None
    return llguidance
