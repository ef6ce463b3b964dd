"""`dash-export`: what it prints, what it refuses, and what is left when it is interrupted."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir
import pytest
import torch
from cli_tool import Capture, Tool
from conftest import files_of
from safetensors.torch import load_file, save_file

import dash_onnx
from dash_onnx.cli.export import main
from dash_onnx.core.plans import preset_plans
from dash_onnx.exporters.export import pipeline

UNTRAINED = ("--effort", "none")
CONTINUES = "the same command continues from there"
TOOL = Tool("dash-export", main)
run, refused = TOOL.run, TOOL.refused


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A destination, alone in its folder, so that whatever is written next to it is seen."""
    folder = tmp_path / "a destination: ü#%$"
    folder.mkdir()
    return folder / "out"


@pytest.fixture(scope="module")
def full_bundle(tiny_with: Callable[..., Path]) -> Path:
    """A bundle with `full` alone; copy it before changing a file."""
    return tiny_with(variants=("full",))


def quick(model: object, out: Path, text: Path, *more: object) -> tuple[object, ...]:
    """Arguments of an export that takes a fraction of a second; it trains nothing."""
    return (model, out, *UNTRAINED, "--variants", "full", "--calibration", text, *more)


# What it prints


def test_at_the_end_it_says_what_presets_run_and_what_to_do_next(
    tiny_folder: Path, night: Path, out: Path, capsys: Capture
) -> None:
    assert run(tiny_folder, out, *UNTRAINED, "--calibration", night, "--log-level", "warning") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    head, *rows, size, text, last = captured.out.splitlines()
    rows = rows[: next(n for n, row in enumerate(rows) if row.startswith("time: "))]
    assert head.split() == ["preset", "time", "KL", "head", "layers"]
    manifest = dash_onnx.load(out).manifest
    assert manifest.target.accuracy_level == 4 and "full" not in manifest.variants
    for name, plan in preset_plans(manifest).items():
        (row,) = [row for row in rows if name in row.split("  ")[0].split(", ")]
        assert f"{plan.kl:.4f}" in row and row.endswith(f"4 {plan.path[0]}" if plan.path else "")
    assert size.startswith(f"tiny -> {out}: ") and "night.txt" in text
    assert last == f"try it: dash-run '{out}' \"Hello!\""  # as a shell takes a path with a blank
    assert os.listdir(out.parent) == ["out"]


def test_json_is_one_object_with_the_figures_and_nothing_else(
    tiny_folder: Path, night: Path, out: Path, capsys: Capture
) -> None:
    options = ("--max-length", 100, "--variants", "int8, full,int8")
    facts = TOOL.json_of(capsys, *quick(tiny_folder, out, night, *options))
    assert facts["folder"] == str(out)
    assert facts["variants"] == ["full", "int8"]
    assert facts["target"]["accuracy_level"] == 4
    assert facts["model"]["max_length"] == 100
    assert facts["calibration"]["seed"] == 0
    assert facts["export"]["seconds"] >= 0 and facts["export"]["peak_rss_bytes"] > 0
    assert len(facts["layers"]) == 4
    assert set(facts["layers"][0]) == {"bytes", "cosine", "relative_error", "scale"}
    assert "files" not in facts


def test_help_has_examples_of_every_kind_of_source(capsys: Capture) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    examples = shown.partition("examples:")[2]
    assert examples.count("dash-export ") >= 3
    assert ".gguf" in examples
    options = ("--variants", "--calibration", "--overwrite", "--device", "--max-length", "--effort")
    assert all(option in shown for option in options)


def test_version_is_the_version_of_the_package(capsys: Capture) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"dash-onnx {dash_onnx.__version__}"


# What it refuses


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("model",),
        ("model", "out", "more"),
        ("model", "out", "--no-such-option"),
        ("model", "out", "--device", "tpu"),
        ("model", "out", "--max-length", "0"),
        ("model", "out", "--max-length", "-3"),
        ("model", "out", "--max-length", "many"),
        ("model", "out", "--max-length", "1.5"),
        ("model", "out", "--log-level", "loud"),
    ],
    ids=" ".join,
)
def test_misuse_of_the_arguments_is_one_line_that_leads_to_the_help(
    arguments: tuple[str, ...], capsys: Capture
) -> None:
    assert "dash-export --help" in refused(capsys, *arguments)


@pytest.mark.parametrize("variants", ["full,int3", "skip"])
def test_an_unknown_variant_is_refused_and_the_known_ones_are_listed(
    variants: str, tiny_folder: Path, out: Path, capsys: Capture
) -> None:
    message = refused(capsys, tiny_folder, out, "--variants", variants)
    assert "full, int8, int4, int2" in message
    assert os.listdir(out.parent) == []


