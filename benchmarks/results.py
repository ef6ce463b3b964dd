"""Writes docs/results.md from what measure.py kept, and the table between README.md's marks.

    python benchmarks/results.py                # of benchmarks/results/
    python benchmarks/results.py --check        # fails where they differ from the JSON
    python benchmarks/results.py build/quick    # writes build/quick/results.md only

All parts must come from one kind of machine and the same versions, and those that show one bundle
from one commit. A part takes minutes to hours, so those with models of their own may be measured
apart.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dash_onnx.core.actions import PRECISIONS

HERE = Path(__file__).parent
ROOT = HERE.parent
SAME = ("machine", "versions")
SAME_BUNDLE = ("commit", "bundle")
MARKS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
ORIGINS = {
    "4cd0f6876d07a413": "the validation part of WikiText-2",
    "2a0ce5568625a304": "a novel, number 1661 of Project Gutenberg",
    "411bfbe5b9054346": "LAMBADA as EleutherAI publishes it",
    "4b6d33e79484f984": "the questions of Spec-Bench",
    "1d9614638d18024d": "Qwen2.5-Coder-0.5B-Instruct in Q4_K_M",
}
"""What files are, by the beginning of their SHA-256."""
Part = dict[str, Any]
PEERS = {
    "genai fused": "ORT GenAI, our fused graph of `{}`",
    "genai": "ORT GenAI, {}",
    "transformers": "transformers, FP32",
    "openvino": "OpenVINO GenAI, the GGUF file",
    "llama.cpp": "llama.cpp, the GGUF file",
}


def read(folder: Path) -> dict[str, Part]:
    """The parts by name.

    Raises:
        SystemExit: they do not belong together.
    """
    parts = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    of_bundle = [name for name, part in parts.items() if part["bundle"]]
    for keys, names in ((SAME, list(parts)), (SAME_BUNDLE, of_bundle)):
        for name in names[1:]:
            if differing := [key for key in keys if parts[name][key] != parts[names[0]][key]]:
                differ = f"{name} and {names[0]} differ in {', '.join(differing)}"
                sys.exit(f"results.py: error: {differ}")
    return parts


def page(parts: dict[str, Part]) -> str:
    """The whole of docs/results.md."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("results.md.jinja")
    functions = (
        bundle,
        contenders,
        policies,
        tasks,
        answers,
        larger,
        first_tokens,
        guessed,
        beside_genai,
        drawn,
        clients,
        sizes,
    )
    return template.render(
        parts=parts,
        any=next(iter(parts.values()), None),
        commits=sorted({(part["date"], part["commit"]) for part in parts.values()}),
        files={
            name: file
            for part in parts.values()
            for name, file in part["files"].items()
            if any(name in command["command"] for command in part["commands"])
        },
        **{function.__name__: function for function in (*functions, found, origin, seconds, shown)},
    )


