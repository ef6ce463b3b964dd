"""The tables of docs/results.md, each from one part saved by measure.py."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from dash_onnx.bench.measure import Result, dominated, is_preset, ratio
from dash_onnx.core.actions import PRECISIONS

Part = dict[str, Any]
PEERS = {
    "genai fused": "ORT GenAI, our fused graph of `{}`",
    "genai": "ORT GenAI, {}",
    "transformers": "transformers, FP32",
    "openvino": "OpenVINO GenAI, the GGUF file",
    "openvino openvino-int4": "OpenVINO GenAI, INT4",
    "openvino-f32": "OpenVINO GenAI in FP32, the GGUF file",
    "openvino-f32 openvino-int4": "OpenVINO GenAI in FP32, INT4",
    "llama.cpp": "llama.cpp, the GGUF file",
    "llama.cpp q4_0.gguf": "llama.cpp, Q4_0",
}


def table(rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; header first, and `left` columns of words."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * left + "|--:" * (len(rows[0]) - left) + "|")
    return "\n".join(lines)


def found(part: Part) -> list[Any]:
    """Outputs of the commands that printed JSON."""
    return [command["found"] for command in part["commands"] if command["found"] is not None]


def results(bench: Any) -> list[Result]:
    """The contenders of a run, as dash-bench measured them."""
    same = ("name", "decode_ms", "ttft_ms", "load_s", "peak_rss_bytes", "kl", "kl_stderr")
    return [Result(**{key: row[key] for key in same}) for row in bench["contenders"]]


def label(name: str) -> str:
    """Plain words for a contender, whose kind, folder and file dash-bench joins."""
    kind, _, target = name.partition(" ")
    if kind in ("dash", "dash-low"):
        policy, _, budget = target.partition("@")
        return ours(budget or policy) if policy else f"preset `{budget}`"
    folder, _, file = target.rpartition("/")
    for part in (folder, file):
        if told := PEERS.get(f"{kind} {part}"):
            return told.format(file)
    return PEERS.get(kind, name).format(file.upper())


def ours(name: str) -> str:
    """Plain words for a policy of the bundle, by its preset, precision or path."""
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
    if value < 0.5 / 10**digits:
        return "0"
    return f"{value:.{digits}f} ± {error:.{digits}f}" if error else f"{value:.{digits}f}"


def percent(value: float, error: float | None) -> str:
    """A percentage with its standard error."""
    return f"{value:.1%} ± {error:.1%}" if error else f"{value:.1%}"


def contenders(bench: Any, *columns: str, kinds: str = "", sort: bool = False) -> str:
    """Results of dash-bench; `kinds` selects contenders, `sort` orders them from fast to slow.

    Columns that were not measured are left out.
    """
    rows = [c for c in bench["contenders"] if re.match(kinds, c["name"])]
    peer = next((c for c in rows if c["name"].startswith("genai")), None)
    if peer:
        rows = [{**c, "ratio": c["tokens_per_s"] / peer["tokens_per_s"]} for c in rows]
    if sort:
        rows.sort(key=lambda c: -c["tokens_per_s"])
    cells = {column: [COLUMNS[column](c) for c in rows] for column in columns}
    shown = [[column, *cells[column]] for column in columns if {*cells[column]} != {"-"}]
    names = ["", *(label(c["name"]) for c in rows)]
    return table([list(row) for row in zip(names, *shown, strict=True)])


def dominance(bench: Any) -> str:
    """Which presets of a run another row dominates; empty if no preset's KL was measured."""
    rows = results(bench)
    if not any(is_preset(row) and row.kl is not None for row in rows):
        return ""
    told = []
    for preset, other in dominated(rows):
        assert preset.kl is not None and other.kl is not None
        speed, lost = ratio(preset, other)[0], preset.kl - other.kl
        figures = f"{speed:.3f} times as fast, {lost:.4f} nats more"
        told.append(f"{label(preset.name)} by {label(other.name)} ({figures})")
    return f"Dominated: {'; '.join(told)}." if told else "No preset is dominated by another row."


def _span(c: dict[str, Any]) -> str:
    rates = [1e3 / ms for ms in c["decode_ms"]]
    return f"{c['tokens_per_s']:.0f} ({min(rates):.0f}-{max(rates):.0f})"


