"""Measures what docs/results.md shows, part by part, and saves each command's output as JSON.

    python benchmarks/measure.py --bundle build/demo/bundle --text wikitext2-valid.txt
    python benchmarks/measure.py speed memory --bundle out/ --quick

`make results` calls it with the demo bundle and its peers, and then results.py, which writes the
page. A part is a list of commands; the output of those that end in `--json` is saved, with the
commit, the machine, the versions and the seconds taken. `--quick` writes to build/quick/ instead.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circumstances import circumstances

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.plans import preset_plans

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path("build/results")
OTHER_FULL, OTHER_PEERS, LINES = BUILD / "other-full", BUILD / "other-peers", BUILD / "lines.txt"
REFERENCE, OUT, QUICK_OUT = BUILD / "full", "benchmarks/results", "build/quick"
NUMBERS = BUILD / "numbers.txt"  # 2,000 tokens: for bundles in full, or only timed
Command = list[str | Path]
COUNT: Command = ["sh", "-c", f"seq -s, 500 > {NUMBERS}"]
PROMPT_FORMS: Command = ["python", "benchmarks/prompt_forms.py", "--reference", OTHER_FULL]
MATH = BUILD / "math_reasoning.jsonl"
PROFILE: Command = ["dash-profile", BUILD / "other"]  # drafting needs current times of passes


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    processes: int = 3
    rounds: int = 2
    prompts: int = 3
    new_tokens: int = 64
    windows: int = 8
    items: int = 500
    other_items: int = 200
    answers: int = 100
    per_kind: int = 4
    many_per_kind: int = 10  # the number in most kinds of Spec-Bench
    count_to: int = 900  # in the long prompt; about four tokens per number


QUICK = Size(1, 1, 1, 4, 1, 2, 2, 1, 1, 1, 50)


def bundle(a: argparse.Namespace, _: Size) -> list[Command]:
    """Costs of actions, and the export, from the manifest; the reference. 1 minute."""
    return [COUNT, _reference(a.model, REFERENCE), ["dash-info", a.bundle, "--json"]]


def _reference(model: Path, out: Path) -> Command:
    export: Command = ["dash-export", model, out, "--variants", "full", "--overwrite"]
    return [*export, "--calibration", NUMBERS, "--effort", "none", "--check", "none"]


def speed(a: argparse.Namespace, size: Size) -> list[Command]:
    """Speed, memory and quality, compared to the peers. 10 minutes."""
    bench: Command = ["dash-bench", a.bundle, "--reference", REFERENCE, *_peers(a.peer)]
    return [[*bench, *_amount(size), "--json"]]


def memory(a: argparse.Namespace, size: Size) -> list[Command]:
    """The same policies with `--memory low`. 2 minutes."""
    bench: Command = ["dash-bench", a.bundle, "--reference", REFERENCE, "--memory", "low"]
    return [[*bench, *_amount(size), "--skip", "contexts", "--json"]]


def context(a: argparse.Namespace, size: Size) -> list[Command]:
    """Decoding and prompt speed at about 3,500 tokens. 3 minutes."""
    prompt = BUILD / "long.txt"
    bench: Command = ["dash-bench", a.bundle, "--policy", "int4", "--policy", "dash@balanced"]
    bench += _peers([peer for peer in a.peer if re.match("genai:.*int4", peer)])
    amount = _amount(replace(size, processes=1))
    return [
        ["sh", "-c", f"seq -s, {size.count_to} > {prompt}"],
        [*bench, "--prompts", prompt, "--skip", "quality", "--skip", "contexts", *amount, "--json"],
    ]


def other_memory(a: argparse.Namespace, size: Size) -> list[Command]:
    """Memory of the larger model by context, in full and with `--memory low`. 8 minutes."""
    ours: Command = ["dash-bench", BUILD / "other", "--policy", "int4", "--policy", "@balanced"]
    ours += ["--skip", "quality", *_amount(replace(size, processes=1))]
    peers = [f"genai:{peer}" for peer in (OTHER_PEERS / "int4", BUILD / "fused/int4")]
    peers += [f"llama.cpp:{OTHER_PEERS / 'q4_0.gguf'}"] if a.other.suffix == ".gguf" else []
    return [[*ours, *_peers(peers), "--json"], [*ours, "--memory", "low", "--json"]]


def quality(a: argparse.Namespace, size: Size) -> list[Command]:
    """KL of precisions, presets and baselines on each text. 4 minutes per text."""
    return [_policies(a.bundle, text, size) for text in a.text]


def skips(a: argparse.Namespace, size: Size) -> list[Command]:
    """The same between INT8 and skip, in a separate bundle. 20 minutes, and 6 per text."""
    out = BUILD / "int8"
    export: Command = ["dash-export", a.model, out, "--variants", "int8", "--requantize"]
    export += ["--effort", a.effort, "--overwrite", "--json"]
    return [export, *(_policies(out, text, size, "--skips", "2", "4", "6", "8") for text in a.text)]


def tasks(a: argparse.Namespace, size: Size) -> list[Command]:
    """Accuracy on each task. 8 minutes per task."""
    return _tasks(a.task, size.items, REFERENCE, a.bundle)


def other_tasks(a: argparse.Namespace, size: Size) -> list[Command]:
    """The same for the larger model, after `other`. 15 minutes per task."""
    return _tasks(a.task, size.other_items, OTHER_FULL, BUILD / "other")


def other_free(a: argparse.Namespace, size: Size) -> list[Command]:
    """Math from PROMPTS, answered freely by the larger model, after `other`. 45 minutes."""
    math: Command = ["sh", "-c", f'grep \'"math_reasoning"\' "$0" > {MATH}', a.prompts]
    task = Path("benchmarks/math_reasoning.yaml")
    return [math, *_tasks([task], size.other_items, OTHER_FULL, BUILD / "other")]


def _apart(bundle: Path) -> list[str]:
    """Presets, but only the first of those that run the same plan."""
    plans = preset_plans(Bundle(ROOT / bundle).manifest)
    return [n for i, n in enumerate(plans) if plans[n] not in [*plans.values()][:i]]


def _tasks(tasks: list[Path], items: int, reference: Path, bundle: Path) -> list[Command]:
    runs: list[Command] = [[reference, "--policy", "full"]]
    runs += [[bundle, "--policy", precision] for precision in ("int8", "int4")]
    runs += [[bundle, "--budget", preset] for preset in _apart(bundle)]
    return [
        ["dash-eval", *chosen, "--task", task, "--limit", str(items), "--json"]
        for task in tasks
        for chosen in runs
    ]


def answers(a: argparse.Namespace, size: Size) -> list[Command]:
    """Length and repetition of answers. 5 minutes."""
    command: Command = ["python", "benchmarks/answers.py", a.bundle, "--prompts", a.prompts]
    return [[*command, "--limit", str(size.answers), "--json"]]


def other(a: argparse.Namespace, size: Size) -> list[Command]:
    """Export, speed and quality of a larger model. 20 minutes for 0.5 billion, and 7 per text."""
    build: Command = ["python", "benchmarks/build_peers.py", a.other, OTHER_PEERS]
    gguf = a.other.suffix == ".gguf"
    more = ["q4_0", "openvino-int4"] if gguf else []
    commands = [COUNT, _reference(a.other, OTHER_FULL), [*build, "--precisions", "int4", *more]]
    if a.text:
        commands.append(["sh", "-c", f"grep -E '.{{400}}' \"$0\" | head -n 3 > {LINES}", a.text[0]])
    options: Command = ["--requantize"] if gguf else []
    out, fused, trained = BUILD / "other", BUILD / "fused", a.effort != "none"
    graphs = {fused / "int4": ["--policy", "int4"], **({fused / "dash": []} if trained else {})}
    peers = [f"genai:{peer}" for peer in (OTHER_PEERS / "int4", *graphs)]
    if gguf:
        peers += [f"llama.cpp:{file}" for file in (a.other, OTHER_PEERS / "q4_0.gguf")]
        peers += [f"openvino{end}:{OTHER_PEERS / 'openvino-int4'}" for end in ("", "-f32")]
    bench: Command = ["dash-bench", out, "--reference", OTHER_FULL, *_amount(size), *_peers(peers)]
    fuse: list[Command] = [["dash-fuse", out, g, *how, "--overwrite"] for g, how in graphs.items()]
    commands += [
        ["dash-export", a.other, out, *options, "--effort", a.effort, "--overwrite", "--json"],
        *fuse,
        [*PROMPT_FORMS, out, "--prompts", a.prompts, "--json"],
        [*bench, "--json"],
    ]
    if a.text:
        commands.append([*bench, "--prompts", LINES, "--skip", "contexts", "--json"])
    losses = ("--losses", "0.05", "0.1", "0.2", "0.4")
    if trained:
        commands += [_policies(out, text, size, *losses, reference=OTHER_FULL) for text in a.text]
    return commands


def forms(a: argparse.Namespace, size: Size) -> list[Command]:
    """Loss of the larger model's prompts by their form, after `other`. 4 minutes per text."""
    texts = [word for text in a.text for word in ("--text", text)]
    return [[*PROMPT_FORMS, BUILD / "other", *texts, "--windows", str(size.windows), "--json"]]


