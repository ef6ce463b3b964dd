"""ORT GenAI runs the fused graph as it is: the tokens and the paths are those of our runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import missing, needed
from families import CASES, Pair
from scored_bundle import with_scorer
from tokenizers import Tokenizer, decoders, models, normalizers

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.policy import ScoredPolicy
from dash_onnx.exporters.fused import FACTS, PATH, FuseOptions, adapter, fuse
from dash_onnx.exporters.fused.genai import adapt_tokenizer
from dash_onnx.exporters.sources.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer
from dash_onnx.runtime.deciders import FixedPath, ScoredDecider, decider_of

ROOT = Path(__file__).parent.parent
QUESTIONS = (
    "What is the capital of France?",
    "Name three animals of the sea.",
    "Why is the sky blue?",
    "Write one sentence about a lighthouse.",
)
TOKENS = 32

pytestmark = pytest.mark.slow  # quick on the tiny model, but GenAI is installed for the slow tests


def theirs(folder: Path, ids: list[int], preset: str | None = None) -> tuple[list[int], list[Any]]:
    """The tokens that GenAI adds to a prompt, and the path of each run."""
    og = needed("onnxruntime_genai")
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(ids) + TOKENS)
    generator = og.Generator(model, params)
    adapters = og.Adapters(model)
    if preset is not None:
        adapters.load(str(folder / adapter(preset)), preset)
        generator.set_active_adapter(adapters, preset)
    generator.append_tokens(np.array(ids, np.int32))
    decided = []
    while not generator.is_done():
        generator.generate_next_token()
        try:
            decided.append(tuple(generator.get_output(PATH).tolist()))
        except Exception:  # a graph with one path has none to show
            decided.append(())
    return [int(token) for token in generator.get_sequence(0)[len(ids) :]], decided


def ours(
    model: dash_onnx.Model, policy: Any, prefill: Any, prompt: list[int], tokens: list[int]
) -> tuple[list[int], list[Any]]:
    """Before each of these tokens what we would have chosen, and the path of each run."""
    sequence, found = model.new_sequence(), []
    if isinstance(policy, ScoredPolicy):  # without a controller, as the graph
        decider: Any = ScoredDecider(sequence, policy.head, policy.multiplier)
    else:
        decider = FixedPath(policy.uniform, policy.head)
    paths = [(prefill,) * model.manifest.model.num_layers]
    logits = sequence.prefill(np.array(prompt), paths[0], policy.head)
    for token in tokens:
        found.append(int(logits.argmax()))
        logits, path = sequence.forward(token, decider)
        paths.append(path)
    return found, paths[:-1]


@pytest.fixture(
    scope="module",
    params=[("full", "int8", "int4"), ("int8", "int4", "int2")],
    ids=["full", "int2"],
)
def tiny(
    request: pytest.FixtureRequest,
    tiny_with: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    exported = tiny_with(variants=request.param)
    folder = Path(shutil.copytree(exported, tmp_path_factory.mktemp("genai") / "out"))
    bundle = Bundle(with_scorer(folder))
    fuse(bundle, folder / "fused", FuseOptions(), overwrite=False)
    return bundle


@pytest.mark.parametrize("preset", [None, "quality", "balanced", "fast"])
def test_tokens_and_paths_are_those_of_our_runtime(tiny: Bundle, preset: str | None) -> None:
    prompt, fused = list(range(40, 53)), tiny.folder / "fused"
    tokens, decided = theirs(fused, prompt, preset)
    assert len(tokens) == TOKENS
    model = dash_onnx.load(tiny.folder, threads=1)
    wanted, paths = ours(model, model.policy("dash", preset), "int8", prompt, tokens)
    assert tokens == wanted
    actions = json.loads((fused / FACTS).read_text())["actions"]
    assert [tuple(actions[index] for index in run) for run in decided] == paths
    if preset == "fast":  # the cheapest precision is among the decisions
        assert any(tiny.manifest.variants[-1] in path for path in paths[1:])


def test_int2_layers_give_the_tokens_of_our_runtime(
    tiny_with: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = Bundle(tiny_with(variants=("int8", "int4", "int2")))
    fuse(bundle, tmp_path / "fused", FuseOptions("genai", "int2"), overwrite=False)
    prompt = list(range(40, 53))
    tokens, _ = theirs(tmp_path / "fused", prompt)
    model = dash_onnx.load(bundle.folder, threads=1)
    assert tokens == ours(model, model.policy("int2"), "int2", prompt, tokens)[0]
    other = ours(model, model.policy("int8"), "int8", prompt, tokens)[0]
    assert tokens != other  # the comparison means something


@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe", "qwen3_5", "qwen3_next"])
def test_layers_that_keep_states_give_the_tokens_of_our_runtime(
    family: str, tmp_path: Path
) -> None:
    bundle = Bundle(with_scorer(Pair.build(CASES[family], tmp_path).bundle))
    prompt, model = list(range(40, 53)), dash_onnx.load(bundle.folder, threads=1)
    for policy in ("int8", "static:int8,skip,skip", "dash"):
        fuse(bundle, tmp_path / "fused", FuseOptions("genai", policy), overwrite=True)
        tokens, _ = theirs(tmp_path / "fused", prompt)
        chosen = model.policy(policy)
        sequence = model.new_sequence()
        path = chosen.uniform or ("int8",) * model.manifest.model.num_layers
        decider = decider_of(chosen, sequence)
        if isinstance(chosen, ScoredPolicy):  # without a controller, as the graph
            decider = ScoredDecider(sequence, chosen.head, chosen.multiplier)
        logits, wanted = sequence.prefill(np.array(prompt), path, chosen.head), []
        for token in tokens:
            wanted.append(int(logits.argmax()))
            logits, _ = sequence.forward(token, decider)
        assert tokens == wanted


@pytest.fixture(scope="module", params=["int8", "int4", "dash"])
def demo(
    request: pytest.FixtureRequest, trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A policy of the demo model, and its graph."""
    folder = tmp_path_factory.mktemp("fused") / request.param
    fuse(Bundle(trained_bundle), folder, FuseOptions("genai", request.param), overwrite=False)
    return request.param, folder