def table(rows: list[list[str]], left: int = 1) -> str:
    """Markdown; the head first, and `left` columns of words."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * left + "|--:" * (len(rows[0]) - left) + "|")
    return "\n".join(lines)


def found(part: Part) -> list[Any]:
    """What the commands printed, of those that printed JSON."""
    return [command["found"] for command in part["commands"] if command["found"] is not None]


def origin(sha256: str) -> str:
    """What a file is, where that is known."""
    return f", {ORIGINS[sha256]}" if sha256 in ORIGINS else ""


def seconds(value: float) -> str:
    """A duration that is easy to read."""
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min"


def label(name: str) -> str:
    """A contender in plain words; dash-bench joins its kind, folder and file."""
    kind, _, target = name.partition(" ")
    if kind in ("dash", "dash-high"):
        policy, _, budget = target.partition("@")
        return ours(budget or policy)
    folder, _, file = target.rpartition("/")
    if told := PEERS.get(f"{kind} {folder}"):
        return told.format(file)
    return PEERS.get(kind, name).format(file.upper())


def ours(name: str) -> str:
    """A policy of the bundle, by its preset, precision or path."""
    if name in PRECISIONS:
        return f"every layer {name if name == 'full' else name.upper()}"
    if name.endswith("skips"):
        return f"policy at the cost of {name}"
    if name.endswith("nats"):
        return f"policy where the best static loses {name}"
    return f"`{name}`" if name.startswith("static") else f"policy at `{name}`"


def plus_minus(value: float | None, error: float | None, digits: int = 4) -> str:
    """A figure with its standard error."""
    if value is None:
        return "-"
    return f"{value:.{digits}f} ± {error:.{digits}f}" if error else f"{value:.{digits}f}"


def percent(value: float, error: float | None) -> str:
    """A share likewise."""
    return f"{value:.1%} ± {error:.1%}" if error else f"{value:.1%}"


def shown(command: dict[str, Any]) -> str:
    """A command in lines that fit a page, and the time it took."""
    joined = re.sub(r" (?!-)", "\0", command["command"])  # an option stays with its value
    lines = textwrap.wrap(joined, 94, break_long_words=False, break_on_hyphens=False)
    text = " \\\n  ".join(lines).replace("\0", " ")
    return f"{text}   # {seconds(command['seconds'])}"


def contenders(bench: Any, *columns: str, kinds: str = "", sort: bool = False) -> str:
    """What dash-bench found; `kinds`: of those alone; `sort`: from fast to slow."""
    rows = [c for c in bench["contenders"] if re.match(kinds, c["name"])]
    peer = next((c for c in rows if c["name"].startswith("genai")), None)
    if peer:
        rows = [{**c, "ratio": c["tokens_per_s"] / peer["tokens_per_s"]} for c in rows]
    if sort:
        rows.sort(key=lambda c: -c["tokens_per_s"])
    cells = [[label(c["name"]), *(COLUMNS[column](c) for column in columns)] for c in rows]
    return table([["", *columns], *cells])


def _span(c: dict[str, Any]) -> str:
    rates = [1e3 / ms for ms in c["decode_ms"]]
    return f"{c['tokens_per_s']:.0f} ({min(rates):.0f}-{max(rates):.0f})"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda c: f"{c['tokens_per_s']:.0f}",
    "tokens/s (rounds)": _span,
    "GenAI = 1": lambda c: f"{c['ratio']:.2f}",
    "first token, ms": lambda c: f"{statistics.median(c['ttft_ms']):.0f}",
    "KL": lambda c: "-" if c["kl"] is None else f"{c['kl']:.2g}" if c["kl"] > 1e-4 else "0",
    "KL, nats": lambda c: plus_minus(c["kl"], c["kl_stderr"]),
    "peak memory, MB": lambda c: f"{c['peak_rss_bytes'] / 1e6:.0f}",
    "load, s": lambda c: f"{c['load_s']:.1f}",
}


def policies(texts: list[Any], *baselines: str) -> str:
    """The policy beside what may stand in its place, by text."""
    others = ("static", *baselines)
    rows = [["text", "", "cost", "KL, nats", "top-1", "best static", *baselines]]
    for text in texts:
        for name in dict.fromkeys(row["name"] for row in text["rows"]):
            of = {row["policy"]: row for row in text["rows"] if row["name"] == name}
            own = of.get("dash") or of[name]
            kl, top1 = plus_minus(own["kl"], own["kl_stderr"]), f"{own['top1']:.1%}"
            cells = [
                f"{row['kl']:.4f} at {row['cost']:.3f}" if row else ""
                for row in map(of.get, others)
            ]
            rows.append([text["text"], ours(name), f"{own['cost']:.3f}", kl, top1, *cells])
    return table(rows, left=2)


def tasks(part: Part) -> str:
    """Accuracy by task and policy."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for command in part["commands"]:
        (policy,) = re.findall(r"--(?:policy|budget) (\S+)", command["command"])
        for task, scores in command["found"]["results"].items():
            for metric in ("acc", "acc_norm", "exact_match"):
                if (value := scores.get(f"{metric},none")) is not None:
                    row = cells.setdefault((task, metric, str(scores["sample_len"])), {})
                    row[ours(policy)] = percent(value, scores[f"{metric}_stderr,none"])
    columns = list(dict.fromkeys(policy for row in cells.values() for policy in row))
    rows = [[*key, *(row.get(column, "") for column in columns)] for key, row in cells.items()]
    return table([["task", "metric", "items", *columns], *rows], left=2)


def answers(part: Part) -> str:
    """Length and repetition by policy."""
    rows = [["", "mean length, tokens", "ended by itself", "repeated 4-grams"]]
    for row in found(part)[0]:
        rows.append(
            [
                ours(row["name"]),
                plus_minus(row["length"], row["length_stderr"], 1),
                f"{row['ended']:.0%}",
                percent(row["repeated"], row["repeated_stderr"]),
            ]
        )
    return table(rows)


def larger(part: Part) -> list[dict[str, Any]]:
    """By export of the larger model: its command, and what each benchmark of it gave."""
    exports: list[dict[str, Any]] = []
    for command in part["commands"]:
        result = command["found"]
        if result is None:
            continue
        if command["command"].startswith("dash-export"):
            exports.append({**command, "benches": [], "texts": []})
        elif "first_token" in command["command"]:
            exports[-1]["first_tokens"] = result
        elif "policies" in command["command"]:
            exports[-1]["texts"].append(result)
        else:
            exports[-1]["benches"].append(result)
    return exports


def first_tokens(rows_of: list[dict[str, Any]]) -> str:
    """KL of an answer's first token by the precision of the prompt."""
    rows = [["", "KL, nats", "largest", "another token"]]
    for row in rows_of:
        kl, count = plus_minus(row["kl"], row["kl_stderr"]), row["chats"]
        others = f"{row['other_first_token']} of {count}"
        rows.append([row["precision"], kl, f"{row['kl_max']:.4f}", others])
    return table(rows)


