"""Prompts for the benchmark from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dash_onnx.errors import SourceError
from dash_onnx.text import read_text


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; of `.jsonl`, `prompt` or the first of `turns` (as Spec-Bench has).

    Raises:
        SourceError: missing, not text, without a prompt, or a line of another form.
    """
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        lines = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if not lines:
        raise SourceError(f"{path} holds no prompt")
    return lines


def _prompt(line: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise SourceError(f"{where} is not JSON") from None
    found = record.get("prompt") if isinstance(record, dict) else None
    if found is None and isinstance(record, dict) and isinstance(record.get("turns"), list):
        found = next(iter(record["turns"]), None)
    if not isinstance(found, str) or not found.strip():
        raise SourceError(f"{where} needs `prompt`, or `turns` that begin with one")
    return found
