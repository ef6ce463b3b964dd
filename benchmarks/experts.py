"""Cost of the experts of a layer, compared to a dense MLP with as many active weights.

    python benchmarks/experts.py
    python benchmarks/experts.py --shapes lfm2_moe olmoe --rows 1 64 --json
    python benchmarks/experts.py --shapes lfm2_moe --rows 1 --mapped

`--mapped` also times experts mapped from their file, as `--memory low` runs those that do not fit.

Weights are random: times do not depend on them. The shapes are those of one layer of
LFM2-8B-A1B, OLMoE-1B-7B and Qwen3-30B-A3B. Both take turns, with different experts in each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from transformers import LlamaConfig

from dash_onnx.cli.common import aligned
from dash_onnx.core.actions import Action
from dash_onnx.core.block import Experts
from dash_onnx.core.contract import Port, Ports
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures import architecture_of
from dash_onnx.exporters.architectures.base import Linear, Mixture
from dash_onnx.exporters.graphs.graph import Graph
from dash_onnx.exporters.graphs.mixture import mix
from dash_onnx.runtime.ort import create_session, use_threads

SHAPES = {
    "lfm2_moe": (2048, Experts(count=32, per_token=4, width=1792)),
    "olmoe": (2048, Experts(count=64, per_token=8, width=1024)),
    "qwen3_moe": (2048, Experts(count=128, per_token=8, width=768)),
}
"""Width of the hidden state, and sizes of the experts."""

FORMS: tuple[Action, ...] = ("int8", "int4")


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="(default: 1 64)")
    parser.add_argument("--rounds", type=int, default=30, help="(default: 30)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--mapped", action="store_true", help="also from the file, unpacked")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    rows = []
    kinds = ["experts", "dense", *(["mapped"] if arguments.mapped else [])]
    for shape in arguments.shapes:
        for form in FORMS:
            found = measured(*SHAPES[shape], form, kinds, arguments.rows, arguments.rounds)
            for count, medians in found.items():
                times = {f"{kind}_ms": ms for kind, ms in zip(kinds, medians, strict=True)}
                rows.append({"shape": shape, "form": form, "rows": count, **times})
    if arguments.json:
        print(json.dumps(rows))
        return
    head = ["shape", "form", "rows", *(f"{kind}, ms" for kind in kinds)]
    cells = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    print("\n".join(aligned([head, *cells])))


def measured(
    width: int,
    experts: Experts,
    form: Action,
    kinds: list[str],
    counts: list[int],
    rounds: int,
) -> dict[int, list[float]]:
    """Median milliseconds of each kind, by number of rows."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        graphs = {
            name: build(Path(folder), name, width, experts, form) for name in ("experts", "dense")
        }
        sessions = [
            create_session(graphs.get(kind, graphs["experts"]), "cpu", packed=kind != "mapped")
            for kind in kinds
        ]
        rng = np.random.default_rng(0)
        for count in counts:
            times: list[list[float]] = [[] for _ in kinds]
            for _ in range(rounds):  # the median ignores the first ones
                hidden = {"hidden": rng.standard_normal((1, count, width), np.float32)}
                for session, some in zip(sessions, times, strict=True):
                    started = time.perf_counter()
                    session.run(None, hidden)
                    some.append(1e3 * (time.perf_counter() - started))
            found[count] = [statistics.median(some) for some in times]
    return found


def build(folder: Path, name: str, width: int, experts: Experts, form: Action) -> Path:
    """A graph of random experts, or of a dense MLP as wide as all experts of a token together."""
    block = architecture_of(config := LlamaConfig()).block(config)
    port = [Port(x, "float32", (1, "seq", width)) for x in ("hidden", "hidden_out")]
    target = Target("cpu", "float32", 128, 4)
    ports = Ports((port[0],), (port[1],))
    graph = Graph(name, ports, target, replace(block, experts=experts))
    x, count, inner = graph.inputs["hidden"], experts.count, experts.width
    if name == "experts":
        up = random("experts_up", count * 2 * inner, width)
        down = random("experts_down", count * width, inner)
        result = mix(graph, x, Mixture(random("router", count, width), up, down), form)
    else:
        result = dense(graph, x, width, experts.per_token * inner, form)
    graph.save(folder, f"{name}.onnx", hidden_out=result)
    return folder / f"{name}.onnx"


def dense(graph: Graph, x: ir.Value, width: int, inner: int, form: Action) -> ir.Value:
    """`[1, seq, D]` -> `[1, seq, D]`."""
    both = graph.linear(x, random("gate_up_proj", 2 * inner, width), form)
    parts = [graph.value("gate"), graph.value("up")]
    gate, up = graph.op.Split(both, axis=-1, num_outputs=2, _outputs=parts)
    activated = graph.op.Mul(graph.ms.QuickGelu(gate, alpha=1.0), up)
    return graph.linear(activated, random("down_proj", width, inner), form)


def random(name: str, rows: int, columns: int) -> Linear:
    """A random product `[N, K]`; router scores vary by 1, since experts of weight 0 do not run."""
    return Linear(name, torch.randn(rows, columns, dtype=torch.float16) / columns**0.5)


if __name__ == "__main__":
    main()
