"""The license and the model card that come with a model: they are copied into its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

DOCUMENTS = ("LICEN[CS]E*", "COPYING*", "NOTICE*", "USE_POLICY*", "README.md")
"""Patterns of their file names."""

_MAX_BYTES = 1 << 20  # largest document


def documents_in(folder: Path) -> tuple[Path, ...]:
    """The license, the notices and the model card in a model's folder, if no larger than 1 MiB."""
    patterns = [pattern.upper() for pattern in DOCUMENTS]
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if any(fnmatch(path.name.upper(), pattern) for pattern in patterns)
        and path.is_file()
        and path.stat().st_size <= _MAX_BYTES
    )


def license_of_card(documents: tuple[Path, ...]) -> str | None:
    """The license that the front matter of a model card names; None if it names none."""
    from huggingface_hub import metadata_load

    for path in documents:
        if path.name.upper() == "README.MD":
            try:
                return license_of(metadata_load(path) or {}, "license", "license_name")
            except Exception:  # whatever a damaged card raises: the weights do not need it
                return None
    return None


def license_of(values: Mapping[str, Any], key: str, other: str) -> str | None:
    """A license from metadata, in one line.

    Args:
        values: the metadata.
        key: key of the license's identifier.
        other: key of the license's name, used if the identifier is `other`.
    """
    found = values.get(key)
    if found == "other":
        found = values.get(other) or found
    return " ".join(found.split())[:100] or None if isinstance(found, str) else None
