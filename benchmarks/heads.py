"""What a token costs at the LM head, by precision and size of the vocabulary.

    python benchmarks/heads.py
    python benchmarks/heads.py --vocabularies 32000 128256 --hidden-size 2048 --json

Weights are random: times do not depend on them. What a head loses does, see `dash-info` and
docs/decisions/0085 and 0095. The default shapes are those of SmolLM2-135M, Qwen2.5-0.5B and
Gemma-3-270M. The precisions take turns, so that no head finds its weights in the caches.
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

from dash_onnx.cli.common import aligned
from dash_onnx.core.actions import PRECISIONS, Action
from dash_onnx.core.contract import head_path
from dash_onnx.exporters.architectures import architecture_of
from dash_onnx.exporters.architectures.base import Head, Linear, Norm
from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.graphs.ends import build_head
from dash_onnx.runtime.ort import create_session, use_threads

SHAPES = {49_152: 576, 151_936: 896, 262_144: 640}


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(SHAPES))
    parser.add_argument("--hidden-size", type=int, help="(default: that of the model named above)")
    parser.add_argument("--rounds", type=int, default=60, help="(default: 60)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
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
    target = ExportOptions().resolved("folder", spec.facts).target
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
        for _ in range(rounds):  # the median passes over the first ones
            for precision, session in sessions.items():
                started = time.perf_counter()
                session.run(None, hidden)
                times[precision].append(1e3 * (time.perf_counter() - started))
    return {precision: statistics.median(some) for precision, some in times.items()}


if __name__ == "__main__":
    main()
