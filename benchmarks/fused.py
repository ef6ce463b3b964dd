"""The fused graph in ONNX Runtime GenAI against our runtime, and its speed there.

    python benchmarks/fused.py tokens out/                      # the same greedy tokens?
    python benchmarks/fused.py speed out/ --peer build/peers/int4 --text book.txt

`tokens`: our runtime writes greedily, on the graph's terms: prompts at the graph's precision,
the budget's multiplier without the controller. GenAI is then given the same tokens, one by one,
and each of its choices is compared. A choice that differs is explained by the margin between the
two best logits and by how far the logits of the two lie apart there.

`speed`: the default policy, an `If` per layer that always takes INT4, and a flat INT4 graph, in
alternating rounds with GenAI's own INT4 model; KL against our highest precision on a text. A
process keeps an advantage of up to 8 % for as long as it lives, by where its memory lies, so all
start anew several times.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from tqdm import tqdm

import dash_onnx
from dash_onnx.bench.measure import Result, divergence, ratio, restarted, rounds
from dash_onnx.bench.worker import Worker
from dash_onnx.core.actions import Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.policy import PathPolicy, ScoredPolicy, make_policy
from dash_onnx.core.text import read_text
from dash_onnx.exporters.fused import PATH, FuseOptions, fuse
from dash_onnx.exporters.fused.facts import FusedFacts

PROMPTS = (
    "What is the capital of France?",
    "Name three animals of the sea.",
    "Why is the sky blue?",
    "Write one sentence about a lighthouse.",
    "Explain what a budget is.",
    "How do I boil an egg?",
    "Translate to French: good morning.",
    "What is 12 times 12?",
    "Give me a title for a story about rain.",
    "Who wrote Romeo and Juliet?",
)
POLICIES = ("int4", "int8", "dash")
_FAR = 1e6  # times as dear: an action that is never taken


@dataclasses.dataclass(frozen=True)
class Difference:
    """A token that GenAI would have chosen otherwise.

    Attributes:
        position: among the answer's tokens.
        margin: between the two best logits of our runtime.
        apart: the largest difference between the two runs' logits.
        paths: whether the two took different paths for it.
    """

    position: int
    margin: float
    apart: float
    paths: bool

    @property
    def tie(self) -> bool:
        """Whether logits so far apart may swap the two best."""
        return self.margin <= 2 * self.apart


def ours(
    model: dash_onnx.Model, ids: list[int], policy: str, prompt: Action | None, count: int
) -> Iterator[tuple[np.ndarray, tuple[Action, ...]]]:
    """Greedy: the logits of each token and the path that led to it."""
    chosen = model.policy(policy)
    lane = model.new_cache()._lane
    if isinstance(chosen, ScoredPolicy):
        assert prompt is not None
        path: tuple[Action, ...] = (prompt,) * model.manifest.model.num_layers
    else:
        assert isinstance(chosen, PathPolicy) and chosen.uniform is not None
        path = chosen.uniform
    logits = lane.prefill(np.array(ids), path, chosen.head)
    for _ in range(count):
        yield logits.copy(), path
        token = int(logits.argmax())
        if token in model.text.eos_token_ids:
            return
        if isinstance(chosen, ScoredPolicy):
            logits, path = lane.decode_scored(token, chosen.multiplier, chosen.head)
        else:
            logits = lane.decode(token, path, chosen.head)


class GenAI:
    """The fused folder, given tokens instead of choosing them."""

    def __init__(self, folder: Path):
        self._model = og.Model(str(folder))

    def forced(self, ids: list[int], tokens: list[int]) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Logits after the prompt and after each token, and the decisions of that run."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(ids) + len(tokens) + 1)
        generator = og.Generator(self._model, params)
        for part in (ids, *([token] for token in tokens)):
            generator.append_tokens(np.array(part, np.int32))
            logits = np.array(generator.get_logits(), np.float32)
            try:
                decided = generator.get_output(PATH).tolist()
            except Exception:  # a graph with one path has none to show
                decided = []
            yield logits.reshape(-1), decided


def compare(
    model: dash_onnx.Model, genai: GenAI, facts: FusedFacts, policy: str, count: int
) -> str:
    """One row of the table, and a line per difference."""
    total, paths, differences, apart = 0, 0, [], 0.0
    for question in tqdm(PROMPTS, desc=policy, disable=None):
        ids = model.text.encode_chat([{"role": "user", "content": question}]).tolist()
        steps = list(ours(model, ids, policy, facts.prompt, count))
        tokens = [int(logits.argmax()) for logits, _ in steps]
        found = genai.forced(ids, tokens[:-1])
        for position, ((a, path), (b, decided)) in enumerate(zip(steps, found, strict=True)):
            taken = tuple(facts.actions[index] for index in decided) or path
            between = float(np.abs(a - b).max())
            apart, total, paths = max(apart, between), total + 1, paths + (taken != path)
            if int(a.argmax()) != int(b.argmax()):
                best = np.sort(a)[-2:]
                margin = float(best[1] - best[0])
                differences.append(Difference(position, margin, between, taken != path))
    ties = sum(difference.tie for difference in differences)
    lines = [
        f"{policy:5} {total} tokens, {len(differences)} differ ({ties} near-ties), "
        f"{paths} on another path; logits at most {apart:.4f} apart"
    ]
    lines += [
        f"      token {d.position}: margin {d.margin:.4f}, logits {d.apart:.4f} apart"
        f"{', another path' if d.paths else ''}"
        for d in differences
    ]
    return "\n".join(lines)


def tokens(arguments: argparse.Namespace) -> None:
    """Compares the choices under each policy."""
    bundle = Bundle(arguments.bundle)
    model = dash_onnx.load(arguments.bundle, threads=1)  # no pool that ORT GenAI would collide with
    for policy in arguments.policies:
        with tempfile.TemporaryDirectory() as folder:
            out, options = Path(folder) / "fused", FuseOptions("genai", policy)
            fuse(bundle, out, options, overwrite=False)
            facts = FusedFacts.of(options, make_policy(policy, bundle.manifest), bundle.manifest)
            print(compare(model, GenAI(out), facts, policy, arguments.tokens), flush=True)


def always_int4(bundle: Bundle) -> Bundle:
    """The same bundle with costs under which the scorer decides for INT4 in every layer."""
    manifest = bundle.manifest
    assert manifest.scorer is not None
    head = manifest.heads["int4"]
    layers = tuple(
        {action: ms if action == "int4" else _FAR for action, ms in layer.items()}
        for layer in manifest.costs.layers_ms
    )
    points = tuple(
        dataclasses.replace(p, head=head, multiplier=1.0) for p in manifest.scorer.points
    )
    changed = dataclasses.replace(
        manifest,
        costs=dataclasses.replace(manifest.costs, layers_ms=layers),
        scorer=dataclasses.replace(manifest.scorer, points=points),
    )
    return Bundle(bundle.folder, changed)


def speed(arguments: argparse.Namespace) -> None:
    """Times the three graphs and the peer, and tells their KL."""
    bundle = Bundle(arguments.bundle)
    model = dash_onnx.load(arguments.bundle, threads=1)
    prompts = [
        model.text.encode_chat([{"role": "user", "content": question}]).tolist()
        for question in PROMPTS[: arguments.prompts]
    ]
    with tempfile.TemporaryDirectory() as folder:
        graphs = {
            "default policy": (bundle, FuseOptions("genai", "dash", arguments.budget)),
            "ifs, all int4": (always_int4(bundle), FuseOptions("genai", "dash")),
            "flat, all int4": (bundle, FuseOptions("genai", "int4")),
        }
        targets = {name: Path(folder) / name.split(",")[0].replace(" ", "-") for name in graphs}
        for name, (source, options) in graphs.items():
            fuse(source, targets[name], options, overwrite=False)
        if arguments.peer:
            targets["GenAI's own"] = arguments.peer
        texts, reference = [], []
        if arguments.text:
            ids = model.text.encode(read_text(arguments.text)).tolist()
            size = arguments.window
            texts = [(ids[at : at + size], 32) for at in range(0, size * arguments.windows, size)]
            best = model.manifest.variants[0]
            reference = [model.logits(text, policy=best)[prompt:] for text, prompt in texts]

        def measure(workers: list[Worker]) -> list[Result]:
            return rounds(workers, prompts, arguments.rounds, arguments.tokens)

        def quality(worker: Worker) -> tuple[float, float] | None:
            return divergence(worker, reference, texts) if texts else None

        starts = [
            partial(Worker, name, "genai", str(target), "", arguments.threads)
            for name, target in targets.items()
        ]
        results = restarted(starts, arguments.processes, measure, quality)
    base = results[-1]
    print(f"{'':16} tokens/s  against {base.name} (least, most)   KL")
    for result in results:
        middle, least, most = ratio(result, base)
        told = "" if result.kl is None else f"{result.kl:.4f} (+- {result.kl_stderr:.4f})"
        print(
            f"{result.name:16} {result.tokens_per_s:8.1f}  {middle:.3f} "
            f"({least:.3f}, {most:.3f})   {told}"
        )
    ifs, flat = results[1], results[2]
    print(f"overhead of the Ifs: {1 / ratio(ifs, flat)[0] - 1:.1%}")


def main() -> None:
    """Two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("tokens")
    one.add_argument("bundle", type=Path)
    one.add_argument("--tokens", type=int, default=64)
    one.add_argument("--policies", nargs="+", default=POLICIES)
    one.set_defaults(run=tokens)
    two = commands.add_parser("speed")
    two.add_argument("bundle", type=Path)
    two.add_argument("--peer", type=Path, help="folder of GenAI's model builder")
    two.add_argument("--budget")
    two.add_argument("--tokens", type=int, default=64)
    two.add_argument("--prompts", type=int, default=4)
    two.add_argument("--rounds", type=int, default=5, help="in each process")
    two.add_argument("--processes", type=int, default=5, help="of each graph, in turn")
    two.add_argument("--threads", type=int, default=2)
    two.add_argument("--text", type=Path, help="for the KL")
    two.add_argument("--window", type=int, default=256, help="tokens of a part of the text")
    two.add_argument("--windows", type=int, default=8)
    two.set_defaults(run=speed)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
