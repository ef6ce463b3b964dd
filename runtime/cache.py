"""The K/V of a conversation, kept between its generations."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dash_onnx.core.arrays import Ids, common_length
from dash_onnx.core.errors import DashError
from dash_onnx.runtime.prefix import Saved
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Sessions


class Cache:
    """The KV cache of a conversation, for one generation at a time."""

    def __init__(self, sessions: Sessions):
        """Starts empty."""
        self.tokens: list[int] = []
        self._sequence = sessions.new_sequence()
        self._busy = threading.Lock()

    def __len__(self) -> int:
        """Tokens it holds."""
        return self._sequence.length

    def __repr__(self) -> str:
        return f"<Cache: {len(self)} tokens>"

    def acquire(self, ids: Ids) -> tuple[SequenceState, Ids]:
        """Takes the sequence; returns it with the part of the prompt that it does not hold yet.

        Raises:
            DashError: another generation is using it.
        """
        self._take()
        # The last token runs again: it gives the logits.
        common = common_length(np.asarray(self.tokens, np.int64), ids[:-1])
        common = self._sequence.truncate(common)
        del self.tokens[common:]
        return self._sequence, ids[common:]

    def save(self, path: Path, facts: Mapping[str, str] | None = None) -> None:
        """Writes it to a file of safetensors' form, all or nothing.

        Args:
            path: of the file.
            facts: further text to keep in it.

        Raises:
            DashError: it is empty, in use, or the package safetensors is missing.
            BundleError: no file can lie there.
        """
        with self._taken():
            if not self.tokens:
                raise DashError("there is nothing to save yet")
            saved = Saved.of(self._sequence, self.tokens)
            saved.write(path, self._sequence.sessions.manifest, facts)

    def load(self, path: Path) -> dict[str, str]:
        """Takes what a file holds in place of its own; returns the facts in it.

        Raises:
            SourceError: the file is missing, damaged, or of another bundle.
            DashError: it is in use, or the package safetensors is missing.
        """
        with self._taken():
            saved, facts = Saved.read(path, self._sequence.sessions.manifest)
            saved.restore(self._sequence, len(saved.tokens))
            self.tokens = saved.tokens.tolist()
        return facts

    def _take(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise DashError("this cache is in use by another generation; give each its own")

    @contextmanager
    def _taken(self) -> Iterator[None]:
        self._take()
        try:
            yield
        finally:
            self._busy.release()

    def release(self) -> None:
        """Gives the sequence back; an interrupted run leaves no half-written token behind."""
        held = min(self._sequence.length, len(self.tokens))
        del self.tokens[self._sequence.truncate(held) :]
        self._busy.release()
