"""Damaged bundles and models: whatever is in a file, it works or is refused in one line.

The slow cases are 10,000 manifests, 1,000 graphs, configs and GGUF headers, 1,000 of each damage
to text files, and 500 command lines; the environment variable FUZZ_CASES sets another number.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from gguf_files import write_model
from gguf_models import tiny_model
from scored_bundle import with_scorer
from transformers import PreTrainedModel

import dash_onnx
from dash_onnx.core.bundle import file_facts
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.export.sizes import sizes_of
from dash_onnx.exporters.sources import open_source
from dash_onnx.runtime.machine import peak_rss_bytes

LONG = int(os.environ.get("FUZZ_CASES", "10000"))
CASES = pytest.mark.parametrize(
    "cases", [300, pytest.param(LONG, marks=pytest.mark.slow)], ids=["quick", "long"]
)
UINT32 = GGUFValueType.UINT32
SECONDS = 5  # at most, of a case
ODD: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2, 7, 0.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), 10**6,
    10**12, 10**400, "", "x", "x" * 300, "\udc80", "\x1b[2J\n", "../x", "skip", "int8", [], [0], {},
    {"a": 1},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """No case takes more than a gigabyte, beside what the process has already."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        yield
        return
    reset.write_text("5")  # the highest resident memory becomes the present one
    before = peak_rss_bytes()
    yield
    assert peak_rss_bytes() - before < 1 << 30


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of its own, with a scorer."""
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"
    return with_scorer(Path(shutil.copytree(tiny_bundle, folder)))


def refused(folder: Path) -> str | None:
    """Loads a bundle and generates; the message where it is refused. Checks its form."""

    def use() -> None:
        with dash_onnx.load(folder) as model:
            model.generate("the keeper", policy="int4", max_new_tokens=2)
            if model.manifest.scorer:
                model.generate("the keeper", max_new_tokens=2)
            if model.text.chat_template:
                model.chat([{"role": "user", "content": "hello"}], max_new_tokens=1)

    return message_of(use)


def message_of(use: Callable[[], object]) -> str | None:
    """The message of a refusal, which has its form, in good time; None where there is none."""
    started, message = time.monotonic(), None
    try:
        with warnings.catch_warnings():  # which print lines of their own
            warnings.simplefilter("error", RuntimeWarning)
            use()
    except dash_onnx.DashError as error:
        message = str(error)
        assert message.isprintable(), ascii(message)
        assert len(message) < 1000, message
    assert time.monotonic() - started < SECONDS
    return message


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in parsed JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, key))


def damaged(text: str, rng: random.Random) -> str:
    """JSON with one value, or two, replaced, removed, renamed, doubled or made long."""
    data = json.loads(text)
    for _ in range(rng.choice([1, 1, 2])):
        damage(data, rng)
    return json.dumps(data)


def damage(data: dict[str, Any], rng: random.Random) -> None:
    found = [*places(data)]
    if not found:
        return
    # All parts alike: most of the places are in the list of files.
    part = rng.choice([*data])
    *inner, last = rng.choice([place for place in found if place[0] == part])
    parent = data
    for key in inner:
        parent = parent[key]
    kind = rng.randrange(6)
    if kind == 5 and isinstance(parent[last], list) and parent[last]:
        parent[last] *= rng.choice([2, 1000, 200_000 // len(parent[last]) + 1])
    elif kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "x" * 300, "../x", "\udc80", "a\nb"])] = parent.pop(last)
    elif kind == 1:
        parent.append(parent[last])
    elif kind == 2 and isinstance(parent[last], (int, float)):
        parent[last] = parent[last] * rng.choice([-1, 0.5, 2, 3, 1000]) + rng.choice([0, 1])
    else:
        parent[last] = rng.choice(ODD)


def torn(text: str, rng: random.Random) -> str:
    """Text with a piece cut out, doubled, or replaced by odd characters."""
    start, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    end = min(end, start + rng.choice([1, 3, 30, 3000]))
    piece = rng.choice(
        ["", text[start:end] * 2, '"', "{{", "0", "[" * 5000, "\0", "\u202e", "\r\n"]
    )
    return text[:start] + piece + text[end:]


def signed(folder: Path, name: str) -> None:
    """Makes the manifest say what a file is now, as whoever meant harm would."""
    manifest = folder / "dash.json"
    data = json.loads(manifest.read_text("utf-8"))
    data["files"][name] = vars(file_facts(folder / name))
    manifest.write_text(json.dumps(data), "utf-8")


@CASES
def test_a_damaged_manifest_is_run_or_refused_in_one_line(bundle: Path, cases: int) -> None:
    manifest = bundle / "dash.json"
    text, rng, messages = manifest.read_text("utf-8"), random.Random(0), []
    try:
        for case in range(cases):
            changed = damaged(text, rng)
            manifest.write_text(changed, "utf-8")
            try:
                messages.append(refused(bundle))
            except Exception as error:
                error.add_note(f"case {case}")
                raise
    finally:
        manifest.write_text(text, "utf-8")
    assert sum(message is not None for message in messages) > cases / 3


@CASES
@pytest.mark.parametrize("damage", [torn, damaged])
def test_damaged_text_files_are_run_or_refused_in_one_line(
    bundle: Path, damage: Callable[[str, random.Random], str], cases: int
) -> None:
    """Even where the checksums were made to fit."""
    rng = random.Random(1)
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]
    names += ["chat_template.jinja"] if damage is torn else []
    manifest, messages = (bundle / "dash.json").read_text("utf-8"), []
    for case in range(max(100, cases // 10)):
        name = names[case % len(names)]
        whole = (bundle / name).read_bytes()
        try:
            (bundle / name).write_text(damage(whole.decode(), rng), "utf-8", "surrogateescape")
            signed(bundle, name)
            messages.append(refused(bundle))
        except Exception as error:
            error.add_note(f"case {case}, {name}")
            raise
        finally:
            (bundle / name).write_bytes(whole)
            (bundle / "dash.json").write_text(manifest, "utf-8")
    assert any(messages) or cases < 300


@CASES
def test_damaged_graphs_are_refused(bundle: Path, cases: int) -> None:
    """By their checksum: what ONNX Runtime makes of a damaged graph, nobody can promise."""
    rng = random.Random(2)
    names = ["embed.onnx", "layers/01/int4.onnx", "layers/01/int4.onnx.data", "head/int4.onnx"]
    for case in range(cases // 10):
        path = bundle / names[case % len(names)]
        whole = path.read_bytes()
        place, byte = rng.randrange(len(whole)), rng.randrange(1, 256)
        cut = whole[:place] + bytes([whole[place] ^ byte]) + whole[place + 1 :]
        try:
            path.write_bytes(rng.choice([cut, whole[:place], whole + b"x"]))
            os.utime(path)
            assert refused(bundle) is not None, (case, path)
        finally:
            path.write_bytes(whole)


def described(model: Path) -> str | None:
    """Opens a model and estimates its export, as dash-info does; the message of a refusal."""
    return message_of(lambda: sizes_of(open_source(str(model), REGISTRY), ExportOptions()))


@CASES
@pytest.mark.parametrize("damage", [torn, damaged])
def test_a_damaged_config_is_read_or_refused_in_one_line(
    tiny_folder: Path,
    damage: Callable[[str, random.Random], str],
    cases: int,
    tmp_path: Path,
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    config = model / "config.json"
    text, rng, messages = config.read_text("utf-8"), random.Random(3), []
    for case in range(cases // 10):
        config.write_text(damage(text, rng), "utf-8", "surrogateescape")
        try:
            messages.append(described(model))
        except Exception as error:
            error.add_note(f"case {case}: {config.read_text('utf-8', 'replace')}")
            raise
    assert any(messages) or cases < 300


@CASES
def test_a_damaged_gguf_header_is_read_or_refused_in_one_line(cases: int, tmp_path: Path) -> None:
    path, rng = tmp_path / "model.gguf", random.Random(4)
    write_model(path, tiny_model("llama", num_hidden_layers=2))
    whole, messages = path.read_bytes(), []
    for case in range(cases // 10):
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 1, 1, 8])):
            changed[rng.randrange(24 if rng.random() < 0.2 else 12_000)] = rng.randrange(256)
        path.write_bytes(changed[: rng.choice([len(changed)] * 9 + [rng.randrange(12_000)])])
        try:
            messages.append(described(path))
        except Exception as error:
            error.add_note(f"case {case}")
            raise
    assert any(messages) or cases < 300


def write_with(
    path: Path, model: PreTrainedModel, key: str, value: float, kind: GGUFValueType = UINT32
) -> None:
    """A file one of whose numbers is another."""
    change = {key: GGUFValue(value, kind)}
    write_model(path, model, lambda writer: writer.kv_data[0].update(change))


@pytest.mark.parametrize(
    "key",
    "block_count context_length embedding_length feed_forward_length attention.head_count "
    "attention.head_count_kv rope.dimension_count attention.key_length".split(),
)
@pytest.mark.parametrize("value", [0, 1, 3, 2**31 - 1, 2**32 - 1])
def test_gguf_sizes_that_do_not_fit_the_tensors_are_refused(
    key: str, value: int, tmp_path: Path
) -> None:
    """Before anything is computed; what is right, or only a shorter context, is taken."""
    path = tmp_path / "model.gguf"
    write_with(path, tiny_model("llama", num_hidden_layers=2), f"llama.{key}", value)
    message = described(path)
    assert key in ("context_length", "rope.dimension_count", "attention.key_length") or message


@pytest.mark.parametrize(
    "key", "group_count time_step_rank inner_size state_size conv_kernel".split()
)
@pytest.mark.parametrize("value", [0, 1, 4, 2**31 - 1])
def test_gguf_sizes_of_a_delta_net_that_do_not_fit_are_refused(
    key: str, value: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_with(path, tiny_model("qwen3_5_text"), f"qwen35.ssm.{key}", value)

    def read() -> None:
        source = open_source(str(path), REGISTRY)
        family = REGISTRY["qwen3_5_text"]
        spec = family.describe("m", source.config, None)
        sizes_of(source, ExportOptions())
        for layer in range(3):
            family.layer(source.weights, layer, spec)

    assert message_of(read) or (key, value) == ("conv_kernel", 4)


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        *(
            (f"llama.{key}", GGUFValueType.FLOAT32, value)
            for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base")
            for value in (0.0, -1.0, float("nan"), float("inf"))
        ),
        ("tokenizer.ggml.eos_token_id", UINT32, 2**31),
        ("tokenizer.ggml.bos_token_id", UINT32, 2**31),
    ],
)
def test_gguf_numbers_that_no_layer_can_compute_with_are_refused(
    key: str, kind: GGUFValueType, value: float, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_with(path, tiny_model("llama", num_hidden_layers=2), key, value, kind)
    assert described(path)


# Command lines

TOOLS = ("run", "info", "eval", "profile", "report", "fuse", "train", "bench", "export", "serve")
WORDS = (
    "", "-", "--", "-1", "0", "1", "nan", "inf", "1e999", "9" * 400, "x" * 300, "\udc80", "\x1b[2J",
    "../x", "/dev/null", "/dev/full", "/", ".", "int4", "int8,int8", "static:int4*999999999999",
    "static:@/dev/zero/x", "random:" + "9" * 400, "hub:no/such", "balanced", "true", "{}", "é🙂",
)  # fmt: skip


def command_line(tool: str, rng: random.Random, bundle: Path, source: Path, out: Path) -> list[str]:
    """A bundle or a model, and some options of a tool with odd values."""
    parser = importlib.import_module(f"dash_onnx.cli.{tool}")._parser()
    options = [
        action for action in parser._actions if action.option_strings and action.dest != "help"
    ]
    line = [str(rng.choice([bundle, source, out / "missing", *WORDS]))]
    if rng.random() < 0.5:
        line.append(rng.choice([str(out / "new"), *WORDS]))
    for action in rng.sample(options, rng.randrange(1, min(4, len(options)))):
        line.append(action.option_strings[-1])
        if action.nargs != 0:
            line.append(rng.choice([*WORDS, *map(str, action.choices or ())]))
    return line


@pytest.mark.slow
def test_odd_command_lines_end_in_good_time_without_a_traceback(
    bundle: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    # pytest keeps logs, and pytest-xdist cannot send what is not UTF-8.
    monkeypatch.setattr(logging.getLogger("dash_onnx"), "propagate", False)
    rng = random.Random(0)
    for number in range(max(500, LONG // 20)):
        tool = rng.choice(TOOLS)
        line = command_line(tool, rng, bundle, tiny_folder, tmp_path)
        if tool in ("export", "train", "serve", "bench"):  # what is well-formed would take long
            line[0] = str(rng.choice([tmp_path / "missing", *WORDS]))
        if tool == "run":
            if line[0] == str(tiny_folder):  # it would be exported first
                line[0] = str(bundle)
            line += ["--max-tokens", "2"]
        started = time.monotonic()
        try:
            code = importlib.import_module(f"dash_onnx.cli.{tool}").main(line)
        except SystemExit as leave:  # of argparse
            code = leave.code
        seconds, told = time.monotonic() - started, capsys.readouterr().err
        assert code in (0, 2), (tool, line, told)
        assert "Traceback" not in told, (tool, line)
        if code == 2:
            last = told.strip().splitlines()[-1]
            assert last.startswith(f"dash-{tool}: error: "), (tool, line, told)
            assert len(last) < 1500
        patience = 30 if "--task" in line else SECONDS  # to import the harness takes long
        assert seconds < patience, (number, tool, line, seconds)