def drafts(a: argparse.Namespace, size: Size) -> list[Command]:
    """Drafting with the larger model, after `other`. 40 minutes."""
    kinds = ["--tasks", str(size.per_kind), "--target", "int4", "--target", "int8"]
    return [PROFILE, [*_speculate(a, size.many_per_kind), *kinds, *_short(size), "--json"]]


def draft_peers(a: argparse.Namespace, size: Size) -> list[Command]:
    """The same compared to that of peers, with fewer prompts. 40 minutes."""
    command = _speculate(a, size.per_kind)
    command += ["--target", "int4", "--target", "int8", "--genai", OTHER_PEERS / "int4"]
    command += ["--llama-cpp", OTHER_PEERS / "q4_0.gguf"] if a.other.suffix == ".gguf" else []
    return [PROFILE, [*command, *_short(size), "--json"]]


def _short(size: Size) -> Command:
    return ["--max-tokens", str(size.new_tokens)] if size == QUICK else []


def drawn(a: argparse.Namespace, size: Size) -> list[Command]:
    """The same with sampled tokens, and with four answers at once. 20 minutes."""
    few, short = min(size.per_kind, 2), ["--max-tokens", str(size.new_tokens), "--json"]
    return [
        PROFILE,
        [*_speculate(a, few), "--temperature", "1", *short],
        [*_speculate(a, size.per_kind), "--parallel", "4", *short],
    ]


