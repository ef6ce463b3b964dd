"""Writes docs/results.md, its pictures and README.md's table from what measure.py saved.

    python benchmarks/results.py                # of benchmarks/results/ and its folders
    python benchmarks/results.py --check        # fails where they differ from the JSON
    python benchmarks/results.py build/quick    # writes build/quick/results.md only

All parts of a page must come from one kind of machine; those that time the demo bundle must come
from one commit and the same versions of packages they share, and so must those that judge its
texts. A part takes minutes to hours, so the others may be measured separately: the page names the
versions in which they differ from most parts. A folder next to the parts, written by
`measure.py --out`, holds the results of another kind of machine, and gets its own page; README.md
has the table of `README_MACHINE`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import result_tables as tables
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dash_onnx.bench.picture import draw

HERE = Path(__file__).parent
ROOT = HERE.parent
README_MACHINE = "vnni"
SAME = ("machine",)
SAME_BUNDLE = ("commit", "versions", "bundle")
TIMED, JUDGED = ("bundle", "speed", "memory", "context"), ("quality", "tasks", "answers")
MARKS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
ORIGINS = {
    "4cd0f6876d07a413": "the validation part of WikiText-2",
    "2a0ce5568625a304": "a novel, number 1661 of Project Gutenberg",
    "411bfbe5b9054346": "LAMBADA as EleutherAI publishes it",
    "1591d2431c45b171": "the validation part of ARC Easy",
    "5eacf9c47ba3aa42": "the first 2,000 items of HellaSwag's validation part",
    "4b6d33e79484f984": "the questions of Spec-Bench",
    "8d2def6bcae09679": "questions and answers of Dolly and HH-RLHF, from llm-foundry",
    "1d9614638d18024d": "Qwen2.5-Coder-0.5B-Instruct in Q4_K_M",
}
"""Descriptions of files, by the first digits of their SHA-256."""


def read(folder: Path) -> dict[str, tables.Part]:
    """The parts by name.

    Raises:
        SystemExit: the parts do not belong together.
    """
    parts = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    groups = [(SAME_BUNDLE, [name for name in group if name in parts]) for group in (TIMED, JUDGED)]
    for keys, names in ((SAME, list(parts)), *groups):
        for name in names[1:]:
            one, other = parts[name], parts[names[0]]
            if differing := [key for key in keys if _differ(one[key], other[key])]:
                differ = f"{name} and {names[0]} differ in {', '.join(differing)}"
                sys.exit(f"results.py: error: {differ}")
    return parts


def _differ(one: str | dict[str, str], other: str | dict[str, str]) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one != other
    return any(one[name] != other[name] for name in one.keys() & other.keys())


def page(parts: dict[str, tables.Part], machine: str = "", others: Sequence[str] = ()) -> str:
    """The whole of docs/results.md, or of the page of another machine."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("results.md.jinja")
    functions = (
        tables.bundle,
        tables.contenders,
        tables.dominance,
        tables.policies,
        tables.tasks,
        tables.answers,
        tables.larger,
        tables.read_speed,
        tables.first_tokens,
        tables.forms,
        tables.drafted,
        tables.beside_peers,
        tables.drawn,
        tables.at_once,
        tables.clients,
        tables.sizes,
        tables.shapes,
        tables.found,
        origin,
        seconds,
        shown,
    )
    versions = common_versions(parts)
    return template.render(
        parts=parts,
        machine=machine,
        others=others,
        any=next(iter(parts.values()), None),
        versions=versions,
        noted=any(part["versions"].items() - versions.items() for part in parts.values()),
        commits=sorted({(part["date"], part["commit"]) for part in parts.values()}),
        files={
            name: file
            for part in parts.values()
            for name, file in part["files"].items()
            if any(name in command["command"] for command in part["commands"])
        },
        **{function.__name__: function for function in functions},
    )


def common_versions(parts: dict[str, tables.Part]) -> dict[str, str]:
    """By package: the version that most parts used, the first of equally common ones."""
    counts: dict[str, Counter[str]] = {}
    for _, part in sorted(parts.items()):
        for name, version in part["versions"].items():
            counts.setdefault(name, Counter())[version] += 1
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def origin(sha256: str) -> str:
    """Description of a file, if known."""
    return f", {ORIGINS[sha256]}" if sha256 in ORIGINS else ""


def seconds(value: float) -> str:
    """A readable duration."""
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min"


def shown(command: dict[str, Any]) -> str:
    """A command wrapped to the page width, and the time it took."""
    joined = re.sub(r" (?!-)", "\0", command["command"])  # an option stays with its value
    lines = textwrap.wrap(joined, 94, break_long_words=False, break_on_hyphens=False)
    text = " \\\n  ".join(lines).replace("\0", " ")
    return f"{text}   # {seconds(command['seconds'])}"


def plain(name: str) -> str:
    """Name of a contender without code formatting."""
    return tables.label(name).replace("`", "")


def main() -> None:
    """Writes or checks the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="(default: benchmarks/results)")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    results, docs = arguments.folder or HERE / "results", arguments.folder or ROOT / "docs"
    folders = sorted(filter(Path.is_dir, results.iterdir()))
    machines = {"": read(results), **{folder.name: read(folder) for folder in folders}}
    texts, pictures = {}, {}
    for name, parts in machines.items():
        end, others = f"-{name}" if name else "", [] if name else [*machines][1:]
        texts[docs / f"results{end}.md"] = page(parts, name, others)
        if "speed" in parts:
            pictures[docs / f"speed{end}.png"] = tables.found(parts["speed"])[-1]
    speed = pictures.get(docs / f"speed-{README_MACHINE}.png")
    if speed and arguments.folder is None:
        readme = ROOT / "README.md"
        columns = ("tokens/s (rounds)", "pp512", "KL, nats", "peak memory, MB")
        short = tables.contenders(speed, *columns, kinds="dash|genai|openvino |llama", sort=True)
        texts[readme] = MARKS.sub(rf"\1{short}\n\2", readme.read_text("utf-8"))
    for path, text in texts.items():
        if not arguments.check:
            path.write_text(text, "utf-8")
        elif not path.is_file() or path.read_text("utf-8") != text:
            sys.exit(f"results.py: error: {path} is not what the results give: run it again")
    for picture, speed in pictures.items() if not arguments.check else ():
        draw(tables.results(speed), picture, speed["machine"], plain)


if __name__ == "__main__":
    main()
