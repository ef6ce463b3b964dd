"""What prompts in the wide form lose, beside those in INT8 and INT4, and what follows them.

    python benchmarks/wide.py out/ --reference full/ --text book.txt --text chats.txt
    python benchmarks/wide.py out/ --reference full/ --text book.txt --windows 8 --json

For each text and each form of the prompt: the KL in nats of every prediction inside the prompt, and
of `int4` after it. The reference is a bundle of `--variants full`, and has its own prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import dash_onnx
from dash_onnx.cli.common import aligned
from dash_onnx.core.progress import Loop
from dash_onnx.core.statistics import log_softmax
from dash_onnx.core.text import Message, json_lines, read_text
from dash_onnx.exporters.calibration.records import record_text
from dash_onnx.runtime.model import Model

FORMS = "wide", "int8", "int4"
_FIRST = 16  # predictions that are left out: what comes cannot be known


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--reference", required=True, metavar="OTHER")
    parser.add_argument("--text", type=Path, required=True, action="append", metavar="FILE")
    parser.add_argument("--window", type=int, default=512, help="tokens (default: 512)")
    parser.add_argument("--windows", type=int, default=4, help="of each text (default: 4)")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    model, reference = dash_onnx.load(a.bundle), dash_onnx.load(a.reference)
    found = {
        path.name: measured(model, reference, _text(path), a.window, a.windows) for path in a.text
    }
    if a.json:
        print(json.dumps(found))
        return
    rows = [["", *(f"{name}, {part}" for name in found for part in ("prompt", "int4 after"))]]
    for form in FORMS:
        rows.append([form, *(f"{v:.4f}" for kl in found.values() for v in kl[form])])
    print("\n".join(aligned(rows, left=1)))


def _text(path: Path) -> str:
    """A text as it is, or prompts and their responses one after the other."""
    if path.suffix != ".jsonl":
        return read_text(path)
    return "\n".join(record_text(record, where, _whole) for where, record in json_lines(path))


def _whole(messages: Sequence[Message]) -> str:
    return "".join(str(message["content"]) for message in messages)


def measured(
    model: Model, reference: Model, text: str, window: int, windows: int
) -> dict[str, tuple[float, float]]:
    """By form of the prompt, KL inside it, and of `int4` after the first half of it."""
    ids = model.text.encode(text[: window * windows * 12])
    parts = [np.asarray(ids[at * window : (at + 1) * window], np.int64) for at in range(windows)]
    kl: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    best, half = reference.manifest.variants[0], window // 2
    for part in Loop("windows", [part for part in parts if len(part) == window]):
        wanted = log_softmax(reference.logits(part, policy=best))
        for form in FORMS:
            prefill = None if form == "wide" else form
            inside = model.logits(
                part,
                prompt_tokens=window,
                policy="int4",
                prefill=prefill,  # type: ignore[arg-type]
            )
            after = model.logits(
                part,
                prompt_tokens=half,
                policy="int4",
                prefill=prefill,  # type: ignore[arg-type]
            )
            kl[form].append(
                (
                    divergence(wanted[_FIRST:], inside[_FIRST:]),
                    divergence(wanted[half:], after[half:]),
                )
            )
    return {
        form: (statistics.fmean(a for a, _ in each), statistics.fmean(b for _, b in each))
        for form, each in kl.items()
    }


def divergence(wanted: np.ndarray, logits: np.ndarray) -> float:
    """Mean KL of predictions `[S, V]` to the reference's log probabilities, in nats."""
    return float((np.exp(wanted) * (wanted - log_softmax(logits))).sum(-1).mean())


if __name__ == "__main__":
    main()
