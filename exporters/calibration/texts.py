"""Sources of the user's own text: files, folders, standard input or datasets, with weights."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias

from dash_onnx.core.documents import Render, file_texts, record_text
from dash_onnx.core.errors import SourceError, printable
from dash_onnx.core.text import json_records, read_text
from dash_onnx.exporters.calibration.excerpt import BETWEEN, Excerpt, excerpt
from dash_onnx.exporters.calibration.hub import PREFIX, HubDataset

SUFFIXES = (".txt", ".md", ".jsonl")
"""Suffixes of the files that are read from a folder."""

_MIN_WEIGHT, _MAX_WEIGHT = 1e-6, 1e6  # limits of weights


class Content(Protocol):
    """The readable content of a source."""

    @property
    def name(self) -> str:
        """The name in manifests and messages."""

    def excerpt(self, render: Render, characters: int, passage: int) -> Excerpt:
        """Passages from all over the content, about `characters` characters at most.

        Args:
            render: turns a conversation into text.
            characters: requested length.
            passage: characters per passage.

        Raises:
            SourceError: it cannot be read, or holds no text.
        """

    def sha256(self) -> str:
        """Hash of the content: a different text has a different one.

        Raises:
            SourceError: as for `excerpt`.
        """


class Files:
    """A file, or all files of `SUFFIXES` below a folder, in the order of their paths."""

    def __init__(self, path: Path):
        """Does not read anything yet."""
        self._path = path
        self.name = printable(path.name or path.resolve().name)  # file names may hold any bytes

    def excerpt(self, render: Render, characters: int, passage: int) -> Excerpt:
        """See `Content`."""
        text = BETWEEN.join(text for path in self._paths() for text in file_texts(path, render))
        return Excerpt(excerpt(text, characters, passage), len(text))

    def sha256(self) -> str:
        """See `Content`."""
        digest = hashlib.sha256()
        for path in self._paths():
            content = hashlib.sha256(read_text(path).encode()).hexdigest()
            digest.update(f"{path.suffix == '.jsonl'} {content}\n".encode())
        return digest.hexdigest()

    def _paths(self) -> list[Path]:
        if not self._path.is_dir():
            return [self._path]
        below = sorted(self._path.rglob("*"), key=lambda path: path.relative_to(self._path).parts)
        found = [path for path in below if self._is_text(path)]
        if not found:
            raise SourceError(
                f"{self._path} holds no text: no {', '.join(SUFFIXES)} below it "
                f"(a folder of parquet is a dataset: {PREFIX}{self._path})"
            )
        return found

    def _is_text(self, path: Path) -> bool:
        """Excludes hidden files, such as the packages of a `.venv`."""
        hidden = any(part.startswith(".") for part in path.relative_to(self._path).parts)
        return not hidden and path.suffix in SUFFIXES and path.is_file() and path.stat().st_size > 0


class Stream:
    """Standard input or a pipe: text, or JSON lines where the first line is an object."""

    name = "-"

    def __init__(self, pipe: Path | None = None):
        """Does not read anything yet.

        Args:
            pipe: a pipe, such as the shell's `<(zcat chats.gz)`; None is standard input.
        """
        self._pipe = pipe
        self._where = str(pipe or "standard input")

    def excerpt(self, render: Render, characters: int, passage: int) -> Excerpt:
        """See `Content`."""
        text = self._text
        if _is_object(text.lstrip().partition("\n")[0]):
            records = json_records(text, self._where)
            text = BETWEEN.join(record_text(record, where, render) for where, record in records)
        return Excerpt(excerpt(text, characters, passage), len(text))

    def sha256(self) -> str:
        """See `Content`."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @cached_property
    def _text(self) -> str:
        """All of the text; export and training share it, since it can be read only once."""
        content = self._pipe.read_bytes() if self._pipe else sys.stdin.buffer.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise SourceError(f"{self._where} is not UTF-8 text") from None
        if not text.strip():
            raise SourceError(f"{self._where} is empty")
        return text


@dataclass(frozen=True)
class TextSource:
    """A source of text and its weight relative to others.

    Attributes:
        content: where its text is read from.
        weight: its share of the tokens, relative to the others'; None weights by size.
    """

    content: Content
    weight: float | None = None

    @property
    def name(self) -> str:
        """As the user spelled it, without folders."""
        return self.content.name + ("" if self.weight is None else f"@{self.weight:g}")

    def sha256(self) -> str:
        """Hash of the content and the weight."""
        return hashlib.sha256(f"{self.content.sha256()} {self.weight}".encode()).hexdigest()


TextLike: TypeAlias = TextSource | Path | str
"""A source; a path, taken literally; or a spelling, see `text_sources`."""


def text_sources(given: TextLike | Sequence[TextLike]) -> tuple[TextSource, ...]:
    """Parses spellings; nothing is read.

    Args:
        given: one, or several: a file, a folder, `-` for standard input, or a dataset (`hub.FORM`).
            A weight may follow, as in `chats.jsonl@0.5`. A spelling that exists as a path is one.

    Raises:
        SourceError: a weight or a spelling is not valid, or only some sources have weights.
    """
    given = (given,) if isinstance(given, str | Path | TextSource) else given
    sources = tuple(map(_source, given))
    without = [source.name for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise SourceError(f"give every text a weight, as in {without[0]}@0.5, or none")
    if sum(source.content.name == "-" for source in sources) > 1:
        raise SourceError("one text may come from standard input (-) or a pipe, not several")
    return sources


def names_of(sources: Sequence[TextSource]) -> str:
    """Their names, as shown in manifests and messages."""
    return ", ".join(source.name for source in sources)


def _source(given: TextLike) -> TextSource:
    if isinstance(given, TextSource):
        return given
    if given == "":  # pathlib takes it for the current folder
        raise SourceError("a text has an empty name: name a file, a folder, - or a dataset")
    path = Path(given)
    if path.is_fifo():
        return TextSource(Stream(path))
    if isinstance(given, Path) or path.exists():
        return TextSource(Files(path))
    spelling, weight = _weight(given)
    if spelling == "-":
        return TextSource(Stream(), weight)
    if spelling.startswith(PREFIX):
        return TextSource(HubDataset(spelling), weight)
    return TextSource(Files(Path(spelling)), weight)


def _weight(spelling: str) -> tuple[str, float | None]:
    before, _, after = spelling.rpartition("@")
    try:
        weight = float(after)
    except ValueError:
        return spelling, None
    if not before:
        return spelling, None
    if not _MIN_WEIGHT <= weight <= _MAX_WEIGHT:
        raise SourceError(
            f"the weight of {spelling} must lie in {_MIN_WEIGHT:g}..{_MAX_WEIGHT:g}, "
            f"as in {before}@0.5"
        )
    return before, weight


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