def guessed(part: Part) -> str:
    """What guessing tokens brings, by target and kind of prompt."""
    head = ["target", "prompts", "ms a token", "`ngram`", "`dash`", "`auto`", "accepted"]
    rows = [[*head, "same text", "largest gap"]]
    for (target, kind), by in _by_prompt(found(part)[0]).items():
        auto = by["auto"]
        gaps = [one["gap"] for one in auto["differs"]]
        rows.append(
            [
                target,
                kind,
                f"{by['off']['ms_per_token']:.1f}",
                *(f"{by[name]['ratio']:.2f}" for name in ("ngram", "dash", "auto")),
                "-" if auto["accepted"] is None else f"{auto['accepted']:.0%}",
                f"{auto['prompts'] - len(gaps)} of {auto['prompts']}",
                f"{max(gaps):.2f}" if gaps else "-",
            ]
        )
    return table(rows, left=2)


def beside_genai(part: Part) -> str:
    """Tokens per second with guesses, ours and GenAI's own, by kind of prompt."""
    rows = [["prompts", "GenAI", "GenAI, guessing", "dash-onnx", "dash-onnx, guessing", "ratio"]]
    for (_, kind), by in _by_prompt(found(part)[0]).items():
        if "GenAI" in by:
            names = ("GenAI", "GenAI + ngram", "off", "auto")
            speeds = [1e3 / by[name]["ms_per_token"] for name in names]
            rows.append(
                [kind, *(f"{speed:.0f}" for speed in speeds), f"{speeds[3] / speeds[1]:.2f}"]
            )
    return table(rows)


def drawn(part: Part) -> str:
    """What drawn texts lose by their target, and how fast they came, by who guesses."""
    rows = [["guesses", "nats a token", "speed"]]
    for (_, kind), by in _by_prompt(found(part)[1]).items():
        if kind == "all":
            for name, row in by.items():
                nats = plus_minus(row["nats"], row["nats_error"], 3)
                rows.append([f"`{name}`", nats, f"{row['ratio']:.2f}"])
    return table(rows)


def _by_prompt(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """By target and kind of prompt: what was measured, by who guesses."""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in result["rows"]:
        runs.setdefault((row["target"], row["kind"]), {})[row["speculate"]] = row
    return runs


def clients(part: Part) -> str:
    """The servers of a run, by number of clients."""
    rows = [["", "clients", "tokens/s, together", "times one client", "between tokens, ms"]]
    (measured,) = found(part)
    for server, facts in measured.items():
        for count, rate in facts["tokens_per_s"].items():
            gaps = facts["between_ms"][count]
            ratio = f"{facts['ratio'][count]:.2f}"
            rows.append([server, count, f"{rate:.0f}", ratio, _gaps(gaps)])
        if stalled := facts.get("while_long_prompts_arrive"):
            rows.append([server, "3, long prompts", "", "", _gaps(stalled)])
    return table(rows)


def _gaps(quantiles: dict[str, float]) -> str:
    return f"{quantiles['p50']:.0f}, {quantiles['p99']:.0f}"


def sizes(part: Part) -> str:
    """Time and memory by the size of a model; the last row of a shape is extrapolated."""
    head = ["", "export, min", "its memory, GB", "bundle, GB", "a pass, min", "its memory, GB"]
    rows = [head]
    for row in found(part)[0]:
        for facts in (*row["measured"], row):
            name = f"{row['shape']}, {facts['layers']:.0f} layers"
            times = [f"{facts[key] / 60:.1f}" for key in ("export_s", "pass_s")]
            room = [f"{facts[key]:.1f}" for key in ("export_gb", "bundle_gb", "pass_gb")]
            rows.append([name, times[0], *room[:2], times[1], room[2]])
    return table(rows)


def bundle(part: Part) -> str:
    """What an action costs."""
    facts = found(part)[0]
    costs, layers = facts["costs"], facts["layers"]
    actions, heads = [*facts["variants"], "skip"], costs["heads_ms"]
    middle = {a: statistics.median(layer[a] for layer in costs["layers_ms"]) for a in actions}
    size = {a: sum(layer["bytes"][a] for layer in layers) for a in actions}
    columns = list(dict.fromkeys([*facts["variants"], *heads, "skip"]))

    def row(name: str, values: dict[str, float], factor: float) -> list[str]:
        return [name, *(f"{values[a] * factor:.0f}" if a in values else "-" for a in columns)]

    return table(
        [
            ["", *columns],
            row("one layer, µs (median)", middle, 1e3),
            row("all layers, MB", size, 1e-6),
            row("LM head, µs", heads, 1e3),
        ]
    )


def main() -> None:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="(default: benchmarks/results)")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    parts = read(arguments.folder or HERE / "results")
    texts = {(arguments.folder or ROOT / "docs") / "results.md": page(parts)}
    if "speed" in parts and arguments.folder is None:
        readme = ROOT / "README.md"
        columns = ("tokens/s", "KL", "peak memory, MB")
        short = contenders(found(parts["speed"])[-1], *columns, kinds="dash|genai", sort=True)
        texts[readme] = MARKS.sub(rf"\1{short}\n\2", readme.read_text("utf-8"))
    for path, text in texts.items():
        if not arguments.check:
            path.write_text(text, "utf-8")
        elif not path.is_file() or path.read_text("utf-8") != text:
            sys.exit(f"results.py: error: {path} is not what the results give: run it again")


if __name__ == "__main__":
    main()
