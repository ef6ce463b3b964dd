"""Names of GGUF files: a large model is split into parts, `NAME-00001-of-00003.gguf` and so on."""

from __future__ import annotations

import re

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def parts_of(name: str) -> tuple[str, ...]:
    """All parts of the model that a file belongs to, in order; the file alone if it is whole."""
    if (match := _PART.search(name)) is None:
        return (name,)
    start, count = name[: match.start()], int(match[1])
    return tuple(f"{start}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1))


def stem_of(name: str) -> str:
    """A file's name without its suffix and its part number."""
    return _PART.sub("", name).removesuffix(".gguf")