def _at_context(
    c: dict[str, Any], tokens: int, fact: str = "tokens_per_s", unit: float = 1.0
) -> str:
    """Speed, or another figure, with a context of the given length."""
    found = c.get("contexts", {}).get(str(tokens), {})
    return f"{found[fact] / unit:.0f}" if fact in found else "-"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda c: f"{c['tokens_per_s']:.0f}",
    "tokens/s (rounds)": _span,
    "GenAI = 1": lambda c: f"{c['ratio']:.2f}" if "ratio" in c else "-",
    "first token, ms": lambda c: f"{statistics.median(c['ttft_ms']):.0f}",
    "pp512": lambda c: _at_context(c, 512, "prefill_tokens_per_s"),
    "after 1,000": lambda c: _at_context(c, 1000),
    "after 3,500": lambda c: _at_context(c, 3500),
    "KL, nats": lambda c: plus_minus(c["kl"], c["kl_stderr"]),
    "peak memory, MB": lambda c: f"{c['peak_rss_bytes'] / 1e6:.0f}",
    "with 1,000": lambda c: _at_context(c, 1000, "peak_rss_bytes", 1e6),
    "with 3,500": lambda c: _at_context(c, 3500, "peak_rss_bytes", 1e6),
    "load, s": lambda c: f"{c['load_s']:.1f}",
}


def policies(texts: list[Any], *baselines: str) -> str:
    """The policy and its alternatives, by text."""
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
        if command["found"] is None:
            continue
        ((option, policy),) = re.findall(r"--(policy|budget) (\S+)", command["command"])
        name = label(f"dash @{policy}" if option == "budget" else f"dash {policy}")
        for task, scores in command["found"]["results"].items():
            for metric in ("acc", "acc_norm", "exact_match"):
                if (value := scores.get(f"{metric},none")) is not None:
                    row = cells.setdefault((task, metric, str(scores["sample_len"])), {})
                    row[name] = percent(value, scores[f"{metric}_stderr,none"])
    columns = list(dict.fromkeys(policy for row in cells.values() for policy in row))
    rows = [[*key, *(row.get(column, "") for column in columns)] for key, row in cells.items()]
    return table([["task", "metric", "items", *columns], *rows], left=2)


def answers(part: Part) -> str:
    """Length and repetition by policy."""
    rows = [["", "mean length, tokens", "ended with EOS", "repeated 4-grams"]]
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


def read_speed(part: Part) -> float:
    """Best read bandwidth of the machine in GB/s, as other work only slows it; 0 if unknown."""
    found = (command["found"] for command in part["commands"])
    told = (one.get("read_gb_per_s", 0.0) for one in found if isinstance(one, dict))
    return max([part.get("read_gb_per_s", 0.0), *told])


def larger(part: Part) -> list[dict[str, Any]]:
    """By export of the larger model: its command, and the result of each benchmark of it."""
    exports: list[dict[str, Any]] = []
    for command in part["commands"]:
        result = command["found"]
        if result is None:
            continue
        if command["command"].startswith("dash-export"):
            exports.append({**command, "benches": [], "texts": []})
        elif isinstance(result, list):
            exports[-1]["first_tokens"] = result
        elif "policies" in command["command"]:
            exports[-1]["texts"].append(result)
        else:
            exports[-1]["benches"].append(result)
    return exports


def first_tokens(rows_of: list[dict[str, Any]]) -> str:
    """KL of an answer's first token by the precision of the prompt."""
    rows = [["", "KL, nats", "maximum", "different token"]]
    names = {"default": "default of `int4`: wide where faster"}
    for row in rows_of:
        kl, count = plus_minus(row["kl"], row["kl_stderr"]), row["chats"]
        others = f"{row['other_first_token']} of {count}"
        name = names.get(row["precision"], row["precision"])
        rows.append([name, kl, f"{row['kl_max']:.4f}", others])
    return table(rows)


def forms(part: Part) -> str:
    """KL inside prompts and after them, by text and form of the prompt."""
    rows = [["text", "prompt in", "KL in the prompt", "KL of `int4` after it"]]
    for text, by_form in found(part)[0].items():
        rows += [[text, form, *(f"{kl:.4f}" for kl in by_form[form])] for form in by_form]
    return table(rows, left=2)


def drafted(part: Part) -> str:
    """Gain from drafting tokens, by target and kind of prompt."""
    head = ["target", "prompts", "ms per token", "speed", "with the expected text", "accepted"]
    rows = [[*head, "same text", "largest gap"]]
    for target, kinds in _by_target(found(part)[0]).items():
        for kind, by in kinds.items():
            on, expected = by["on"], by.get("expected")
            gaps = [one["gap"] for one in on["differs"]]
            rows.append(
                [
                    target,
                    kind,
                    f"{by['off']['ms_per_token']:.1f}",
                    f"{on['ratio']:.2f}",
                    f"{expected['ratio']:.2f}" if expected else "-",
                    "-" if on["accepted"] is None else f"{on['accepted']:.0%}",
                    f"{on['prompts'] - len(gaps)} of {on['prompts']}",
                    f"{max(gaps):.2f}" if gaps else "-",
                ]
            )
        mean = _mean_of_kinds([by["on"]["ratio"] for kind, by in kinds.items() if kind != "all"])
        rows.append([target, "geometric mean of kinds", "", mean, "", "", "", ""])
        rows += [
            [target, row["kind"], "", f"{row['ratio']:.2f}", "", "", "", ""]
            for row in found(part)[0].get("means", [])
            if (row["target"], row["speculate"]) == (target, "on")
        ]
    return table(rows, left=2)


