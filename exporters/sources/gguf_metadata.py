"""Metadata of a GGUF file, of one architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_onnx.core.errors import SourceError, UnsupportedError


class Metadata:
    """Values of the keys of one architecture, without its prefix."""

    def __init__(self, architecture: str, values: Mapping[str, Any]):
        """Takes all metadata of a file."""
        self.architecture = architecture
        self._values = values

    def get(self, key: str, default: Any = None) -> Any:
        """A value; a list that repeats one number for every layer counts as that number.

        Raises:
            UnsupportedError: layers differ.
        """
        value = self._values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and isinstance(value[0], int | float):
            if len(set(value)) > 1:
                raise UnsupportedError(
                    f"{self.architecture}.{key} differs from layer to layer, which is not supported"
                )
            return value[0]
        return value

    def layers(self, key: str) -> list[int] | int | None:
        """A value that may be a list with one entry per layer."""
        value: list[int] | int | None = self._values.get(f"{self.architecture}.{key}")
        return value

    def by_layer(self, key: str, count: int) -> list[int]:
        """One value for each of `count` layers.

        Raises:
            SourceError: there is none, or the number of layers differs.
        """
        found = self.layers(key)
        values = found if isinstance(found, list) else [self[key]] * count
        if len(values) != count:
            raise SourceError(
                f"{self.architecture}.{key} has {len(values)} values for {count} layers"
            )
        return values

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise SourceError(f"the GGUF file has no {self.architecture}.{key}")
        return value
