"""Cost of a token at the LM head, by precision and vocabulary size.

    python benchmarks/heads.py
    python benchmarks/heads.py --vocabularies 32000 128256 --hidden-size 2048 --json
    python benchmarks/heads.py --bundle out/ --text book.txt

Weights are random: times do not depend on them. The loss of a head does, see `dash-info` and
docs/decisions/0085 and 0095. The default shapes are those of SmolLM2-135M, Qwen2.5-0.5B and
Gemma-3-270M. The precisions take turns, so that no head finds its weights in the caches.

With a bundle and a text: for how many tokens the top-1 token of each head differs from that of the
INT8 head's weights with unrounded inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

import dash_onnx
from dash_onnx.cli.common import aligned
from dash_onnx.core.actions import PRECISIONS, Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import head_path
from dash_onnx.core.progress import Phase
from dash_onnx.core.text import read_text
from dash_onnx.exporters.architectures import architecture_of
from dash_onnx.exporters.architectures.base import Head, Linear, Norm
from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.graphs.ends import build_head
from dash_onnx.exporters.train.dequantized import DequantizedModel
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.ort import create_session, use_threads

SHAPES = {49_152: 576, 151_936: 896, 262_144: 640}
WINDOW, LANES = 512, 32  # tokens of a context, and number of contexts in a batch


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(SHAPES))
    parser.add_argument("--hidden-size", type=int, help="(default: that of the model named above)")
    parser.add_argument("--rounds", type=int, default=60, help="(default: 60)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--bundle", metavar="BUNDLE", help="whose heads to compare, on --text")
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--max-tokens", type=int, default=50_000, help="(default: 50,000)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    if arguments.bundle:
        if not arguments.text:
            parser.error("--bundle needs --text")
        print(json.dumps(missed(arguments.bundle, read_text(arguments.text), arguments.max_tokens)))
        return
    rows = []
    for vocabulary in arguments.vocabularies:
        width = arguments.hidden_size or SHAPES.get(vocabulary, 1024)
        found = measured(vocabulary, width, arguments.rounds)
        rows.append({"vocabulary": vocabulary, "hidden_size": width, "ms": found})
    if arguments.json:
        print(json.dumps(rows))
        return
    head = ["vocabulary", "hidden size", *(f"{precision}, ms" for precision in PRECISIONS)]
    cells = [
        [
            str(row["vocabulary"]),
            str(row["hidden_size"]),
            *(f"{ms:.2f}" for ms in row["ms"].values()),
        ]
        for row in rows
    ]
    print("\n".join(aligned([head, *cells])))


def measured(vocabulary: int, width: int, rounds: int) -> dict[Action, float]:
    """Median milliseconds of one token by precision."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=width // 64, head_dim=64
    )
    spec = architecture_of(config).describe("random", config, None)
    target = ExportOptions().resolved("folder", spec).target
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, width, dtype=torch.float16)
    head = Head(Norm(torch.ones(width)), Linear("lm_head", weight))
    times: dict[Action, list[float]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for precision in PRECISIONS:
            build_head(Path(folder), head, spec, target, precision, {})
            sessions[precision] = create_session(Path(folder) / head_path(precision), "cpu")
        hidden = {"hidden": np.random.default_rng(0).standard_normal((1, 1, width), np.float32)}
        for _ in range(rounds):  # the median ignores the first ones
            for precision, session in sessions.items():
                started = time.perf_counter()
                session.run(None, hidden)
                times[precision].append(1e3 * (time.perf_counter() - started))
    return {precision: statistics.median(some) for precision, some in times.items()}


def missed(bundle: str, text: str, most: int) -> dict[str, int]:
    """Number of tokens, and by precision how many have a top-1 token that is not the exact one."""
    found: dict[Action, list[np.ndarray]] = {}
    hidden = []
    with dash_onnx.load(bundle) as model:
        manifest = model.manifest
        ids = model.text.encode(text)[:most]
        ids = ids[: len(ids) // LANES * LANES].reshape(LANES, -1)  # [B, S]
        decider = FixedPath((manifest.variants[0],) * manifest.model.num_layers, "int8")
        with Phase("tokens", total=ids.size) as phase:
            for start in range(0, ids.shape[1], WINDOW):
                sequence = model.new_sequence(WINDOW, batch=LANES)
                for token in ids[:, start : start + WINDOW].T:
                    sequence.layers(token[:, None], decider)
                    last = sequence.hidden[sequence.num_layers % 2]
                    hidden.append(torch.tensor(last.array[:, 0]))
                    for precision in manifest.exported_heads:
                        likeliest = sequence.head(precision).argmax(-1)
                        found.setdefault(precision, []).append(likeliest)
                    phase.update(LANES)
    exact = DequantizedModel(Bundle(bundle), (), torch.float32)
    wanted = [exact.logits(exact.final(rows), "int8").argmax(-1).numpy() for rows in hidden]
    counts = {"tokens": ids.size}
    for precision, tokens in found.items():
        counts[precision] = int((np.stack(tokens) != np.stack(wanted)).sum())
    return counts


if __name__ == "__main__":
    main()
