"""Decode speed and time to first token, side by side with ONNX Runtime GenAI.

Every contender lives in its own process and they take turns, round by round, so that a
machine whose speed drifts drifts for all of them; ratios are taken within a round.

    python benchmarks/decode.py out/ --genai int4=peers/int4 int8=peers/int8 full=peers/fp32

`benchmarks/peers.py` builds the GenAI models from the same weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_TEXT = (
    "The lighthouse keeper counted the ships that passed each night and wrote their names in a "
    "book that nobody else had ever read. When the fog came in he rang the bell by hand. "
)


def prompt_ids(tokenizer_file: Path, count: int) -> list[int]:
    """The same `count` token ids for every contender."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tokenizer_file)).encode(_TEXT).ids
    return (ids * (count // len(ids) + 1))[:count]


# --- contenders: each returns a function (ids, new tokens) -> milliseconds of every token ---


def dash_contender(bundle: str, policy: str, threads: int) -> Callable[[list[int], int], list]:
    """Our runtime under a fixed policy."""
    import dash_onnx

    model = dash_onnx.load(bundle, threads=threads)

    def run(ids: list[int], new: int) -> list[float]:
        steps = model.generate_step(ids, policy=policy, max_new_tokens=new, ignore_eos=True)
        return [step.ms for step in steps]

    return run


def genai_contender(folder: str, threads: int) -> Callable[[list[int], int], list]:
    """ORT GenAI, greedy, EOS masked by `min_length`."""
    import onnxruntime_genai as og

    config = og.Config(folder)
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = og.Model(config)

    def run(ids: list[int], new: int) -> list[float]:
        params = og.GeneratorParams(model)
        total = len(ids) + new
        params.set_search_options(do_sample=False, min_length=total, max_length=total)
        generator = og.Generator(model, params)
        times = []
        for index in range(new):
            started = time.perf_counter()
            if index == 0:
                generator.append_tokens(np.array(ids, np.int32))
            generator.generate_next_token()
            times.append((time.perf_counter() - started) * 1e3)
        return times

    return run


def work(kind: str, target: str, policy: str, threads: int) -> None:
    """A contender's process: JSON requests on stdin, JSON answers on stdout."""
    genai = kind == "genai"
    run = genai_contender(target, threads) if genai else dash_contender(target, policy, threads)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(request["ids"], request["new"])), flush=True)


class Contender:
    """A process that decodes on request."""

    def __init__(self, kind: str, target: str, policy: str, threads: int):
        """Starts it; it loads while others work."""
        arguments = [__file__, "--work", kind, target, policy, str(threads)]
        self.name = f"{'dash-onnx' if kind == 'dash' else 'ORT GenAI'} {policy}"
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, ids: list[int], new: int) -> list[float]:
        """Milliseconds of every new token."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"ids": ids, "new": new}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} stopped; its message is above")
        times: list[float] = json.loads(answer)
        return times

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(contenders: list[Contender], arguments: Any) -> dict[str, dict[str, list[float]]]:
    """Alternating rounds: milliseconds per decoded token and to the first token."""
    tokenizer = Path(arguments.bundle) / "tokenizer.json"
    short = prompt_ids(tokenizer, 32)
    long = prompt_ids(tokenizer, arguments.prompt_tokens)
    results: dict[str, dict[str, list[float]]] = {
        c.name: {"decode_ms": [], "ttft_ms": []} for c in contenders
    }
    for round_ in range(arguments.rounds + 1):
        for contender in contenders:
            decode = statistics.median(contender(short, arguments.new_tokens)[1:])
            first = min(contender(long, 1)[0] for _ in range(2))
            if round_:  # the first round warms up
                results[contender.name]["decode_ms"].append(decode)
                results[contender.name]["ttft_ms"].append(first)
    return results


def table(results: dict[str, dict[str, list[float]]], pairs: list[tuple[str, str]]) -> str:
    """Medians with spread, and ratios within a round (above 1: dash-onnx is faster)."""
    lines = [f"{'':22}{'tok/s':>8}{'(min-max)':>17}{'ms/token':>10}{'first token ms':>16}"]
    for name, figures in results.items():
        decode, first = figures["decode_ms"], figures["ttft_ms"]
        spread = f"({1e3 / max(decode):.0f}-{1e3 / min(decode):.0f})"
        middle = statistics.median(decode)
        lines.append(
            f"{name:22}{1e3 / middle:8.1f}{spread:>17}{middle:10.2f}"
            f"{statistics.median(first):16.0f}"
        )
    for ours, peer in pairs:
        speed = [
            p / o
            for p, o in zip(results[peer]["decode_ms"], results[ours]["decode_ms"], strict=True)
        ]
        first = [
            o / p for p, o in zip(results[peer]["ttft_ms"], results[ours]["ttft_ms"], strict=True)
        ]
        lines.append(
            f"{ours} / {peer}: decode {statistics.median(speed):.2f}x "
            f"({min(speed):.2f}-{max(speed):.2f}), "
            f"first token {statistics.median(first):.2f} of its time"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark."""
    if sys.argv[1:2] == ["--work"]:
        kind, target, policy, threads = sys.argv[2:]
        work(kind, target, policy, int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="what dash-export wrote")
    parser.add_argument(
        "--genai", nargs="*", default=[], metavar="POLICY=DIR", help="ORT GenAI models to pair with"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    contenders, pairs = [], []
    for item in arguments.genai or ["int4=", "int8=", "full="]:
        policy, _, folder = item.partition("=")
        contenders.append(Contender("dash", arguments.bundle, policy, arguments.threads))
        if folder:
            contenders.append(Contender("genai", folder, policy, arguments.threads))
            pairs.append((contenders[-2].name, contenders[-1].name))
    results = measure(contenders, arguments)
    for contender in contenders:
        contender.close()
    print(json.dumps(results) if arguments.json else table(results, pairs))


if __name__ == "__main__":
    main()
