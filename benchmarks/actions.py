"""Further actions: what parts of a layer cost and lose, between the precisions and skip.

    python benchmarks/actions.py out/ --text book.txt

For every action the median time of a layer when all layers take it, and the KL of one layer taking
it while the others take the bundle's best quantized precision, to second order
(`exporters/train/values.py`), mean over tokens and all layers but the first, in thousandths of a
nat; on the second half of a text whose first half the low-rank map of the MLP is fitted on.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from tqdm import tqdm

from dash_onnx.core.actions import PRECISIONS, SKIP, Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import layer_path
from dash_onnx.core.text import TextCodec, read_text
from dash_onnx.exporters.train.dequantized import DequantizedModel, Tensor
from dash_onnx.exporters.train.environment import Environment
from dash_onnx.exporters.train.options import TrainingPlan
from dash_onnx.exporters.train.values import fisher_sample
from dash_onnx.runtime.backend import open_backend
from dash_onnx.runtime.ort import create_session
from dash_onnx.runtime.sessions import Sessions

PLAN = TrainingPlan()
RANK = 64
TOKENS = 60  # that are timed, after as many
ATTENTION = "attention only"
MLP = ("gate_up_proj.", "down_proj.")
MAPPED = f"attention, rank {RANK} for the MLP"


def mixtures(precisions: Sequence[Action]) -> list[tuple[Action, Action]]:
    """Of attention and MLP; INT2 layers have INT4 attention anyway."""
    return [pair for pair in pairwise(precisions) if pair[1] != "int2"]


def mixture(attention: str, mlp: str) -> str:
    """The name of an action whose parts differ."""
    return f"{attention.upper()} attention, {mlp.upper()} MLP"


def attention_only(precision: Action, folder: Path, layer: int) -> onnx.ModelProto:
    """The graph of a precision without its MLP."""
    model = onnx.load(folder / layer_path(layer, precision), load_external_data=False)
    graph = model.graph
    (total,) = [node.input[0] for node in graph.node if "hidden_out" in node.output]
    needed = {total, "present_key", "present_value"}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.insert(0, node)
            needed |= set(node.input)
    for node in kept:
        node.output[:] = ["hidden_out" if name == total else name for name in node.output]
    del graph.node[:]
    graph.node.extend(kept)
    used = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(used)
    return model


def mixed(attention: Action, mlp: Action, folder: Path, layer: int) -> onnx.ModelProto:
    """The graph of one precision with the MLP of another."""
    model, other = (
        onnx.load(folder / layer_path(layer, precision), load_external_data=False)
        for precision in (attention, mlp)
    )
    # Up to the MLP the nodes and tensors of one, from there on those of the other.
    nodes, tensors = [], []
    for graph, wanted in ((model.graph, False), (other.graph, True)):
        cut = next(i for i, node in enumerate(graph.node) if "gate_up_proj.values" in node.input)
        nodes += graph.node[cut:] if wanted else graph.node[:cut]
        tensors += [t for t in graph.initializer if t.name.startswith(MLP) == wanted]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    return model


class Others(Sessions):
    """Has graphs for the further actions as well."""

    graphs: dict[str, Callable[[Path, int], onnx.ModelProto]]

    def layer(self, layer: int, action: Any) -> Any:
        """See `Sessions`."""
        if action in self.manifest.actions:
            return super().layer(layer, action)
        folder = self._bundle.folder
        path = folder / "layers" / f"{layer:02d}" / "other.onnx"
        onnx.save(self.graphs[action](folder, layer), path)
        return create_session(path, "cpu")


def times(folder: Path, precisions: Sequence[Action]) -> dict[str, float]:
    """Microseconds of a layer."""
    sessions = Others(Bundle(folder), open_backend("cpu"))
    sessions.graphs = {ATTENTION: partial(attention_only, precisions[0])}
    sessions.graphs |= {mixture(*pair): partial(mixed, *pair) for pair in mixtures(precisions)}
    manifest = sessions.manifest
    layers, head = manifest.model.num_layers, manifest.heads[precisions[0]]
    sequence = sessions.new_sequence()
    names: Any = (*precisions, SKIP, *sessions.graphs)
    sequence.prefill(np.arange(1000, 1064), names[:1] * layers, head)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(2 * TOKENS), desc="times", disable=None):
        for name in names:
            sequence.truncate(64)
            sequence.advance(1)
            sequence.embed(17)
            started = time.perf_counter()
            for layer in range(layers):
                sequence.run(layer, name)
            seen[name].append((time.perf_counter() - started) / layers * 1e6)
            sequence.head(head)
    return {name: float(np.median(values[TOKENS:])) for name, values in seen.items()}


class Losses:
    """Second-order KL of each action, over a text."""

    def __init__(self, bundle: Bundle, precisions: tuple[Action, ...], text: Path, sequences: int):
        """Reads the model."""
        self._precisions = precisions
        self._model = DequantizedModel(bundle, precisions, torch.float32)
        self._env = Environment(self._model, self._model.actions, PLAN.prompt_tokens, (1,))
        ids = torch.from_numpy(TextCodec(bundle).encode(read_text(text)))
        self._ids = ids[: len(ids) // PLAN.length * PLAN.length].view(-1, PLAN.length)[:sequences]
        self._generator = torch.Generator().manual_seed(0)

    def measured(self) -> dict[str, float]:
        """Nats of one layer, mean over layers and tokens."""
        half = len(self._ids) // 2
        fitted = [self._pass(ids, None) for ids in self._ids[:half].split(PLAN.batch)]
        maps = []
        for layer in range(self._env.layers):
            x, y = (torch.cat([one[kind][layer] for one in fitted]) for kind in ("x", "mlp"))
            gram = x.T @ x
            gram += 1e-2 * gram.diagonal().mean() * torch.eye(len(gram))
            full = torch.linalg.solve(gram, x.T @ y)
            # The best map of that rank for these inputs: cut where the outputs vary least.
            _, _, v = torch.linalg.svd(x @ full, full_matrices=False)
            maps.append(full @ v[:RANK].T @ v[:RANK])
        seen = [self._pass(ids, maps) for ids in self._ids[half:].split(PLAN.batch)]
        return {name: float(np.mean([one["kl"][name] for one in seen])) for name in seen[0]["kl"]}

    def _pass(self, ids: Tensor, maps: list[Tensor] | None) -> dict:
        model, seen = self._model, slice(PLAN.prompt_tokens, None)
        rotary = model.rotary(ids.shape[1])
        x = model.embed(ids).requires_grad_()
        outputs, others, inputs, mlps = [], [], [], []
        base, *cheaper = self._precisions
        for layer in range(self._env.layers):
            normed = model.normed(layer, x)
            attention = {base: model.attend(layer, *model.qkv(layer, base, normed), rotary)}
            y = model.complete(layer, base, x, attention[base])
            outputs.append(y)
            with torch.no_grad():
                attended = model.attended(layer, base, x, attention[base])
                read = model.mlp_input(layer, x, attended)
                inputs.append(read[:, seen].flatten(0, 1))
                mlps.append((y - attended)[:, seen].flatten(0, 1))
                found: dict[str, Tensor] = {}
                for name in cheaper:
                    qkv = model.qkv(layer, name, normed)
                    attention[name] = model.attend(layer, *qkv, rotary)
                    found[name] = model.complete(layer, name, x, attention[name])
                found |= {SKIP: model.skip(layer, x, normed)[0], ATTENTION: attended}
                for better, worse in mixtures(self._precisions):
                    # The MLP of `worse` on what the attention of `better` gives.
                    after = model.attended(layer, better, x, attention[better])
                    found[mixture(better, worse)] = model.feed_forward(layer, worse, x, after)
                if maps:
                    found[MAPPED] = attended + read @ maps[layer]
                others.append({name: (other - y).detach() for name, other in found.items()})
            x = y
        sample = fisher_sample(self._env, model.final(x), self._generator)
        gradients = torch.autograd.grad(sample, outputs)
        kl: dict[str, float] = {}
        for kind in others[0]:
            effects = [
                (torch.linalg.vecdot(g, other[kind]).square() / 2)[:, seen].mean()
                for g, other in zip(gradients[1:], others[1:], strict=True)
            ]
            kl[kind] = float(torch.stack(effects).mean())
        return {"x": inputs, "mlp": mlps, "kl": kl}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="OUT", type=Path, help="with INT8 and INT4")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sequences", type=int, default=64)
    arguments = parser.parse_args()
    bundle = Bundle(arguments.bundle)
    precisions = tuple(name for name in bundle.manifest.actions if name in PRECISIONS[1:])
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(shutil.copytree(arguments.bundle, Path(folder) / "out"))
        microseconds = times(copied, precisions)
    losses = Losses(bundle, precisions, arguments.text, arguments.sequences).measured()
    # The time of the map is not in it: a skip has such a map as well, in 65 us with all the rest.
    print(f"{'action':32}{'us':>8}{'KL x 1000':>12}{'KL x 1e6 per us saved':>24}")
    base = microseconds[precisions[0]]
    print(f"{precisions[0]:32}{base:8.0f}")
    for name, loss in losses.items():
        us = microseconds.get(name, microseconds[ATTENTION])
        print(f"{name:32}{us:8.0f}{loss * 1e3:12.2f}{loss * 1e6 / (base - us):24.1f}")


if __name__ == "__main__":
    main()
