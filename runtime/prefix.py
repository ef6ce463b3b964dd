"""K/V that outlive their sequence: of a prompt's prefix in memory, or of a conversation on disk.

Files are in safetensors format, and only a bundle with the layers that wrote them reads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_onnx.core.arrays import Ids, common_length
from dash_onnx.core.atomic import new_file
from dash_onnx.core.contract import EMBED_PATH
from dash_onnx.core.errors import BundleError, DashError, SourceError
from dash_onnx.core.manifest import Manifest
from dash_onnx.runtime.buffers import Buffer
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.states import Arrays

_LOG = logging.getLogger(__name__)

MIN_PREFIX = 8
"""Least tokens to copy: running fewer of them again costs no more than copying K/V and states."""

_MIN_KEPT = 32  # least tokens of a text that is worth storing

_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


def identity_of(manifest: Manifest) -> str:
    """A digest that bundles share if their layers write the same K/V, whatever their policies."""
    files = {
        name: file.sha256
        for name, file in sorted(manifest.files.items())
        if name.startswith(("layers/", EMBED_PATH))
    }
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


@dataclass
class Saved:
    """Tokens and their K/V, copied out of a sequence.

    Attributes:
        tokens: ids `[S]`.
        arrays: by name, keys and values `[H_kv, S, d]` of each layer.
        places: states of layers without K/V, by tokens that they have seen; see `States.saved`.
        cache_key: that of the requests that it serves, see `Request.cache_key`; a conversation's is
            empty.
    """

    tokens: Ids
    arrays: dict[str, npt.NDArray[Any]]
    cache_key: str = ""
    places: dict[int, Arrays] = field(default_factory=dict)

    @classmethod
    def of(cls, state: SequenceState, tokens: Sequence[int], cache_key: str = "") -> Saved:
        """Copies what a sequence holds of its tokens."""
        length = state.kv.place(min(len(tokens), state.length))
        arrays = {name: buffer.array[0, :, :length].copy() for name, buffer in _buffers(state)}
        ids = np.array(tokens[:length], np.int64)
        return cls(ids, arrays, cache_key, _places(state, length))

    def restore(self, state: SequenceState, length: int) -> None:
        """Writes the first tokens into an empty sequence, as many as `place` returned."""
        _fill(state, self.arrays, self.places, length)

    def place(self, length: int) -> int:
        """The longest prefix, of at most `length` tokens, that a sequence can continue from."""
        if not self.places:
            return length
        return max((place for place in self.places if place <= length), default=0)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        every = [self.arrays, *self.places.values()]
        return sum(array.nbytes for arrays in every for array in arrays.values())

    def write(self, path: Path, manifest: Manifest, facts: Mapping[str, str] | None = None) -> None:
        """Writes a file, all or nothing.

        Args:
            path: the file.
            manifest: manifest of the bundle.
            facts: more text to store in it, by name.

        Raises:
            DashError: safetensors is missing.
            BundleError: there is no such folder, or no file can be written there.
        """
        library = _safetensors()
        told = {**(facts or {}), "bundle": identity_of(manifest), "cache_key": self.cache_key}
        with new_file(path) as temporary:
            arrays = {**self.arrays, "tokens": self.tokens}
            for place, states in self.places.items():
                arrays |= {f"{name}.{place}": array for name, array in states.items()}
            try:
                library.numpy.save_file(arrays, str(temporary), metadata=told)
            except library.SafetensorError as error:  # such as of a full disk
                raise BundleError(f"cannot write {path}: {error}") from None

    @classmethod
    def read(cls, path: Path, manifest: Manifest) -> tuple[Saved, dict[str, str]]:
        """What a file holds, and the facts in it.

        Raises:
            SourceError: it is missing, damaged, or of another bundle.
            DashError: safetensors is missing.
        """
        library = _safetensors()
        try:
            with library.safe_open(str(path), "np") as file:
                facts = dict(file.metadata() or {})
                if facts.get("bundle") != identity_of(manifest):
                    told = "another bundle, or to this one before a training: use another file"
                    raise SourceError(f"{path} belongs to {told}")
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, library.SafetensorError) as error:
            raise SourceError(f"cannot read {path}: {error}") from None
        tokens = arrays.pop("tokens", None)
        dims, facts_of_model = manifest.dims, manifest.model
        length = len(tokens) if tokens is not None and tokens.ndim == 1 else 0
        wanted = {
            f"{kind}.{layer}": manifest.dims_of(layer).cache_shape(1, length)[1:]
            for kind in ("keys", "values")
            for layer in manifest.attending
        }
        places = _states_of(arrays, manifest, length)
        fits = (
            0 < length <= facts_of_model.max_length
            and tokens.dtype == np.int64
            and 0 <= int(tokens.min()) <= int(tokens.max()) < facts_of_model.vocab_size
            and {name: array.shape for name, array in arrays.items()} == wanted
            and (length in places or not manifest.recurrence)
            and all(array.dtype == dims.cache_dtype for array in arrays.values())
        )
        if not fits:
            raise SourceError(f"{path} does not hold the KV cache of its bundle")
        return cls(tokens, arrays, facts.get("cache_key", ""), places), facts


def copy_prefix(held: SequenceState, state: SequenceState, length: int) -> None:
    """Copies the first tokens of another sequence, up to one of its places, into an empty one."""
    state.reserve(length)
    held.reserve(0)  # it follows a cache that has moved
    arrays = {name: buffer.array[0] for name, buffer in _buffers(held)}
    _fill(state, arrays, _places(held, length), length)


class PrefixStore:
    """K/V of texts that lost their slot, up to a number of bytes; the least recently used go first.

    Files are written in a separate thread, so that `put` does not wait for them.
    """

    def __init__(self, manifest: Manifest, limit: int, folder: Path | None = None):
        """Starts with what a folder holds.

        Args:
            manifest: manifest of the bundle.
            limit: most bytes.
            folder: keeps them for the next process, in a subfolder for each bundle.

        Raises:
            BundleError: the folder cannot be created or read.
        """
        self._manifest, self._limit = manifest, limit
        self._entries: dict[str, Saved] = {}  # most recently used last
        self._folder = None
        if folder is not None:
            self._folder = folder / identity_of(manifest)[:16]
            self._writer = ThreadPoolExecutor(1, "prefixes")
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._load(self._folder)
            except OSError as error:
                told = f"no K/V can be kept in {folder} ({error.strerror}); choose another folder"
                raise BundleError(told) from None

    def __len__(self) -> int:
        """Texts that it holds."""
        return len(self._entries)

    def put(self, state: SequenceState, tokens: Sequence[int], cache_key: str) -> None:
        """Keeps what a sequence holds, unless it is short or held already."""
        ids = np.array(tokens[: state.length], np.int64)
        if len(ids) < _MIN_KEPT or self._longest(ids, cache_key)[0] == len(ids):
            return
        saved = Saved.of(state, tokens, cache_key)
        if saved.nbytes > self._limit:
            return
        digest = hashlib.sha256(cache_key.encode() + ids.tobytes()).hexdigest()
        name = f"{digest[:32]}.safetensors"
        for key, old in [*self._entries.items()]:
            if old.cache_key == cache_key and common_length(old.tokens, ids) == len(old.tokens):
                self._drop(key)  # the new one begins with it
        self._entries[name] = saved
        if self._folder is not None:
            self._writer.submit(self._write, self._folder / name)
        self._shrink()

    def flush(self) -> None:
        """Waits until all files are written."""
        if self._folder is not None:
            self._writer.submit(lambda: None).result()

    def restore(self, state: SequenceState, ids: Ids, held: int, cache_key: str) -> int:
        """Writes the longest stored prefix of a prompt into a sequence.

        Args:
            state: the sequence.
            ids: the prompt `[S]`, of which the last token runs in any case.
            held: tokens that the sequence already has.
            cache_key: that of its request; texts of another are not used.

        Returns:
            How many tokens of the prompt the sequence holds now.
        """
        common, name = self._longest(ids[:-1], cache_key)
        if common < held + MIN_PREFIX:
            return held
        saved = self._entries.pop(name)
        self._entries[name] = saved
        saved.restore(state, common)
        return common

    def _longest(self, ids: Ids, cache_key: str) -> tuple[int, str]:
        found = [
            (saved.place(common_length(saved.tokens, ids)), name)
            for name, saved in self._entries.items()
            if saved.cache_key == cache_key
        ]
        return max(found, default=(0, ""))

    def _load(self, folder: Path) -> None:
        files = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
        for path in sorted(files, key=lambda path: path.stat().st_mtime):
            try:
                self._entries[path.name], _ = Saved.read(path, self._manifest)
            except SourceError as error:
                _LOG.warning("%s; it is left out", error)
            self._shrink()

    def _shrink(self) -> None:
        while self._entries and sum(saved.nbytes for saved in self._entries.values()) > self._limit:
            large = (name for name, saved in self._entries.items() if saved.nbytes > self._limit)
            self._drop(next(large, next(iter(self._entries))))

    def _drop(self, name: str) -> None:
        del self._entries[name]
        if self._folder is not None:
            self._writer.submit((self._folder / name).unlink, missing_ok=True)

    def _write(self, path: Path) -> None:
        """Writes a file, unless what it would hold has gone meanwhile."""
        if (saved := self._entries.get(path.name)) is None:
            return
        try:
            saved.write(path, self._manifest)
        except (DashError, OSError) as error:
            _LOG.warning("%s", error)


def _fill(
    state: SequenceState,
    arrays: Mapping[str, npt.NDArray[Any]],
    places: Mapping[int, Arrays],
    length: int,
) -> None:
    """Writes the first tokens of keys and values `[H_kv, S, d]` by name into an empty sequence."""
    state.truncate(0)
    state.reserve(length)
    if state.kv.states is not None:
        state.kv.states.restore(places, length)
    for name, buffer in _buffers(state):
        buffer.write(arrays[name][:, :length], (0, slice(None), slice(length)))
    state.kv.length = length


def _buffers(state: SequenceState) -> Iterator[tuple[str, Buffer]]:
    """Keys and values of each layer, by the name that they are saved under."""
    for kind, buffers in (("keys", state.kv.keys), ("values", state.kv.values)):
        for layer, buffer in buffers.items():
            yield f"{kind}.{layer}", buffer


def _places(state: SequenceState, length: int) -> dict[int, Arrays]:
    """Copies of the states of a sequence at every place up to one."""
    states = state.kv.states
    if states is None:
        return {}
    return {p: arrays for p, arrays in states.saved(state.length).items() if p <= length}


def _states_of(
    arrays: dict[str, npt.NDArray[Any]], manifest: Manifest, length: int
) -> dict[int, Arrays]:
    """Takes the states out of a file's arrays; returns only complete places."""
    found = dict[int, Arrays]()
    shapes = {name: (1, *shape) for name, shape in manifest.state_shapes.items()}
    for key in [key for key in arrays if key.count(".") == 2]:
        name, _, place = key.rpartition(".")
        array = arrays.pop(key)
        fits = array.shape == shapes.get(name) and array.dtype == manifest.dims.dtype
        if fits and place.isdecimal() and 0 < int(place) <= length:
            found.setdefault(int(place), {})[name] = array
    return {place: states for place, states in found.items() if states.keys() == shapes.keys()}


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        remedy = "`pip install safetensors`"
        raise DashError(f"saving the KV cache needs the package safetensors: {remedy}") from None
    return safetensors
