"""Loss of a prompt by the form that it runs in: the precisions, and wide where that is faster.

    dash-export MODEL out/
    dash-export MODEL reference/ --variants full --effort none
    python benchmarks/prompt_forms.py out/ --reference reference/ --prompts chats.jsonl
    python benchmarks/prompt_forms.py out/ --reference reference/ --text book.txt --text chats.txt

With prompts: the KL of an answer's first token in nats, as the mean over chats with its standard
error and the maximum, and how many first tokens differ. `default` is a prompt under `int4` without
`--prefill`. With texts, for each: the KL of every prediction inside the prompt, and of `int4` after
it. The reference has its own prompt, in full precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

import dash_onnx
from dash_onnx.bench.prompts import read_prompts
from dash_onnx.cli.common import aligned
from dash_onnx.core.actions import Action
from dash_onnx.core.arrays import Ids, Logits
from dash_onnx.core.documents import read_document
from dash_onnx.core.progress import Loop
from dash_onnx.core.statistics import kl_divergence, log_softmax, standard_error
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GREEDY

FORMS: dict[str, Action | None] = {"wide": None, "int8": "int8", "int4": "int4"}
"""Forms of the prompts of texts, before `int4`, and the value of `prefill`."""

_FIRST = 16  # predictions left out: there is no context for them yet


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--reference", required=True, metavar="OTHER", help="that has `full`")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", type=Path, metavar="FILE", help="of chats, as of dash-bench")
    what.add_argument("--text", type=Path, action="append", metavar="FILE")
    parser.add_argument("--chats", type=int, default=20, help="(default: 20)")
    parser.add_argument("--window", type=int, default=512, help="tokens (default: 512)")
    parser.add_argument("--windows", type=int, default=4, help="of each text (default: 4)")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    model, reference = dash_onnx.load(a.bundle), dash_onnx.load(a.reference)
    if a.prompts:
        rows = first_tokens(model, reference, read_prompts(a.prompts)[: a.chats])
        print(json.dumps(rows) if a.json else "\n".join(map(json.dumps, rows)))
        return
    found = {
        path.name: losses(model, reference, read_document(path, model.text), a.window, a.windows)
        for path in a.text
    }
    if a.json:
        print(json.dumps(found))
        return
    cells = [["", *(f"{name}, {part}" for name in found for part in ("prompt", "int4 after"))]]
    for form in FORMS:
        cells.append([form, *(f"{v:.4f}" for kl in found.values() for v in kl[form])])
    print("\n".join(aligned(cells, left=(0,))))


def first_tokens(
    model: Model, reference: Model, prompts: Sequence[str]
) -> list[dict[str, str | float]]:
    """A row for each precision of the prompt, and for the default of `int4`."""
    chats = [model.text.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    wanted = [_first(reference, ids, "full", "full") for ids in chats]
    runs: dict[str, tuple[Action, Action | None]] = {a: (a, a) for a in model.manifest.variants}
    if model.manifest.wide is not None and "int4" in runs:
        runs["default"] = "int4", None
    rows: list[dict[str, str | float]] = []
    for precision, run in runs.items():
        found = [_first(model, ids, *run) for ids in chats]
        pairs = [*zip(wanted, found, strict=True)]
        kl = [float(kl_divergence(*pair)) for pair in pairs]
        rows.append(
            {
                "precision": precision,
                "chats": len(chats),
                "kl": round(statistics.fmean(kl), 5),
                "kl_stderr": round(standard_error(kl), 5),
                "kl_max": round(max(kl), 5),
                "other_first_token": sum(int(p.argmax() != q.argmax()) for p, q in pairs),
            }
        )
    return rows


def _first(
    model: Model, ids: Ids, policy: Action, prefill: Action | None
) -> npt.NDArray[np.float64]:
    """Log probabilities `[V]` of an answer's first token, as a generation finds them."""
    seen: list[Logits] = []

    def keep(_: Sequence[int], logits: Logits) -> Logits:
        seen.append(logits.copy())
        return logits

    options = dataclasses.replace(
        GREEDY, policy=policy, prefill=prefill, max_new_tokens=1, logits_processor=keep
    )
    list(model.generate_step(ids, options=options))
    return log_softmax(seen[0])


def losses(
    model: Model, reference: Model, text: str, window: int, windows: int
) -> dict[str, tuple[float, float]]:
    """By form of the prompt, KL inside it, and of `int4` after the first half of it."""
    begin = model.text.begin
    ids = model.text.encode(text[: window * windows * 12], add_special_tokens=False)
    own = window - len(begin)
    parts = [np.concatenate([begin, ids[at * own : (at + 1) * own]]) for at in range(windows)]
    kl: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    best, half = reference.manifest.variants[0], window // 2
    for part in Loop("windows", [part for part in parts if len(part) == window]):
        wanted = log_softmax(reference.logits(part, policy=best))
        for form, prefill in FORMS.items():
            inside = model.logits(part, prompt_tokens=window, policy="int4", prefill=prefill)
            after = model.logits(part, prompt_tokens=half, policy="int4", prefill=prefill)
            pairs = ((wanted[_FIRST:], inside[_FIRST:]), (wanted[half:], after[half:]))
            first, second = (float(kl_divergence(p, log_softmax(q)).mean()) for p, q in pairs)
            kl[form].append((first, second))
    return {
        form: (statistics.fmean(a for a, _ in each), statistics.fmean(b for _, b in each))
        for form, each in kl.items()
    }


if __name__ == "__main__":
    main()