def _speculate(a: argparse.Namespace, per_kind: int) -> Command:
    command: Command = ["python", "benchmarks/speculate.py", BUILD / "other"]
    return [*command, "--prompts", a.prompts, "--per-kind", str(per_kind)]


def server(a: argparse.Namespace, size: Size) -> list[Command]:
    """A server with the larger model, and a `llama-server` on PATH, after `other`. 15 minutes."""
    bench: Command = ["python", "benchmarks/serve.py", BUILD / "other", "--batch"]
    if a.other.suffix == ".gguf" and shutil.which("llama-server"):
        bench += ["--peer", OTHER_PEERS / "q4_0.gguf"]
    quick = ["--clients", "1,2", "--rounds", "1", "--long", "100", "--max-tokens", "8"]
    some = quick if size == QUICK else ["--clients", "1,4,8,16,32"]
    return [PROFILE, [*bench, "--policy", "int4", "--without-drafts", *some, "--json"]]


def scale(_: argparse.Namespace, size: Size) -> list[Command]:
    """Exports and passes of 1 to 8 billion random parameters. 65 minutes and 10 GB of disk."""
    shapes = ["1b"] if size == QUICK else ["1b", "3b", "8b"]
    return [["python", "benchmarks/scale.py", BUILD / "scale", "--shapes", *shapes, "--json"]]


def shapes(_: argparse.Namespace, size: Size) -> list[Command]:
    """Random models in other families' shapes, and peers. 40 minutes and 10 GB of disk."""
    commands = [COUNT]
    for shape, layers in {"lfm2-1.2b": 16, "qwen3.5-0.8b": 24, "lfm2-8b-a1b": 6}.items():
        # GenAI 0.18 builds Qwen 3.5 from its multimodal checkpoints only.
        precisions = [] if shape.startswith("qwen3.5") else ["int4"]
        folder = BUILD / "shapes" / shape
        model, out, gguf = folder / "model", folder / "out", folder / "q4_0.gguf"
        big: Command = ["python", "benchmarks/big.py", model, "--shape", shape]
        export: Command = ["dash-export", model, out, "--effort", "none", "--check", "none"]
        export += ["--calibration", NUMBERS, "--overwrite", "--json"]
        bench: Command = ["dash-bench", out, "--policy", "int4", "--skip", "quality"]
        build: Command = ["python", "benchmarks/build_peers.py", model, folder, "--precisions"]
        peers = [*(f"genai:{folder / one}" for one in precisions), f"llama.cpp:{gguf}"]
        commands += [
            [*big, "--layers", str(4 if size == QUICK else layers), "--gguf", gguf],
            *([*build, one] for one in precisions),
            export,
            [*bench, *_peers(peers), *_amount(size), "--json"],
            ["rm", "-r", folder],
        ]
    return commands


def _peers(peers: list[str]) -> list[str]:
    return [word for peer in peers for word in ("--peer", peer)]


def _amount(size: Size) -> list[str]:
    words = ("--processes", size.processes, "--rounds", size.rounds, "--limit", size.prompts)
    return [str(word) for word in (*words, "--max-tokens", size.new_tokens)]


