"""Tiny random models and bundles, made offline; the demo model if it has been fetched."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import numpy as np
import pytest
import torch
from scored_bundle import with_scorer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import dash_onnx
from dash_onnx.core.actions import Action, ActionPath
from dash_onnx.core.block import Block
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.facts import Costs, ModelFacts
from dash_onnx.core.progress import Phase
from dash_onnx.exporters import expected
from dash_onnx.exporters.architectures.base import ModelSpec
from dash_onnx.exporters.export import ExportOptions, export, pipeline
from dash_onnx.runtime import profile
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.ort import Device
from dash_onnx.runtime.results import ScoredToken

# Started in the background by a shell, the tests and their children would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A profile probes for other work before and after, and here would find the other tests; the
# expected time of an export does not matter.
profile.PROBE_S = expected.PROBE_S = 0.01

_costs: dict[str, Costs] = {}


def profiled(bundle: Bundle, device: Device) -> Costs:
    """The costs of a bundle, measured once for all models of its form."""
    m = bundle.manifest
    form = [replace(m.model, name=""), m.variants, m.exported_heads, m.wide is None]
    key = repr([*form, m.target, m.block, m.mixers, m.attention, device])
    if key not in _costs:
        _costs[key] = profile.profile(bundle, device)
        return _costs[key]
    with Phase("costs", total=1):
        return _costs[key]


pipeline.profile = profiled

# With models this small, torch's and ORT's threads would compete for two cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # also in commands that tests run: there are two workers
os.environ["PYTHON_COLORS"] = "0"  # tests read help and tracebacks

PINS = hasattr(os, "sched_setaffinity")
CORES = sorted(os.sched_getaffinity(0)) if PINS else []
"""Cores that the tests may use."""

# ORT's threads spin while they wait: a worker and its commands stay on their own cores.
_WORKER, _WORKERS = (os.environ.get(f"PYTEST_XDIST_WORKER{end}", "") for end in ("", "_COUNT"))
if _WORKER and PINS and len(CORES) >= int(_WORKERS):
    os.sched_setaffinity(0, CORES[int(_WORKER.removeprefix("gw")) :: int(_WORKERS)])

DEMO = Path(__file__).parent.parent / "build/demo"
DEMO_GGUF = DEMO / "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAINED = DEMO / "bundle"

VARIANTS: tuple[Action, ...] = ("full", "int8", "int4")
"""Precisions of the tiny bundles; INT2 has tests of its own."""

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,  # large enough that layers matter
}
LLAMA_BLOCK = Block("rms", 1e-5, "silu", True, False, 1.0, None, None)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def spec_of(facts: ModelFacts) -> ModelSpec:
    """A Llama of these sizes."""
    return ModelSpec(facts, LLAMA_BLOCK, (), ())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 384 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the keeper of the lighthouse counts the ships that pass in the night"
    tokenizer.train_from_iterator([text] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def save_tiny(folder: Path, seed: int = 0, **overrides: object) -> Path:
    """Writes a random Llama as a Hugging Face folder, with weights rounded to FP16."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**TINY, "bos_token_id": 0, "eos_token_id": 1, **overrides})
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_biased(folder: Path, size: float = 0.2, **overrides: object) -> Path:
    """Like `save_tiny`, with a bias in every linear layer, of some standard deviation."""
    save_tiny(folder, attention_bias=True, mlp_bias=True, **overrides)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(7)
    changed = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    assert len(changed) == 4 * 7
    for bias in changed:  # transformers initializes them to zero
        bias.data = torch.randn_like(bias).mul(size).half().float()
    model.save_pretrained(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents by name."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refusal_of(
    kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]
) -> str:
    """The message with which a call is refused: one line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def logits_of(scored: Iterable[ScoredToken]) -> np.ndarray:
    """Logits `[S, V]` copied from the results of `Model.score`, which overwrites them."""
    return np.stack([token.logits.copy() for token in scored])


def reference_logits(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Logits `[S, V]` of transformers."""
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


