"""Prompts for the benchmark: six built-in ones, or those of a file; and longer ones from them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from dash_onnx.core.errors import SourceError
from dash_onnx.core.text import json_lines, read_text

PROMPTS = (
    "Write a short letter from a lighthouse keeper to the captain of a ship that passed at night.",
    "Explain to a child why the sky is blue and why sunsets are red.",
    "List five things to check before a long journey by bicycle, with a reason for each.",
    "What is the difference between a virus and a bacterium?",
    "Summarise the story of a man who planted trees for thirty years in an empty valley.",
    "How do I convert a temperature from Celsius to Fahrenheit? Give two examples.",
)


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; in `.jsonl`, `prompt` or the first of `turns` (as in Spec-Bench).

    Raises:
        SourceError: the file is missing, not text or without prompts, or a line has another form.
    """
    if path.suffix == ".jsonl":
        prompts = [_prompt(record, where) for where, record in json_lines(path)]
    else:
        prompts = [line for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise SourceError(f"{path} holds no prompt")
    return prompts


def context(prompts: Sequence[list[int]], tokens: int) -> list[int]:
    """A prompt of exactly the given length: other prompts repeated, then one that asks a question.

    So the answer is not a repetition, which would be cheaper than ordinary text.
    """
    *others, last = prompts
    if len(last) >= tokens:
        return last[-tokens:]
    return [*islice(cycle(chain(*(others or prompts))), tokens - len(last)), *last]


def _prompt(record: Any, where: str) -> str:
    found = record.get("prompt") if isinstance(record, dict) else None
    if found is None and isinstance(record, dict) and isinstance(record.get("turns"), list):
        found = next(iter(record["turns"]), None)
    if not isinstance(found, str) or not found.strip():
        raise SourceError(f"{where} needs `prompt`, or `turns` that begin with one")
    return found