def _policies(
    bundle: Path, text: Path, size: Size, *words: str, reference: Path = REFERENCE
) -> Command:
    command: Command = ["python", "benchmarks/policies.py", bundle, "--text", text, *words]
    command += ["--reference", reference]
    return [*command, "--limit", str(size.windows), "--json"]


Part = Callable[[argparse.Namespace, Size], list[Command]]
PARTS: dict[str, tuple[Part, str]] = {
    "bundle": (bundle, "bundle model"),
    "speed": (speed, "bundle"),
    "memory": (memory, "bundle"),
    "context": (context, "bundle"),
    "quality": (quality, "bundle text"),
    "skips": (skips, "model text"),
    "tasks": (tasks, "bundle task"),
    "answers": (answers, "bundle prompts"),
    "other": (other, "other prompts"),
    "other_memory": (other_memory, "other"),
    "other_tasks": (other_tasks, "other task"),
    "other_free": (other_free, "other prompts"),
    "forms": (forms, "other text"),
    "drafts": (drafts, "other prompts"),
    "draft_peers": (draft_peers, "other prompts"),
    "drawn": (drawn, "other prompts"),
    "server": (server, "other"),
    "scale": (scale, ""),
    "shapes": (shapes, ""),
}
"""The commands of each part, and the options that they need."""


def main() -> None:
    """Measures the requested parts."""
    told = "\n".join(f"  {name:12} {part.__doc__}" for name, (part, _) in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"parts, with their time on 2 cores:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="(default: all that can be)")
    parser.add_argument("--bundle", type=_path, metavar="BUNDLE", help="with a trained policy")
    parser.add_argument("--model", type=_path, help="what BUNDLE was exported from")
    parser.add_argument("--peer", action="append", default=[], metavar="KIND:PATH")
    files: dict[str, Any] = {"type": _path, "action": "append", "default": []}
    parser.add_argument("--text", **files, help="held out of training")
    parser.add_argument("--task", **files, help="as of dash-eval --task")
    parser.add_argument("--prompts", type=_path, help="as of dash-bench")
    parser.add_argument("--other", type=_path, help="a larger model than that of BUNDLE")
    parser.add_argument("--effort", default="normal", help="of exports (default: normal)")
    parser.add_argument("--quick", action="store_true", help="as little as runs: for a first try")
    parser.add_argument("--out", type=_path, help="(default: benchmarks/results, or build/quick)")
    arguments = parser.parse_args()
    arguments.out = arguments.out or ROOT / (QUICK_OUT if arguments.quick else OUT)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for name in arguments.parts or [name for name, (_, needs) in PARTS.items() if needs]:
        part, needs = PARTS[name]
        if lacking := [option for option in needs.split() if not getattr(arguments, option)]:
            if name in arguments.parts:
                parser.error(f"{name} needs --{lacking[0]}")
            print(f"{name}: left out, it needs --{lacking[0]}", file=sys.stderr)
            continue
        inputs = [*arguments.text, *arguments.task, *filter(None, [arguments.prompts])]
        inputs += [arguments.other] if "other" in needs and arguments.other.is_file() else []
        found = circumstances(ROOT, inputs, arguments.bundle if "bundle" in needs else None)
        commands = part(arguments, QUICK if arguments.quick else Size())
        found["commands"] = [_run(words) for words in commands]
        (arguments.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _path(text: str) -> Path:
    return Path(os.path.abspath(text))


def _run(command: Command) -> dict[str, Any]:
    """Runs a command in the root of the repository, as results.md will show it."""
    shown = shlex.join(_shown(word) for word in command)
    print(f"$ {shown}", file=sys.stderr)
    (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    keeps = command[-1] == "--json"
    started = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "PATH": scripts},
        stdout=subprocess.PIPE if keeps else sys.stderr,
        text=True,
    )
    if done.returncode:
        sys.exit(f"measure.py: error: {shown} ended with {done.returncode}")
    seconds = round(time.perf_counter() - started, 1)
    found = json.loads(done.stdout) if keeps else None
    return {"command": shown, "seconds": seconds, "found": found}


def _shown(word: str | Path) -> str:
    """A file outside the repository by its name: its folder means nothing to others."""
    if isinstance(word, str):  # a peer has its kind before the path
        kind, colon, path = word.partition(":/")
        return f"{kind}:{_shown(Path('/', path))}" if colon else word
    if not word.is_absolute():
        return str(word)
    return str(word.relative_to(ROOT) if word.is_relative_to(ROOT) else word.name)


if __name__ == "__main__":
    main()