def test_a_context_in_which_nothing_can_be_calibrated_is_refused(
    tiny_folder: Path, out: Path, capsys: Capture
) -> None:
    options = ("--max-length", 4, "--effort", "none", "--check", "none")
    assert "choose a longer --max-length" in refused(capsys, tiny_folder, out, *options)


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("--max-length", 257, "256"),
        ("--max-length", 10**14, "256"),
    ],
)
def test_what_the_model_does_not_allow_is_refused(
    option: str,
    value: int,
    limit: str,
    tiny_folder: Path,
    night: Path,
    out: Path,
    capsys: Capture,
) -> None:
    message = refused(capsys, *quick(tiny_folder, out, night, option, value))
    assert str(value) in message and limit in message
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "/no/such/folder", "nowhere.gguf"])
def test_a_missing_model_is_refused(model: str, night: Path, out: Path, capsys: Capture) -> None:
    assert model in refused(capsys, *quick(model, out, night))
    assert os.listdir(out.parent) == []


def test_a_failure_in_the_midst_of_an_export_keeps_what_is_finished(
    tiny_folder: Path, night: Path, tmp_path: Path, out: Path, capsys: Capture
) -> None:
    source = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] += torch.inf
    save_file(tensors, source / "model.safetensors")
    assert run(*quick(source, out, night)) == 2
    partial = out.parent / ".out.partial"
    *_, note, error = capsys.readouterr().err.splitlines()
    assert note == f"dash-export: {partial} keeps what is finished; {CONTINUES}"
    assert "finite" in error
    assert os.listdir(out.parent) == [".out.partial"]


def test_a_missing_weight_is_told_before_anything_is_written(
    tiny_folder: Path, night: Path, tmp_path: Path, out: Path, capsys: Capture
) -> None:
    source = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    assert "model.layers.3.mlp.up_proj" in refused(capsys, *quick(source, out, night))
    assert os.listdir(out.parent) == []


def test_a_full_disk_says_that_finished_work_is_kept(
    tiny_folder: Path, out: Path, night: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """NumPy does not say so: only how much it could write."""
    save = onnx_ir.save

    def full(model: onnx_ir.Model, path: Path, **given: Any) -> None:
        if path.match("layers/02/*"):
            raise OSError("884736 requested and 12288 written")
        save(model, path, **given)

    monkeypatch.setattr("onnx_ir.save", full)
    assert run(*quick(tiny_folder, out, night)) == 2
    *_, note, error = capsys.readouterr().err.splitlines()
    assert "keeps what is finished" in note and "No space left on device" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no text"),
        (b" \n\t", "is empty"),
        (b"\xff\xfe", "UTF-8"),
        (b"night", "least 512"),
    ],
)
def test_an_unusable_calibration_file_is_refused_by_its_name(
    content: bytes | None,
    message: str,
    tiny_folder: Path,
    tmp_path: Path,
    out: Path,
    capsys: Capture,
) -> None:
    path = tmp_path / "corpus.txt"
    if content is None:
        path.mkdir()  # an empty folder
    else:
        path.write_bytes(content)
    found = refused(capsys, *quick(tiny_folder, out, path))
    assert path.name in found and message in found
    assert os.listdir(out.parent) == []


def test_a_bundle_is_replaced_with_overwrite_only_and_anything_else_never(
    tiny_folder: Path, full_bundle: Path, night: Path, out: Path, capsys: Capture
) -> None:
    shutil.copytree(full_bundle, out)
    before = files_of(out)
    message = refused(capsys, *quick(tiny_folder, out, night))
    assert "--overwrite" in message and str(out) in message
    assert files_of(out) == before
    assert run(*quick(tiny_folder, out, night, "--overwrite", "--max-length", 77)) == 0
    assert dash_onnx.load(out).manifest.model.max_length == 77
    assert os.listdir(out.parent) == ["out"]
    capsys.readouterr()
    (out / "dash.json").rename(out / "precious")
    assert "not a bundle" in refused(capsys, *quick(tiny_folder, out, night, "--overwrite"))
    assert (out / "precious").is_file() and os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("name", ["torch", "transformers", "onnxscript", "gguf"])
def test_a_missing_export_extra_is_named_with_its_remedy(
    name: str,
    tiny_folder: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *a: None if wanted == name else find(wanted, *a)
    )
    message = refused(capsys, tiny_folder, out)
    assert name in message and "pip install" in message and "export" in message
    assert os.listdir(out.parent) == []


def test_export_for_cuda_works_without_cuda_and_the_bundle_says_so(
    tiny_folder: Path,
    night: Path,
    out: Path,
    recwarn: pytest.WarningsRecorder,
    capsys: Capture,
) -> None:
    assert (
        run(*quick(tiny_folder, out, night, "--device", "cuda", "--json", "--log-level", "warning"))
        == 0
    )
    captured = capsys.readouterr()
    target = json.loads(captured.out)["target"]
    assert (target["device"], target["dtype"]) == ("cuda", "float16")
    assert captured.err == ""
    with pytest.raises(dash_onnx.DashError, match="exported for device 'cuda'"):
        dash_onnx.load(out)
    assert [str(warning.message) for warning in recwarn] == []  # they would go to stderr


