"""Time saved by drafting tokens, by kind of prompt, and whether the text stays the same.

    python benchmarks/speculate.py out/
    python benchmarks/speculate.py out/ --prompts spec_bench.jsonl --target int8 --target int4
    python benchmarks/speculate.py out/ --prompts spec_bench.jsonl --genai build/peers/int8
    python benchmarks/speculate.py out/ --prompts spec_bench.jsonl --llama-cpp q4_0.gguf
    python benchmarks/speculate.py out/ --prompts spec_bench.jsonl --temperature 1
    python benchmarks/speculate.py out/ --prompts spec_bench.jsonl --parallel 4

PROMPTS has one JSON object per line, with `category` and `turns` or `prompt`; its categories are
the kinds, whose speeds are summarized by a geometric mean. The built-in tasks: questions; returning
a whole source file of 60 lines with a name changed, and one of 150 with one line changed, also with
the file as expected text; and JSON with a schema of ten fields, also without forced tokens. Each
prompt is answered with and without drafting, in alternating order. The greedy texts are compared
token by token; where they first differ, the gap between the two best logits shows whether the cause
is rounding. With `--genai` a model of ORT GenAI's builder answers the same prompts, alone and with
its own n-grams; with `--llama-cpp` a GGUF file in llama.cpp, alone and with llama-cpp-python's
prompt lookup. With `--temperature` texts are sampled; they cannot be the same, but must be as
likely under the target. With `--parallel` that many answers of a kind run at once, and the table
has their total tokens per second, prompts included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from speculate_tasks import Task, tasks

import dash_onnx
from dash_onnx.core.progress import Phase
from dash_onnx.core.text import json_lines
from dash_onnx.runtime.grammar import Grammar
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GREEDY
from dash_onnx.runtime.ort import thread_count

OURS = ("off", "on", "expected")
TITLES = {"spec_bench": "Spec-Bench"}  # titles of prompt files

Answer = dict[str, Any]
"""Answer to a prompt: `tokens`, how many are `timed` and their `ms` (without the prompt's pass),
`drafted`, `accepted`, and where it `differs`, or the `nats` that each token of a sampled text loses
under the target."""

Peer = Callable[[list[int], int], tuple[list[int], float]]
"""Maps prompt ids and the most tokens to the answer's tokens, and `ms` without the first token."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is measured for each prompt."""

    target: str
    new_tokens: int
    temperature: float = 0.0
    peers: Sequence[tuple[str, Peer]] = ()
    expected: str = ""
    grammar: Grammar | None = None


def main() -> None:
    """Prints a table for each target, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument(
        "--target", action="append", help="a policy; may be repeated (default: int8)"
    )
    parser.add_argument("--per-kind", type=int, default=14, help="prompts (default: 14)")
    parser.add_argument("--tasks", type=int, help="of its own kinds (default: likewise)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=128,
        help="(default: 128; for edits, what the file takes and 32)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: 0, greedy)")
    parser.add_argument("--parallel", type=int, help="answers at once")
    parser.add_argument("--genai", type=Path, help="a model of GenAI's builder, which answers too")
    parser.add_argument("--llama-cpp", type=Path, metavar="FILE.gguf", help="likewise")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    own = tasks(arguments.tasks or arguments.per_kind)
    prompts = defaultdict[str, list[Task]](list)
    for _, record in json_lines(arguments.prompts) if arguments.prompts else ():
        given = prompts[record.get("category", "prompt")]
        if len(given) < arguments.per_kind:
            given.append(Task(record["prompt"] if "prompt" in record else record["turns"][0]))
    asked_for = {**own, **prompts}
    model = dash_onnx.load(arguments.bundle, threads=arguments.threads)
    peers = [*peers_of(arguments)]
    rows, means = list[dict[str, Any]](), list[dict[str, Any]]()
    for target in arguments.target or ["int8"] if arguments.parallel else ():
        asked = Asked(target, arguments.max_tokens)
        for kind, texts in asked_for.items():
            rows.append({"target": target, "kind": kind, **at_once(model, texts, asked, arguments)})
    if arguments.parallel:
        print(json.dumps(rows) if arguments.json else at_once_table(rows))
        return
    for target in arguments.target or ["int8"]:
        model.preload(target)
        asked = Asked(target, arguments.max_tokens, arguments.temperature, peers)
        by_kind = answered(model, asked_for, asked)
        by_kind["all"] = [one for found in by_kind.values() for one in found]
        here = []
        for kind, found in by_kind.items():
            here += [{"target": target, "kind": kind, **summary(found, who)} for who in found[0]]
        if prompts:
            name = TITLES.get(arguments.prompts.stem, arguments.prompts.stem)
            means += mean_of_kinds([row for row in here if row["kind"] in prompts], name)
        rows += here
        peers = []  # only once: they have no target
    if arguments.json:
        told = {"temperature": arguments.temperature, "rows": rows, "means": means}
        print(json.dumps({"model": model.manifest.model.name, **told}))
    else:
        print(table(rows, means))


def peers_of(arguments: argparse.Namespace) -> Iterator[tuple[str, Peer]]:
    """The requested peers, with and without their own drafting."""
    if arguments.genai:
        from dash_onnx_peers.genai import GenAI

        genai = GenAI(str(arguments.genai), thread_count()).answer
        yield "GenAI", partial(genai, drafts=False)
        yield "GenAI + ngram", partial(genai, drafts=True)
    if arguments.llama_cpp:
        try:
            from dash_onnx_peers.llama_cpp import LlamaCpp
        except ImportError:
            sys.exit("speculate.py: error: no llama-cpp-python: run `make .venv/.llama-cpp`")
        llama = LlamaCpp(str(arguments.llama_cpp), thread_count()).answer
        yield "llama.cpp", partial(llama, drafts=False)
        yield "llama.cpp + lookup", partial(llama, drafts=True)


def at_once(
    model: Model, prompts: Sequence[Task], asked: Asked, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second of answers that share passes, without and with drafting, alternating."""
    found: dict[str, list[float]] = {"off": [], "on": []}
    model.preload(asked.target)
    for turn in range(3):
        for name in ("off", "on") if turn % 2 else ("on", "off"):
            options = dataclasses.replace(
                GREEDY,
                policy=asked.target,
                max_new_tokens=asked.new_tokens,
                speculate=name == "on",
            )
            texts = [[{"role": "user", "content": task.prompt}] for task in prompts]
            started = time.perf_counter()
            answers = model.batch(texts, options=options, parallel=arguments.parallel)
            tokens = sum(answer.generated_tokens for answer in answers)
            found[name].append(tokens / (time.perf_counter() - started))
    off, on = (float(np.median(seen)) for seen in found.values())
    return {"prompts": len(prompts), "off": off, "on": on, "ratio": on / off}


def at_once_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each target and kind of prompt."""
    lines = [f"{'target':8} {'kind':17} {'prompts':>7} {'off':>8} {'on':>8} {'speed':>7}"]
    lines += [
        f"{row['target']:8} {row['kind']:17} {row['prompts']:7} {row['off']:8.1f} {row['on']:8.1f} "
        f"{row['ratio']:5.2f} x"
        for row in rows
    ]
    return "\n".join([*lines, "off, on: tokens/s of all answers, without and with drafts"])


def answered(
    model: Model, prompts: dict[str, list[Task]], asked: Asked
) -> dict[str, list[dict[str, Answer]]]:
    """Answers by kind of prompt, and by who drafts."""
    model.preload(asked.target)
    found: dict[str, list[dict[str, Answer]]] = {}
    with Phase(asked.target, total=sum(map(len, prompts.values()))) as phase:
        for kind, given in prompts.items():
            found[kind] = []
            for task in given:
                one = asked
                if task.expected:
                    whole = len(model.text.encode(task.expected)) + 32
                    one = dataclasses.replace(asked, new_tokens=whole, expected=task.expected)
                elif task.schema:
                    form = Grammar.json_schema(task.schema)
                    one = dataclasses.replace(asked, new_tokens=400, grammar=form)
                found[kind].append(answers(model, task.prompt, one, seed=len(found[kind])))
                phase.update()
    return found


def answers(model: Model, prompt: str, asked: Asked, seed: int) -> dict[str, Answer]:
    """Answers to one prompt, by who drafts."""
    ids = model.text.encode_chat([{"role": "user", "content": prompt}])
    room = model.manifest.model.max_length - asked.new_tokens
    if room < 1:
        raise SystemExit(f"the context of the bundle has no room for {asked.new_tokens} tokens")
    ids = ids[-room:]
    before, found = ids.tolist(), dict[str, Answer]()
    kinds: dict[str, dict[str, Any]] = {"off": {"speculate": False}, "on": {"speculate": True}}
    if asked.expected:
        kinds["expected"] = {"speculate": True, "expected": asked.expected}
    if asked.grammar:  # a logits processor turns forced tokens off
        kinds["off"]["logits_processor"] = lambda _, logits: logits
    for name, given in [*kinds.items()][:: -1 if seed % 2 else 1]:
        chosen = dataclasses.replace(
            GREEDY,
            policy=asked.target,
            grammar=asked.grammar,
            **given,
            max_new_tokens=asked.new_tokens,
            temperature=asked.temperature,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seed=seed,
        )
        steps = [*model.generate_step(ids, options=chosen)]
        drafts = [step.draft for step in steps if step.draft]
        rest = steps[1:]
        while rest and rest[0].ms == 0:  # tokens forced at the start came with the prompt's pass
            rest = rest[1:]
        found[name] = {
            "tokens": [step.token for step in steps],
            "timed": len(rest),
            "ms": sum(step.ms for step in rest),
            "drafted": sum(draft.tokens for draft in drafts),
            "accepted": sum(draft.accepted for draft in drafts),
            "differs": None,
        }
    alone = found["off"]["tokens"]
    for one in found.values():
        if asked.temperature:
            one["nats"] = nats(model, before, asked.target, one["tokens"])
        elif asked.grammar is None:
            one["differs"] = difference(model, before, asked.target, alone, one["tokens"])
    for name, answer in asked.peers:
        tokens, ms = answer(before, asked.new_tokens)
        found[name] = {"tokens": tokens, "timed": len(tokens) - 1, "ms": ms}
        found[name] |= {"drafted": 0, "accepted": 0, "differs": None}
    return found


def nats(model: Model, ids: list[int], target: str, tokens: Sequence[int]) -> list[float]:
    """Negative log-likelihood under the target of each sampled token but the first."""
    scored = model.score([*ids, *tokens[:-1]], prompt_tokens=len(ids), policy=target)
    lost = []
    for one, token in zip(scored, tokens[1:], strict=True):
        logits = one.logits.astype(np.float64)
        lost.append(float(np.logaddexp.reduce(logits) - logits[token]))
    return lost


def difference(
    model: Model, ids: list[int], target: str, alone: Sequence[int], other: Sequence[int]
) -> dict[str, Any] | None:
    """Where a text first differs, and how close the two best logits are there."""
    places = (n for n, (a, b) in enumerate(zip(alone, other, strict=False)) if a != b)
    if (place := next(places, None)) is None:
        return None
    before = [*ids, *alone[:place]]
    (scored,) = model.score(before, prompt_tokens=len(before) - 1, policy=target)
    best = np.argsort(-scored.logits)[:2].tolist()
    return {
        "token": place,
        "of": len(alone),
        "gap": float(scored.logits[best[0]] - scored.logits[best[1]]),
        "these_two": {*best} == {alone[place], other[place]},
    }


def summary(found: Sequence[dict[str, Answer]], who: str) -> dict[str, Any]:
    """Summary over prompts: drafts, speed relative to no drafting, and differences."""
    ms, alone_ms = (
        sum(one[name]["ms"] for one in found) / sum(one[name]["timed"] for one in found)
        for name in (who, "off")
    )
    tokens, drafted, accepted = (
        sum(count(one[who]) for one in found)
        for count in (lambda a: a["timed"], lambda a: a["drafted"], lambda a: a["accepted"])
    )
    texts = [np.mean(one[who]["nats"]) for one in found if one[who].get("nats")]
    spread = float(np.std(texts, ddof=1)) / math.sqrt(len(texts)) if len(texts) > 1 else None
    return {
        "speculate": who,
        "prompts": len(found),
        "tokens": tokens,
        "ms_per_token": ms,
        "ratio": alone_ms / ms,
        "accepted": accepted / drafted if drafted else None,
        "drafted_per_pass": drafted / max(tokens - accepted, 1),
        "differs": [one[who]["differs"] for one in found if one[who]["differs"]],
        "nats": float(np.mean(texts)) if texts else None,
        "nats_error": spread,
    }


def mean_of_kinds(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Geometric mean of the speedups in one target's rows, by who drafts."""
    ratios = defaultdict[str, list[float]](list)
    for row in rows:
        ratios[row["speculate"]].append(row["ratio"])
    return [
        {
            "target": rows[0]["target"],
            "kind": f"{name}, geometric mean",
            "speculate": who,
            "ratio": statistics.geometric_mean(found),
        }
        for who, found in ratios.items()
    ]


def table(rows: Sequence[dict[str, Any]], means: Sequence[dict[str, Any]]) -> str:
    """One line for each target, kind of prompt, and who drafts; then where texts differ."""
    lines = [
        f"{'target':8} {'kind':26} {'drafts':18} {'ms/token':>8} {'speed':>7} {'accepted':>9} "
        f"{'drafted/pass':>13} {'same text':>10} {'nats/token':>16}"
    ]
    for row in rows:
        accepted = "-" if row["accepted"] is None else f"{row['accepted']:.0%}"
        same = f"{row['prompts'] - len(row['differs'])}/{row['prompts']}"
        drawn = "-"
        if row["speculate"] not in OURS:
            same = "-"
        if row["nats"] is not None:
            same, drawn = "-", f"{row['nats']:.3f}"
            if row["nats_error"] is not None:
                drawn += f" +- {row['nats_error']:.3f}"
        lines.append(
            f"{row['target']:8} {row['kind']:26} {row['speculate']:18} {row['ms_per_token']:8.2f} "
            f"{row['ratio']:5.2f} x {accepted:>9} {row['drafted_per_pass']:13.2f} {same:>10} "
            f"{drawn:>16}"
        )
    lines += [
        f"{row['target']:8} {row['kind']:26} {row['speculate']:18} {'':8} {row['ratio']:5.2f} x"
        for row in means
    ]
    for row in rows:
        if row["kind"] != "all":
            lines += [
                f"{row['target']} {row['kind']} {row['speculate']}: differs at token "
                f"{one['token']} of {one['of']}, where the two best logits are {one['gap']:.4f} "
                f"apart{'' if one['these_two'] else '; it took another one'}"
                for one in row["differs"]
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
