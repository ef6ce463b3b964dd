"""Text of a Hugging Face dataset, by its hub id or in a local folder; none of its code is run."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Container
from functools import cached_property
from pathlib import Path
from typing import Any

from dash_onnx.core.documents import ANSWERED, ASKED, Render, record_text
from dash_onnx.core.errors import SourceError
from dash_onnx.exporters.calibration.excerpt import BETWEEN, Excerpt, excerpt

PREFIX = "hub:"
FORM = "hub:DATASET[,CONFIG][:SPLIT[:COLUMN]]"

_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubDataset:
    """The rows of one split; they are read when text is requested.

    Attributes:
        name: the spelling, without the path of a local folder, since bundles are shared.
    """

    def __init__(self, spelling: str):
        """Parses the spelling.

        Args:
            spelling: `FORM`. DATASET is a hub id (`org/name`) or a local folder. An empty SPLIT
                is `train`, or the only one; without COLUMN the columns are found by the
                names that the keys of JSON lines have.

        Raises:
            SourceError: the spelling does not have this form.
        """
        # Not at the colon of a drive.
        parts: list[str] = re.split(r":(?![\\/])", spelling.removeprefix(PREFIX))
        dataset, _, self._config = parts[0].partition(",")
        if not dataset or len(parts) > 3:
            raise SourceError(f"{spelling} is not of the form {FORM}")
        self._dataset = dataset
        self._split, self._column = (*parts[1:], "", "")[:2]
        self._local = Path(dataset).is_dir()
        self.name = self._spelling = spelling
        if self._local:
            self.name = spelling.replace(dataset, Path(dataset).resolve().name, 1)

    def excerpt(self, render: Render, characters: int, passage: int) -> Excerpt:
        """See `Content`; a passage is a run of rows.

        Raises:
            SourceError: there is no such dataset, split or column, or it holds no text.
        """
        rows, total = self._rows, len(self._rows)
        runs = max(1, min(characters // passage, total))
        each = characters // runs
        parts: list[str] = []
        read = size = 0
        for run in range(runs):
            texts: list[str] = []
            length = 0
            for index in range(run * total // runs, (run + 1) * total // runs):
                if length >= each:
                    break
                read += 1
                if text := self._text(rows[index], index, render):
                    texts.append(text)
                    length += len(text)
            size += length
            if texts:
                parts.append(BETWEEN.join(texts))
        if not any(part.strip() for part in parts):
            raise SourceError(f"{self._spelling} holds no text in {', '.join(rows.column_names)}")
        # Rows may be of very different sizes: what short runs leave goes to the long ones.
        ascending = sorted(range(len(parts)), key=lambda part: len(parts[part]))
        for taken, part in enumerate(ascending):
            parts[part] = excerpt(parts[part], characters // (len(parts) - taken), passage)
            characters -= len(parts[part])
        return Excerpt(BETWEEN.join(parts), size * total // read)

    def sha256(self) -> str:
        """Hash of the dataset's fingerprint: it identifies revision, configuration and split."""
        content = f"{self._rows._fingerprint} {self._column}"
        return hashlib.sha256(content.encode()).hexdigest()

    def _text(self, row: dict[str, Any], index: int, render: Render) -> str:
        """Text of one row; empty if its columns are, as happens in many datasets."""
        where = f"{self._spelling}, row {index},"
        record = row
        if self._column:
            value = row[self._column]
            if not isinstance(value, str | list | None):
                raise SourceError(f"{where} holds no text and no messages in {self._column}")
            record = {"messages" if isinstance(value, list) else "text": value}
        keys = [("text", "messages")] if self._column or not _pair(row) else [ASKED, ANSWERED]
        if not all(any(record.get(name) for name in names) for names in keys):
            return ""
        return record_text(record, where, render)

    @cached_property
    def _rows(self) -> Any:
        """The split, with only the text columns."""
        splits = self._load()
        split = self._split or (next(iter(splits)) if len(splits) == 1 else "train")
        if split not in splits:
            raise SourceError(
                f"{self._spelling} has no split {split}; it has {', '.join(splits)}: "
                f"name one, {FORM}"
            )
        rows = splits[split]
        names = self._columns(rows.column_names)
        return rows.select_columns(names)

    def _columns(self, names: list[str]) -> list[str]:
        """The columns that hold the text."""
        known = [("text",), ("messages",)] + ([(*ASKED, *ANSWERED)] if _pair(names) else [])
        wanted = [(self._column,)] if self._column else known
        for choice in wanted:
            if found := [name for name in names if name in choice]:
                return found
        raise SourceError(
            f"{self._spelling} has no column {self._column or 'of a usual name'}; it has "
            f"{', '.join(names)}: name one that holds texts or messages, {FORM}"
        )

    def _load(self) -> Any:
        """All splits, by name."""
        try:
            import datasets
        except ImportError:
            raise SourceError(
                f"{self._spelling} needs the package datasets: `pip install datasets`"
            ) from None
        if not self._local and not _ID.fullmatch(self._dataset):
            raise SourceError(
                f"{self._spelling}: {self._dataset} is neither a folder nor the id of a dataset "
                "(org/name)"
            )
        for name in ("datasets", "huggingface_hub"):  # they log a line for each of many attempts
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        config = self._config or None
        try:
            try:
                return datasets.load_dataset(self._dataset, config)
            except ConnectionError:
                return datasets.load_dataset(self._downloaded(), config)
        except SourceError:
            raise
        except datasets.exceptions.DatasetNotFoundError:
            raise SourceError(
                f"{self._spelling}: the hub has no dataset {self._dataset}, or it is gated or "
                "private: check the name, or run `hf auth login`"
            ) from None
        except Exception as error:  # third-party files can raise anything
            reason = _line(error.__cause__ or error)
            remedy = f"; choose one, {FORM}" if "onfig" in reason else ""
            raise SourceError(f"{self._spelling} cannot be opened: {reason}{remedy}") from None

    def _downloaded(self) -> str:
        """The folder that `hf download` left, which the library overlooks when offline."""
        from huggingface_hub import constants, snapshot_download

        try:
            return snapshot_download(self._dataset, repo_type="dataset", local_files_only=True)
        except Exception:
            raise SourceError(
                f"{self._spelling}: "
                + (
                    "HF_HUB_OFFLINE is set"
                    if constants.HF_HUB_OFFLINE
                    else "the hub is unreachable"
                )
                + f" and the cache has no {self._dataset}: go online once, or give a local folder"
            ) from None


def _pair(names: Container[str]) -> bool:
    """Whether there are prompts and responses."""
    return all(any(name in names for name in keys) for keys in (ASKED, ANSWERED))


def _line(error: BaseException) -> str:
    return " ".join(str(error).partition("Example of usage")[0].split()).rstrip(".")