# Interrupts: real processes, killed while layers are being written


def started(model: Path, out: Path, text: Path) -> subprocess.Popen[str]:
    code = "import sys; from dash_onnx.cli.export import main; sys.exit(main())"
    arguments = [
        model,
        out,
        *UNTRAINED,
        "--calibration",
        text,
        "--overwrite",
        "--log-level",
        "warning",
    ]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def partial_layer(out: Path) -> bool:
    return (out.parent / f".{out.name}.partial/bundle/layers/01").is_dir()


@pytest.fixture(scope="module")
def interrupted(
    tiny_folder: Path,
    full_bundle: Path,
    night: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, tuple[Path, int, str]]:
    """By signal: the destination, the exit code and stderr of an export that it hit."""
    processes = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        out = tmp_path_factory.mktemp("hit") / "out"
        shutil.copytree(full_bundle, out)
        processes[number] = (out, started(tiny_folder, out, night))
    waiting, deadline = dict(processes), time.monotonic() + 180
    found = {}
    try:
        while waiting:
            for number, (out, process) in list(waiting.items()):
                assert process.poll() is None, process.communicate()
                if partial_layer(out):
                    process.send_signal(number)
                    del waiting[number]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for number, (out, process) in processes.items():
            _, errors = process.communicate(timeout=60)
            found[number] = (out, process.returncode, errors)
    finally:
        for _, process in processes.values():
            process.kill()
    return found


def test_an_interrupt_tells_how_to_go_on(
    full_bundle: Path, tiny_folder: Path, night: Path, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def struck(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "my out"
    monkeypatch.setattr("dash_onnx.exporters.pipeline.export", struck)
    words = (tiny_folder, out, "--calibration", night, "--log-level", "warning")
    assert run(*words) == 130
    assert capsys.readouterr().err.split("\n")[1:] == ["dash-export: interrupted", ""]
    shutil.copytree(full_bundle, out)  # as the training is struck
    monkeypatch.setattr("dash_onnx.cli.export.check_destination", lambda *_: None)
    assert run(*words) == 130
    told = (
        f"{out} can answer; `dash-train '{out}'`, with the same --effort, --calibration, "
        "--decisions and --train-device, trains its policy"
    )
    assert told in capsys.readouterr().err


def test_a_bundle_without_a_policy_may_be_trained_instead_of_replaced(
    full_bundle: Path, tiny_folder: Path, capsys: Capture
) -> None:
    assert run(tiny_folder, full_bundle) == 2
    error = capsys.readouterr().err
    assert "exists; pass --overwrite to replace it, or train its policy: dash-train" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_export_leaves_the_previous_bundle_as_it_was(
    number: signal.Signals, interrupted: dict, full_bundle: Path
) -> None:
    out, code, _ = interrupted[number]
    assert code != 0
    assert files_of(out) == files_of(full_bundle)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_has_exit_code_130_and_keeps_what_is_finished(
    number: signal.Signals, interrupted: dict
) -> None:
    out, code, errors = interrupted[number]
    assert code == 130
    partial = out.parent / ".out.partial"
    assert errors.strip().splitlines() == [
        f"dash-export: {partial} keeps what is finished; {CONTINUES}",
        "dash-export: interrupted",
    ]
    assert sorted(os.listdir(out.parent)) == [".out.partial", "out"]


def test_the_next_export_works_beside_what_a_killed_one_left(
    interrupted: dict, tiny_folder: Path, night: Path, capsys: Capture
) -> None:
    out, _, _ = interrupted[signal.SIGKILL]
    assert run(*quick(tiny_folder, out, night, "--overwrite", "--max-length", 55)) == 0
    assert dash_onnx.load(out).manifest.model.max_length == 55
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize(
    ("room", "message"),
    [
        ({"disk": 1000}, "the export needs 0.0 GB of disk beside"),
        ({"memory": 1000}, "the export needs about 0.5 GB of memory, and 0.0 GB are free"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_written(
    room: dict[str, int],
    message: str,
    tiny_folder: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    usage = SimpleNamespace(free=room.get("disk", 1 << 40))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(pipeline, "available_bytes", lambda: room.get("memory"))
    assert message in refused(capsys, tiny_folder, out)
    assert not list(out.parent.iterdir())


def test_an_interrupted_export_leaves_its_room_to_the_next(
    tiny_folder: Path, out: Path, night: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    left = out.with_name(f".{out.name}.partial") / "hidden-00.npy"
    left.parent.mkdir()
    with left.open("wb") as file:
        file.truncate(1 << 30)
    arguments = (tiny_folder, out, "--calibration", night, "--effort", "none", "--check", "none")
    assert main([str(argument) for argument in arguments]) == 0
    assert not left.exists()