_DRAFTING = {
    "GenAI": "GenAI",
    "GenAI + ngram": "GenAI, speculative",
    "llama.cpp": "llama.cpp",
    "llama.cpp + lookup": "llama.cpp, speculative",
}


def beside_peers(part: Part) -> str:
    """Tokens per second with drafting, ours and peers', by kind of prompt."""
    targets = _by_target(found(part)[0])
    theirs = next(iter(targets.values()))  # they are measured only with the first target
    names = {name: told for name, told in _DRAFTING.items() if name in next(iter(theirs.values()))}
    rows = [["prompts", *names.values()]]
    for target in targets:
        rows[0] += [f"`{target}`", f"`{target}`, speculative", "ratio"]
    ratios: dict[str, list[float]] = {target: [] for target in targets}
    for kind, by in theirs.items():
        if "GenAI" not in by:
            continue
        best = min(by[name]["ms_per_token"] for name in ("GenAI", "GenAI + ngram"))
        row = [kind, *(f"{1e3 / by[n]['ms_per_token']:.0f}" for n in names)]
        for target, kinds in targets.items():
            ours = [kinds[kind][name]["ms_per_token"] for name in ("off", "on")]
            row += [*(f"{1e3 / ms:.0f}" for ms in ours), f"{best / ours[1]:.2f}"]
            ratios[target] += [best / ours[1]] if kind != "all" else []
        rows.append(row)
    means = [word for seen in ratios.values() for word in ("", "", _mean_of_kinds(seen))]
    return table([*rows, ["geometric mean of kinds", *[""] * len(names), *means]])


def _mean_of_kinds(ratios: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f}" if ratios else "-"


def drawn(part: Part) -> str:
    """Loss of sampled texts by their target, and their speed, by who drafts."""
    rows = [["drafts", "nats per token", "speed"]]
    for kinds in _by_target(found(part)[0]).values():
        for name, row in kinds["all"].items():
            nats = plus_minus(row["nats"], row["nats_error"], 3)
            rows.append([name, nats, f"{row['ratio']:.2f}"])
    return table(rows)


def at_once(part: Part) -> str:
    """Tokens per second of several answers at once, with and without drafting."""
    rows = [["prompts", "without drafts", "with drafts", "ratio"]]
    for row in found(part)[1]:
        speeds = [f"{row[name]:.0f}" for name in ("off", "on")]
        rows.append([row["kind"], *speeds, f"{row['ratio']:.2f}"])
    return table(rows)


def _by_target(result: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Measurements by target, kind of prompt and who drafts."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        kinds = runs.setdefault(row["target"], {})
        kinds.setdefault(row["kind"], {})[row["speculate"]] = row
    return runs


def clients(part: Part) -> str:
    """The servers of a run, by number of clients."""
    rows = [["", "clients", "tokens/s in total", "relative to one client", "between tokens, ms"]]
    (measured,) = found(part)
    for server, facts in measured.items():
        for count, rate in facts["tokens_per_s"].items():
            gaps = facts.get("between_ms", {}).get(count)
            ratio = rate / next(iter(facts["tokens_per_s"].values()))
            cells = [server, count, f"{rate:.0f}", f"{ratio:.2f}"]
            rows.append([*cells, _gaps(gaps) if gaps else ""])
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
            room = [f"{facts[key]:.1f}" for key in ("export_gb", "bundle_gb")]
            room.append(f"{facts['pass_gb']:.1f}" if "pass_gb" in facts else "-")
            rows.append([name, times[0], *room[:2], times[1], room[2]])
    return table(rows)


def shapes(part: Part) -> list[dict[str, Any]]:
    """By shape: its layers, export and benchmark."""
    made: list[dict[str, Any]] = []
    for command in part["commands"]:
        if named := re.search(r"--shape (\S+) --layers (\d+)", command["command"]):
            made.append({"name": named[1], "layers": named[2]})
        elif "export" in (command["found"] or {}):
            made[-1]["export"] = command["found"]["export"]
        elif command["found"]:
            made[-1]["bench"] = command["found"]
    return made


def bundle(part: Part) -> str:
    """Costs of actions."""
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
