"""Text in and out: tokenizer, chat template, streaming detokenizer, EOS ids."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.conversation import Message, rendered
from dash_onnx.core.errors import BundleError, PolicyError, SourceError
from dash_onnx.core.thoughts import Tags, Thoughts

_NEAR = 8  # most tokens of white space between a prompt's last tag and its end
_ENDS = range(8, 12)  # a character takes up to 4 tokens
_SPACE = "\u2581"  # how SentencePiece vocabularies write a space
_DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers' defaults
# How byte-level vocabularies write bytes: what is printable as itself, the others from 256 on.
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTES = {chr(byte): byte for byte in _PRINTED}
_BYTES |= {chr(256 + number): byte for number, byte in enumerate(_OTHERS)}


class TextCodec:
    """Tokenizer and chat template of a bundle.

    Attributes:
        tokenizer: the tokenizer, of the `tokenizers` library.
        start_token_id: id of `bos_token`, if there is one.
        end_token_id: id of `eos_token`, if there is one.
        eos_token_ids: ids that end an answer.
        sampling: what generation_config.json says about temperature, top-k and the like.
        chat_template: its source, if there is one.
        tags: those of thoughts, if the vocabulary has them.
        control: ids of the control tokens, by their text, such as `<|im_end|>`.
        special: texts of the tokens that a template knows by name, such as `bos_token`.
    """

    def __init__(self, bundle: Bundle):
        """Reads `tokenizer.json` and, where they exist, the template and configurations.

        Raises:
            BundleError: a file is missing, damaged, or not what it should be.
        """
        path = bundle.verified("tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{path} is not a readable tokenizer: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tags = Tags.of(self.tokenizer)
        added = self.tokenizer.get_added_tokens_decoder().items()
        self.control = {token.content: number for number, token in added if token.special}
        self.special = _special_tokens(bundle)
        start, end = (self.special.get(name) for name in ("bos_token", "eos_token"))
        self.start_token_id: int | None = self.tokenizer.token_to_id(start) if start else None
        self.end_token_id: int | None = self.tokenizer.token_to_id(end) if end else None
        self.eos_token_ids = _eos_ids(bundle)
        self.sampling = _sampling(bundle)
        self.chat_template: str | None = None
        if "chat_template.jinja" in bundle:
            path = bundle.verified("chat_template.jinja")
            try:
                self.chat_template = path.read_text("utf-8")
            except UnicodeDecodeError:
                raise BundleError(f"{path} is not UTF-8 text; export again") from None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> npt.NDArray[np.int64]:
        """Token ids `[S]` of text.

        Args:
            add_special_tokens: as the tokenizer adds them to raw text.

        Raises:
            PolicyError: the text holds lone surrogates, as undecodable input does, or is not text.
        """
        if not isinstance(text, str):
            raise PolicyError(f"a prompt must be text or messages, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PolicyError("the text is not valid Unicode (was the input UTF-8?)") from None
        # As a batch: unlike `encode`, it lets other threads run meanwhile.
        (found,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return np.asarray(found.ids, np.int64)

    @property
    def begin(self) -> npt.NDArray[np.int64]:
        """Ids `[S]` that every text begins with, such as BOS."""
        return begin_of(self.encode)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        answer_next: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, ending where the assistant's answer begins.

        The template runs in jinja2's immutable sandbox, as in transformers, and within limits of
        time and memory.

        Args:
            messages: in order.
            answer_next: whether the assistant answers next, or continues its last message; if not,
                the text just ends.
            tools: tools that the assistant may call, in OpenAI's format; a template may ignore
                them.
            variables: variables of the template, such as `enable_thinking`; it may ignore them,
                too.

        Raises:
            PolicyError: there is no template, it refuses the messages, or they are not valid; or a
                variable is one that this method sets.
        """
        if self.chat_template is None:
            raise PolicyError("this model has no chat template; give a plain text prompt")
        values = {"tools": [*(tools or ())] or None, "add_generation_prompt": answer_next}
        if taken := {*values, *self.special, "messages"}.intersection(variables or ()):
            raise PolicyError(f"chat_template_kwargs cannot set {', '.join(sorted(taken))}")
        values = {**(variables or {}), **values}
        return rendered(self.chat_template, messages, values, self.special)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = (),
        variables: Mapping[str, Any] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Token ids `[S]` of a conversation, ready for the assistant's answer."""
        text = self.render_chat(messages, tools=tools, variables=variables)
        return self.encode(text, add_special_tokens=False)

    def encode_message(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids `[S]` of one user message; raw text if there is no chat template."""
        if self.chat_template is None:
            return self.encode(text)
        return self.encode_chat([{"role": "user", "content": text}])

    def thoughts(self, prompt: npt.NDArray[np.int64], most: int | None = None) -> Thoughts:
        """Where the answer to a prompt begins: in its thoughts, if the prompt opened them.

        Args:
            prompt: ids `[S]`.
            most: most tokens of thoughts.
        """
        end = prompt[-_NEAR:].tolist()
        at = max((n for n, token in enumerate(end) if token in (self.tags or ())[:2]), default=None)
        if at is None or self.tokenizer.decode(end[at + 1 :], skip_special_tokens=False).strip():
            return Thoughts(self.tags, None, most)
        return Thoughts(self.tags, end[at], most)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(list(ids))

    def end(self, ids: Sequence[int]) -> list[int]:
        """The last ids of a text, which decide how its continuation is decoded.

        A decoder of bytes takes them all for broken if the first is inside a character.
        """
        ends = [list(ids[-count:]) for count in _ENDS]
        return next((end for end in ends if not self.decode(end).startswith("\ufffd")), ends[-1])

    def token(self, token: int) -> str:
        """The vocabulary entry of an id, special tokens included."""
        return self.tokenizer.id_to_token(int(token)) or ""

    def piece(self, token: int) -> str:
        """The text of one token. Decoding it alone would drop a SentencePiece token's space."""
        entry = self.token(token)
        if _SPACE in entry:
            return entry.replace(_SPACE, " ")
        return self.tokenizer.decode([int(token)], skip_special_tokens=False)

    def piece_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one token stands for, even if they are part of a character."""
        text, entry = self.piece(token), self.token(token)
        if "\ufffd" in text:
            if entry.startswith("<0x") and len(entry) == 6:  # as SentencePiece writes a byte
                return bytes.fromhex(entry[3:5])
            if all(letter in _BYTES for letter in entry):
                return bytes(_BYTES[letter] for letter in entry)
        return text.encode("utf-8", "replace")


def begin_of(encode: Callable[..., npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """The ids `[S]` that a tokenizer puts before a text, without those that it puts behind it.

    Args:
        encode: tokenizes text; takes `add_special_tokens`.
    """
    framed, own = (encode("a", add_special_tokens=frame) for frame in (True, False))
    starts = range(len(framed) - len(own) + 1 if len(own) else 0)
    found = (start for start in starts if (framed[start : start + len(own)] == own).all())
    return framed[: next(found, 0 if len(own) else len(framed))]


class Detokenizer:
    """Turns a stream of ids into text, never splitting a multi-byte character."""

    def __init__(self, codec: TextCodec, before: Sequence[int] = ()):
        """Starts at the beginning of an answer, or after the ids of a text that it continues.

        Decoders of SentencePiece vocabularies leave out the space at the beginning of a text, not
        one inside it.
        """
        self._tokenizer = codec.tokenizer
        self._pending: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=True)
        for token in before:
            self.add(token)
        self._pending = []

    def add(self, token: int) -> str:
        """Returns the text that is complete with this token, possibly none."""
        held = [*self._pending, int(token)]
        try:
            text = self._stream.step(self._tokenizer, held[-1])
        except Exception:  # tokenizers' own: bytes that form no character changed what came before
            self._stream = DecodeStream(skip_special_tokens=True)
            text = "".join(self._stream.step(self._tokenizer, one) or "" for one in held)
        self._pending = [] if text else held
        return text or ""

    def finish(self) -> str:
        """Returns what an answer that ends inside a character still holds."""
        rest = self._tokenizer.decode(self._pending) if self._pending else ""
        self._pending = []
        return rest


def read_text(path: Path, *, empty: bool = False) -> str:
    """Reads a UTF-8 text file.

    Args:
        path: the file.
        empty: whether it may be empty.

    Raises:
        SourceError: missing, empty, or not text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # Windows puts a mark at the beginning
            if stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty():
                raise SourceError(f"{path} is a device, which may never end")
            text = file.read()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path} is not UTF-8 text") from None
    if not (empty or text.strip()):
        raise SourceError(f"{path} is empty")
    return text


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        SourceError: missing, empty, or not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SourceError(f"{path} is not JSON") from None


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a JSON lines file, each with its place (`file:line`) for messages.

    Raises:
        SourceError: missing, empty, not text, or a line is not JSON.
    """
    return json_records(read_text(path), str(path))


def json_records(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """Records of JSON lines, each with its place (`name:line`) for messages.

    Raises:
        SourceError: a line is not JSON.
    """
    # Not splitlines: JSON strings may hold other line separators than the newline.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise SourceError(f"{where} is not JSON") from None
        yield where, record


def _json(bundle: Bundle, name: str) -> dict[str, Any]:
    if name not in bundle:
        return {}
    path = bundle.verified(name)
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); export again") from None
    return data if isinstance(data, dict) else {}


def _special_tokens(bundle: Bundle) -> dict[str, str]:
    """Text of `bos_token` and the like, as templates see it."""
    name = "tokenizer_config.json"
    found: dict[str, Any] = {}
    for key, value in _json(bundle, name).items():
        if key.endswith("_token") and value:
            found[key] = value.get("content") if isinstance(value, dict) else value
            text = found[key]
            if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
                raise BundleError(f"{bundle.folder / name}: {key!r} is not text; export again")
    return found


def _sampling(bundle: Bundle) -> dict[str, float]:
    """The sampling that the model recommends: fields of `runtime.sampling.Sampling`."""
    name = "generation_config.json"
    config = _json(bundle, name)
    found = dict(_DRAWN) if config.get("do_sample") is True else {}
    for key in ("repetition_penalty", *found):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise BundleError(f"{bundle.folder / name}: {key!r} is not a number; export again")
        if key == "top_k" and isinstance(value, float):
            raise BundleError(f"{bundle.folder / name}: 'top_k' is not an integer; export again")
        if value is not None:
            found[key] = value
    return found


def _eos_ids(bundle: Bundle) -> frozenset[int]:
    name = "generation_config.json"
    ids = _json(bundle, name).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(type(token) is not int for token in ids):
        raise BundleError(f"{bundle.folder / name}: eos_token_id is not a token id; export again")
    return frozenset(ids)
