"""The K/V of a conversation, kept between its generations."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dash_onnx.core.errors import DashError
from dash_onnx.runtime.generate import Piece, Request
from dash_onnx.runtime.prefix import Saved
from dash_onnx.runtime.scheduler import run
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Sessions
from dash_onnx.runtime.slot import Slot


class Cache:
    """The KV cache of a conversation, for one generation at a time."""

    def __init__(self, sessions: Sessions):
        """Starts empty."""
        self._slot = Slot(0, SequenceState(sessions), cache_key=None)
        self._busy = threading.Lock()

    def __len__(self) -> int:
        """Tokens it holds."""
        return self._slot.state.length

    def __repr__(self) -> str:
        return f"<Cache: {len(self)} tokens>"

    def of(self, sessions: Sessions) -> bool:
        """Whether it is for a model with these sessions."""
        return self._slot.state.sessions is sessions

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the tokens it holds."""
        return tuple(self._slot.tokens)

    def generation(self, request: Request[Piece]) -> Generator[Piece]:
        """Runs a request in this cache."""
        with self.taken() as slot:
            yield from run(request, slot)

    def save(self, path: str | Path, facts: Mapping[str, str] | None = None) -> None:
        """Writes it to a safetensors file, all or nothing.

        Args:
            path: the file.
            facts: more text to store in it, by name.

        Raises:
            DashError: it is empty, in use, or the package safetensors is missing.
            BundleError: no file can be written there.
        """
        with self.taken() as slot:
            if not slot.tokens:
                raise DashError("there is nothing to save yet")
            saved = Saved.of(slot.state, slot.tokens)
            saved.write(Path(path), slot.state.sessions.manifest, facts)

    def load(self, path: str | Path) -> dict[str, str]:
        """Replaces its content with that of a file; returns the facts stored there.

        Raises:
            SourceError: the file is missing, damaged, or of another bundle.
            DashError: it is in use, or the package safetensors is missing.
        """
        with self.taken() as slot:
            saved, facts = Saved.read(Path(path), slot.state.sessions.manifest)
            saved.restore(slot.state, len(saved.tokens))
            slot.tokens = saved.tokens.tolist()
        return facts

    @contextmanager
    def taken(self) -> Iterator[Slot]:
        """Lends its slot; an interrupted run leaves no half-written token behind.

        Raises:
            DashError: another generation has it.
        """
        if not self._busy.acquire(blocking=False):
            raise DashError("this cache is in use by another generation; give each its own")
        slot = self._slot
        try:
            yield slot
        finally:
            held = min(slot.state.length, len(slot.tokens))
            del slot.tokens[slot.state.truncate(held) :]
            self._busy.release()
