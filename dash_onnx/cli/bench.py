"""dash-bench: speed, memory and quality of a bundle compared to its peers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_onnx.cli.common import (
    Parser,
    add_bundle_argument,
    add_json_option,
    add_log_options,
    add_memory_option,
    add_reference_option,
    add_threads_option,
    aligned,
    at_least,
    load_reference,
    log_level,
    positive,
    run,
)
from dash_onnx.core.atomic import check_file
from dash_onnx.core.errors import DashError, PolicyError, SourceError
from dash_onnx.core.progress import Loop

if TYPE_CHECKING:
    from dash_onnx.bench.measure import Reference, Result
    from dash_onnx.bench.worker import Worker
    from dash_onnx.runtime.model import Model

_PREFILL, *_DEPTHS = _CONTEXTS = (512, 1000, 3500)
_PREFILLS = 2  # runs of the first one in each process: it is short, and its first run allocates

_EXAMPLES = """\
  dash-bench out/
  dash-bench out/ --policy int4 --policy dash@fast --peer genai:peers/int4 --picture speed.png
  dash-bench out/ --peer llama.cpp:model.gguf --peer transformers:model/ --prompts p.jsonl --json"""


def _parser() -> Parser:
    parser = Parser(
        "dash-bench",
        "Decode the same prompts with policies of a bundle and with other runtimes, in "
        "alternating rounds, each in its own process. Quality is the KL against the bundle's "
        "highest precision, on the answers of that precision.",
        _EXAMPLES,
    )
    add_bundle_argument(parser)
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="POLICY[@BUDGET][+drafts]",
        help="a policy of the bundle, such as dash@fast, or a preset, such as @fast; int8+drafts "
        "uses speculative decoding, as dash-run --policy int8 does; can be repeated (default: "
        "each precision for all layers, and the presets)",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="KIND:PATH",
        help="another runtime whose client is installed, and its model: `pip install "
        "./benchmarks[all]` installs genai, llama.cpp, openvino and transformers; can be repeated",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt per line, or .jsonl with `prompt` or `turns` (default: six built-in "
        "prompts)",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="use the first N prompts (default: all)",
    )
    parser.add_argument(
        "--max-tokens",
        type=at_least(2, ": the first token includes the prompt"),
        default=96,
        metavar="N",
        help="tokens to generate for each prompt (default: 96)",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=5,
        metavar="N",
        help="alternating rounds over all contenders (default: 5)",
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=1,
        metavar="N",
        help="restart every contender N times, each time for all rounds; memory layout alone can "
        "make a process up to 8 %% faster (default: 1)",
    )
    add_threads_option(parser)
    add_memory_option(parser)
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="replay each layer as a CUDA graph (only for a CUDA bundle)",
    )
    add_reference_option(parser)
    parser.add_argument(
        "--skip",
        action="append",
        choices=("quality", "contexts"),
        default=[],
        help="leave out the KL, or the prefill of 512 tokens and decoding after 1,000 and 3,500 "
        "tokens; can be repeated",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="plot speed against quality as .png or .svg; can be repeated",
    )
    add_json_option(parser)
    add_log_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    for peer in arguments.peer:
        if not all(peer.partition(":")):
            parser.error(f"--peer {peer}: expected KIND:PATH, such as genai:model/")
    for picture in arguments.picture:
        if picture.suffix not in (".png", ".svg"):
            parser.error(f"--picture {picture}: the name must end in .png or .svg")
    parser.refuse(
        arguments,
        (
            "quality" in arguments.skip,
            "--picture --reference",
            "needs the KL: leave --skip quality out",
        ),
    )
    return run("dash-bench", lambda: _bench(arguments), log_level(arguments))


def _bench(arguments: argparse.Namespace) -> None:
    import dash_onnx
    from dash_onnx.bench.contenders import drafts, policy_of
    from dash_onnx.bench.measure import divergence, dominated, measure
    from dash_onnx.bench.memory import read_gigabytes_per_s
    from dash_onnx.bench.picture import draw, figure_class
    from dash_onnx.bench.prompts import PROMPTS, context, read_prompts
    from dash_onnx.runtime.machine import machine_name
    from dash_onnx.runtime.ort import thread_count

    # Report every possible mistake before the rounds.
    texts = list(PROMPTS) if arguments.prompts is None else read_prompts(arguments.prompts)
    _check_peers(arguments.peer)
    if arguments.picture:
        figure_class()
    for picture in arguments.picture:
        check_file(picture)
    graphs = arguments.cuda_graphs
    model = dash_onnx.load(arguments.bundle, threads=arguments.threads, cuda_graphs=graphs)
    variants = arguments.policy or _default_runs(model)
    policies = [policy_of(model, variant) for variant in variants]
    for variant, policy in zip(variants, policies, strict=True):
        if drafts(variant) and policy.uniform is None:
            raise PolicyError(f"{variant}: draft tokens are verified on one path, such as int8")
    prompts = [model.text.encode_message(text).tolist() for text in texts[: arguments.limit]]
    longest, limit = max(map(len, prompts)), model.manifest.model.max_length
    if longest + arguments.max_tokens > limit:
        raise DashError(
            f"a prompt of {longest} tokens and an answer of {arguments.max_tokens} exceed the "
            f"context of this bundle, {limit}: lower --max-tokens"
        )
    quality, reference = None, load_reference(arguments.reference, model, arguments.threads)
    if "quality" not in arguments.skip:
        quality = partial(divergence, texts=_reference(reference, prompts, arguments.max_tokens))
    room = model.manifest.model.max_length - arguments.max_tokens
    wanted = () if "contexts" in arguments.skip else _CONTEXTS
    lengths = [length for length in wanted if length <= room]
    contexts = [context(prompts, length) for length in lengths]
    threads = thread_count()
    ceiling = read_gigabytes_per_s(threads)
    results = measure(
        _starts(arguments, variants, threads),
        prompts,
        new_tokens=arguments.max_tokens,
        rounds=arguments.rounds,
        processes=arguments.processes,
        contexts=[*contexts[:1] * (_PREFILLS - 1), *contexts],
        quality=quality,
    )
    dense = model.manifest.block.experts is None
    for index, (variant, policy) in enumerate(zip(variants, policies, strict=True)):  # ours first
        # A token reads what it and its experts choose; the tokens of a draft read together.
        if policy.uniform is not None and dense and not drafts(variant):
            read = model.manifest.weight_bytes(policy.uniform, policy.head)
            results[index] = dataclasses.replace(results[index], weight_bytes=read)
    machine = f"{machine_name()}, {threads} threads"
    if arguments.json:
        told = {
            "machine": machine,
            "read_gb_per_s": ceiling,
            "contenders": [_row(result) for result in results],
            "dominated": [
                {"preset": preset.name, "by": other.name} for preset, other in dominated(results)
            ],
        }
        print(json.dumps(told))
    else:
        print(_table(results))
        print(
            f"\n{machine}; {len(prompts)} prompts, {arguments.max_tokens} new tokens, "
            f"{arguments.processes} x {arguments.rounds} rounds; memory reads {ceiling:.1f} GB/s"
        )
        if contexts:
            print(
                "pp512: tokens/s of a 512-token prompt; after N: tokens/s after N tokens; with N: "
                "peak RSS with them"
            )
        for preset, other in dominated(results):
            print(f"{preset.name} is dominated: {other.name} is faster, and its KL lower")
        if any("+" in variant for variant in variants):
            print("with drafts: mean over the tokens of an answer, not the median")
    for picture in arguments.picture:  # last, so that a failure here loses no figures
        best = reference.manifest.variants[0]
        beside = "the full-precision model" if best == "full" else f"all layers in {best.upper()}"
        draw(results, picture, machine, reference=beside)


def _check_peers(wanted: list[str]) -> None:
    from dash_onnx.bench.contenders import peers

    installed = peers()
    for peer in wanted:
        kind, _, path = peer.partition(":")
        if kind not in installed:
            raise SourceError(
                f"--peer {peer}: no client for {kind} is installed "
                f"(installed: {', '.join(installed) or 'none'}); in a clone of dash-onnx, run "
                "`pip install './benchmarks[all]'`"
            )
        if not Path(path).exists():
            raise SourceError(f"--peer {peer}: {path} does not exist")


def _starts(
    arguments: argparse.Namespace, variants: list[str], threads: int
) -> list[Callable[[], Worker]]:
    from dash_onnx.bench.worker import Worker

    bundle, memory, graphs = str(arguments.bundle), arguments.memory, arguments.cuda_graphs
    ours = "dash" if memory == "high" else "dash-low"
    starts: list[Callable[[], Worker]] = [
        partial(Worker, f"{ours} {v}", "dash", bundle, threads, v, memory, graphs) for v in variants
    ]
    for peer in arguments.peer:
        kind, _, path = peer.partition(":")
        name = f"{kind} {'/'.join(Path(path).parts[-2:])}"
        starts.append(partial(Worker, name, kind, path, threads))
    return starts


def _default_runs(model: Model) -> list[str]:
    from dash_onnx.core.plans import preset_plans

    return [*model.manifest.variants, *(f"@{name}" for name in preset_plans(model.manifest))]


def _reference(model: Model, prompts: list[list[int]], new_tokens: int) -> list[Reference]:
    """The answer of the highest precision, and its logits."""
    from dash_onnx.bench.measure import Reference
    from dash_onnx.runtime.options import GREEDY

    best = model.manifest.variants[0]
    found = []
    for prompt in Loop("reference", prompts):
        steps = model.generate_step(
            prompt, options=GREEDY, policy=best, max_new_tokens=new_tokens, ignore_eos=True
        )
        ids = [*prompt, *(step.token for step in steps)]
        logits = model.logits(ids, policy=best)[len(prompt) :]
        found.append(Reference(ids, len(prompt), logits))
    return found


def _row(result: Result) -> dict[str, Any]:
    """One contender in the JSON output."""
    rates = {"tokens_per_s": result.tokens_per_s, "gb_per_s": result.gigabytes_per_s}
    contexts = {
        length: {
            **dataclasses.asdict(one),
            "prefill_tokens_per_s": one.prefill_tokens_per_s,
            "tokens_per_s": one.tokens_per_s,
        }
        for length, one in result.contexts.items()
    }
    return {**dataclasses.asdict(result), **rates, "contexts": contexts}


def _table(results: list[Result]) -> str:
    from dash_onnx.bench.measure import ratio

    head = ["", "tokens/s", "(rounds)", "of the first", "first token", f"pp{_PREFILL}"]
    head += [*(f"after {depth:,}" for depth in _DEPTHS), "KL", "load", "peak RSS"]
    head += [*(f"with {depth:,}" for depth in _DEPTHS), "GB/s"]
    rows = [head]
    for result in results:
        speeds = [1e3 / ms for ms in result.decode_ms]
        middle, low, high = ratio(result, results[0])
        first = statistics.median(result.ttft_ms)
        rate = result.gigabytes_per_s
        prefill, *depths = (result.contexts.get(length) for length in _CONTEXTS)
        kl = "-" if result.kl is None else f"{result.kl:.4f}"
        kl += f" +- {result.kl_stderr:.4f}" if result.kl_stderr else ""
        rows.append(
            [
                result.name,
                f"{result.tokens_per_s:.1f}",
                f"{min(speeds):.0f}-{max(speeds):.0f}",
                f"{middle:.2f} ({low:.2f}-{high:.2f})",
                f"{first:.0f} ms",
                f"{prefill.prefill_tokens_per_s:.0f}" if prefill else "-",
                *(f"{depth.tokens_per_s:.1f}" if depth else "-" for depth in depths),
                kl,
                f"{result.load_s:.1f} s",
                f"{result.peak_rss_bytes / 1e6:.0f} MB",
                *(f"{depth.peak_rss_bytes / 1e6:.0f} MB" if depth else "-" for depth in depths),
                "-" if rate is None else f"{rate:.1f}",
            ]
        )
    return "\n".join(aligned(rows, left=(0,)))