@pytest.mark.demo
def test_the_demo_model_answers_as_in_our_runtime(
    demo: tuple[str, Path], trained_bundle: Path
) -> None:
    name, folder = demo
    model = dash_onnx.load(trained_bundle, threads=1)
    policy, prefill = model.policy(name), "int8" if name == "dash" else name
    equal = total = 0
    for question in QUESTIONS:
        ids = model.text.encode_chat([{"role": "user", "content": question}]).tolist()
        tokens, _ = theirs(folder, ids)
        wanted, _ = ours(model, policy, prefill, ids, tokens)
        equal += sum(a == b for a, b in zip(tokens, wanted, strict=True))
        total += len(tokens)
    # Sums in another order may turn a near-tie.
    assert equal >= 0.98 * total, (equal, total)


@pytest.mark.demo
def test_genai_splits_texts_as_every_kind_of_gguf_file_wants(
    trained_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The words of `pre_tokenizer` are regular expressions, of which GenAI's library reads some."""
    og = needed("onnxruntime_genai")
    folder = tmp_path / "fused"
    fuse(Bundle(tiny_bundle), folder, FuseOptions(policy="int8"), overwrite=False)
    text = "I'll test 12345 words: naïve café foo_bar(3.14);\n\n  你好世界 DON'T Stop\r\n\t end"
    for name in {pre: name for name, pre in PRE_TOKENIZERS.items()}.values():
        tokenizer = Tokenizer.from_file(str(trained_bundle / "tokenizer.json"))
        tokenizer.pre_tokenizer = pre_tokenizer(PRE_TOKENIZERS[name])
        tokenizer.save(str(folder / "tokenizer.json"))
        found = og.Tokenizer(og.Model(str(folder))).encode(text).tolist()
        assert found == tokenizer.encode(text, add_special_tokens=False).ids, name


def test_genai_reads_and_shows_several_spaces_of_a_sentencepiece_tokenizer(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    og = needed("onnxruntime_genai")
    folder = tmp_path / "fused"
    fuse(Bundle(tiny_bundle), folder, FuseOptions(policy="int8"), overwrite=False)
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "a"), ("▁", "b")]
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "a", "b", *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["▁▁", "▁▁▁▁"])
    tokenizer.save(str(folder / "tokenizer.json"))
    adapt_tokenizer(folder)
    theirs = og.Tokenizer(og.Model(str(folder)))
    for text in ("a b", "a  b", "a   b", "  a    b  ", "     a"):
        ids = tokenizer.encode(text).ids
        assert theirs.encode(text).tolist() == ids, text
        assert theirs.decode(np.array(ids, np.int32)) == text


@pytest.mark.demo
def test_the_example_answers(demo: tuple[str, Path]) -> None:
    needed("onnxruntime_genai")
    command = [sys.executable, str(ROOT / "examples/genai.py"), str(demo[1]), QUESTIONS[0]]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "Paris" in result.stdout


@pytest.mark.demo
def test_the_example_in_cpp_answers_and_stops(demo: tuple[str, Path], tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        missing("needs g++")
    genai = Path(needed("onnxruntime_genai").__file__).parent / "libonnxruntime-genai.so"
    runtime = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1.*"))
    (tmp_path / genai.name).symlink_to(genai)
    (tmp_path / "libonnxruntime.so").symlink_to(runtime)
    command = [
        "g++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        str(ROOT / "examples/cpp/chat.cpp"),
    ]
    command += ["-o", "chat", f"./{genai.name}", "-Wl,-rpath,."]
    subprocess.run(command, cwd=tmp_path, check=True)

    def answered(*arguments: str) -> str:
        return subprocess.run(
            ["./chat", str(demo[1]), *arguments],
            cwd=tmp_path,
            env={**os.environ, "LD_LIBRARY_PATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    whole = answered(QUESTIONS[0])
    assert "Paris" in whole
    assert answered(QUESTIONS[0], "", "Paris").rstrip("\n") == whole[: whole.index("Paris")]
    if demo[0] == "dash":
        assert answered(QUESTIONS[0], "fast").strip()


@pytest.mark.demo
def test_genai_drafts_tokens_for_a_fused_graph(trained_bundle: Path, tmp_path: Path) -> None:
    og = needed("onnxruntime_genai")
    fuse(Bundle(trained_bundle), tmp_path / "out", FuseOptions("genai", "int8"), overwrite=False)
    model = og.Model(str(tmp_path / "out"))
    ids = og.Tokenizer(model).encode("Monday, Tuesday, Wednesday, Thursday, Friday, " * 2)

    def answered(**options: int) -> tuple[list[int], int]:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + TOKENS)
        params.set_speculative_options(max_draft_tokens=4, **options)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(ids, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        accepted = generator.get_speculative_stats()["draft_tokens_accepted"] if options else 0
        return [int(token) for token in generator.get_sequence(0)], accepted

    plain, _ = answered()
    drafted, accepted = answered(ngram_size=3)
    assert drafted == plain  # a text without near-ties
    assert accepted > TOKENS // 2