def memory_of(
    graph: Path, output: str, feeds: dict[str, np.ndarray], kind: str, **options: object
) -> int:
    """Bytes of memory that a session takes for a graph and one run of it.

    In a process of its own, where nothing else allocates, and beside another such session, which
    takes what all of them share.

    Args:
        kind: RssAnon without what is mapped from files, or VmRSS with it.
        options: of `create_session`.
    """
    saved = graph.with_suffix(".npz")
    np.savez(saved, **feeds)
    code = f"""
import re
from pathlib import Path
import numpy as np
from dash_onnx.runtime.machine import release_memory
from dash_onnx.runtime.ort import create_session

def memory():
    release_memory()  # what a kernel worked on
    return 1024 * int(re.findall(r"{kind}:\\s+(\\d+)", Path("/proc/self/status").read_text())[0])

def run():
    session = create_session(Path({str(graph)!r}), "cpu", **{options!r})
    session.run([{output!r}], dict(np.load({str(saved)!r})))
    return session

first, before = run(), memory()
second = run()
print(memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def layer_inputs(
    model: Model, ids: np.ndarray, paths: Sequence[ActionPath], prompt_tokens: int
) -> np.ndarray:
    """Input of each layer for each decoded token, `[S - prompt, L, D]`, with one path per token."""
    sequence, rows = model.new_sequence(), []
    best, layers = model.manifest.variants[0], model.manifest.model.num_layers
    sequence.prefill(ids[:prompt_tokens], (best,) * layers, model.manifest.heads[best])
    for token, path in zip(ids[prompt_tokens:].tolist(), paths, strict=True):
        sequence.advance(1)
        sequence.embed(token)
        for layer, action in enumerate(path):
            rows.append(sequence.hidden[layer % 2].array[0, 0].copy())
            sequence.run(layer, action)
    return np.stack(rows).reshape(len(ids) - prompt_tokens, layers, -1)


# With `--dist loadfile --no-loadscope-reorder`, a worker takes the files in this order: those that
# take long must not be the last, while the other worker has nothing left.
_LONGEST = (
    "test_demo test_ray test_families test_serve test_policy_quality test_memory test_resume "
    "test_genai test_soak test_fuzz test_results test_tasks"
).split()


@pytest.hookimpl(trylast=True)  # after pytest's own order by fixtures
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slow files first that take longest."""
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """Excludes what stays until the end, modules and tests, from garbage collection.

    An export collects after each layer. With layers this small, and the many objects of torch,
    transformers, onnx and pytest, that would take most of its time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def every_core() -> Iterator[None]:
    """Lets the commands of a test also use the cores of the other workers."""
    if not PINS:
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    yield
    os.sched_setaffinity(0, own)


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silences the warning about a busy machine: two tests run at once and disturb profiles.

    Session fixtures and commands in their own process still print it.
    """
    monkeypatch.setattr("dash_onnx.runtime.profile.BUSY", math.inf)
    monkeypatch.setattr("dash_onnx.runtime.profile.TAKEN", math.inf)


@pytest.fixture(scope="session")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text: much faster than text generated by the model."""
    path = tmp_path_factory.mktemp("text") / "night.txt"
    lines = (f"the keeper counts {n} ships that pass in the night {n * n}\n" for n in range(120))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: 4 layers, GQA, untied head."""
    return save_tiny(tmp_path_factory.mktemp("tiny-source") / "tiny")


@pytest.fixture(scope="session")
def export_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a model folder, by default in every precision with exact products (level 0)."""

    def run(source: Path, **options: object) -> Path:
        out = tmp_path_factory.mktemp("bundles") / "out"
        usual = {"variants": VARIANTS, "wide": False, "accuracy_level": 0}
        export(str(source), out, ExportOptions(**{**usual, **options}))
        return out

    return run


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder: Path, export_tiny: Callable[..., Path]) -> Path:
    """The exported tiny model. Read-only: copy it before changing a file."""
    return export_tiny(tiny_folder)


@pytest.fixture(scope="session")
def scored_folder(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a made-up scorer. Read-only, like `tiny_bundle`."""
    folder = tmp_path_factory.mktemp("scored") / "out"
    return with_scorer(Path(shutil.copytree(tiny_bundle, folder)))


@pytest.fixture(scope="session")
def tiny_with(
    tiny_folder: Path, night: Path, export_tiny: Callable[..., Path]
) -> Callable[..., Path]:
    """The tiny model exported with given options, cached. Read-only, like `tiny_bundle`."""

    @functools.cache
    def run(**options: object) -> Path:
        return export_tiny(tiny_folder, calibration=(night,), **options)

    return run


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle: Path) -> Model:
    """The loaded tiny bundle."""
    return dash_onnx.load(tiny_bundle)


@pytest.fixture(scope="module")
def scored(scored_folder: Path) -> Iterator[Model]:
    """The loaded bundle with a made-up scorer."""
    with dash_onnx.load(scored_folder) as model:
        yield model


def missing(what: str) -> NoReturn:
    """Skips the test, or fails it in CI, so that no claim goes untested silently."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


def needed(package: str) -> ModuleType:
    """Imports a package of a peer."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing(f"{error}: run `make .venv/.bench`")


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's GGUF file."""
    if not DEMO_GGUF.is_file():
        missing(f"{DEMO_GGUF} is missing: run `make demo-model`")
    return DEMO_GGUF


@pytest.fixture(scope="session")
def trained_bundle() -> Path:
    """The demo bundle with its trained policy; training it here would take five minutes."""
    manifest = TRAINED / "dash.json"
    if not manifest.is_file() or json.loads(manifest.read_text("utf-8"))["scorer"] is None:
        missing(f"{TRAINED} is missing or has no policy: run `make demo`")
    return TRAINED


@pytest.fixture
def cheap_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes rows nearly free, as on a machine with fast products of many rows."""
    monkeypatch.setattr(
        "dash_onnx.runtime.drafts.DraftStats.cost",
        lambda stats, rows, context: 1 + 0.01 * (rows - 1),
    )
