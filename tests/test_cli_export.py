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
from typing import Any

import pytest
import torch
from cli_tool import Capture, Tool
from safetensors.torch import load_file, save_file

import dash_onnx
from dash_onnx.cli.export import main
from dash_onnx.exporters.architectures import REGISTRY

SENTENCE = "the keeper of the lighthouse counts the ships that pass in the night\n"
UNTRAINED = ("--effort", "none")
TOOL = Tool("dash-export", main)
run, refused = TOOL.run, TOOL.refused


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text: much faster than text that the model generates itself."""
    path = tmp_path_factory.mktemp("text") / "night.txt"
    path.write_text(SENTENCE * 48)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A destination, alone in its folder, so that whatever is written next to it is seen."""
    folder = tmp_path / "destination"
    folder.mkdir()
    return folder / "out"


@pytest.fixture
def source(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny source that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def full_bundle(tiny_folder: Path, text: Path, export_tiny: Callable[..., Path]) -> Path:
    """A bundle with `full` alone; copy it before changing a file."""
    return export_tiny(tiny_folder, calibration=(text,), variants=("full",))


def quick(model: object, out: Path, text: Path, *more: object) -> tuple[object, ...]:
    """Arguments of an export that takes a fraction of a second; it trains nothing."""
    return (model, out, *UNTRAINED, "--variants", "full", "--calibration", text, *more)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def answer(bundle: Path) -> str:
    return dash_onnx.load(bundle).generate("the keeper", max_new_tokens=4, ignore_eos=True)


# What it prints


def test_the_closing_table_has_a_row_for_each_layer_and_says_what_to_do_next(
    tiny_folder: Path, text: Path, out: Path, capsys: Capture
) -> None:
    assert run(tiny_folder, out, *UNTRAINED, "--calibration", text) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    head, rows, total, rest = lines[0], lines[1:5], lines[5], "\n".join(lines[6:])
    for column in ("layer", "full MB", "int8 MB", "int4 MB", "skip MB", "scale", "cosine"):
        assert column in head
    assert all(f"{action} err" in head for action in ("int8", "int4", "skip"))
    assert "full err" not in head
    layers = dash_onnx.load(out).manifest.layers
    for index, (row, layer) in enumerate(zip(rows, layers, strict=True)):
        cells = row.split()
        assert cells[0] == str(index)
        sizes = [f"{layer.bytes[action] / 1e6:.2f}" for action in ("full", "int8", "int4", "skip")]
        errors = [f"{layer.relative_error[action]:.4f}" for action in ("int8", "int4", "skip")]
        assert cells[1:] == [*sizes, f"{layer.scale:.3f}", f"{layer.cosine:.3f}", *errors]
    assert total.split()[0] == "all" and len(total.split()) == 5
    assert f"tiny -> {out}" in rest
    assert "night.txt" in rest
    assert f"dash-run {out} --chat" in rest
    assert os.listdir(out.parent) == ["out"]


def test_json_is_one_object_with_the_figures_and_nothing_else(
    tiny_folder: Path, text: Path, out: Path, capsys: Capture
) -> None:
    assert run(*quick(tiny_folder, out, text, "--json", "--max-length", 100, "--seed", 3)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    facts = json.loads(captured.out)
    assert facts["out"] == str(out)
    assert facts["variants"] == ["full"]
    assert facts["model"]["max_length"] == 100
    assert facts["calibration"]["seed"] == 3
    assert facts["export"]["seconds"] >= 0 and facts["export"]["peak_rss_bytes"] > 0
    assert len(facts["layers"]) == 4
    assert set(facts["layers"][0]) == {"bytes", "cosine", "relative_error", "scale"}
    assert "files" not in facts


def test_variants_are_taken_in_any_order_and_with_duplicates(
    tiny_folder: Path, text: Path, out: Path, capsys: Capture
) -> None:
    arguments = (
        tiny_folder,
        out,
        *UNTRAINED,
        "--calibration",
        text,
        "--variants",
        " int8, full,int8",
        "--json",
    )
    assert run(*arguments) == 0
    assert json.loads(capsys.readouterr().out)["variants"] == ["full", "int8"]


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


# Misuse of the arguments


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
        ("model", "out", "--block-size", "48"),
        ("model", "out", "--seed", "one"),
    ],
    ids=" ".join,
)
def test_misuse_of_the_arguments_is_one_line_that_leads_to_the_help(
    arguments: tuple[str, ...], capsys: Capture
) -> None:
    assert "dash-export --help" in refused(capsys, *arguments)


@pytest.mark.parametrize("variants", ["int2", "full,int2", "skip", "", ",", "full;int8"])
def test_an_unknown_variant_is_refused_and_the_known_ones_are_listed(
    variants: str, tiny_folder: Path, out: Path, capsys: Capture
) -> None:
    message = refused(capsys, tiny_folder, out, "--variants", variants)
    assert "full, int8, int4" in message
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("length", [257, 10**30])
def test_a_context_longer_than_the_models_is_refused(
    length: int, tiny_folder: Path, text: Path, out: Path, capsys: Capture
) -> None:
    message = refused(capsys, *quick(tiny_folder, out, text, "--max-length", length))
    assert str(length) in message and "256" in message
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_seed_is_taken_or_refused_in_one_line(
    seed: int, source: Path, out: Path, capsys: Capture
) -> None:
    config = source / "config.json"  # eight tokens of context: a short calibration text
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 8}))
    arguments = (source, out, *UNTRAINED, "--variants", "full", "--seed", seed)
    if run(*arguments) != 0:
        capsys.readouterr()
        refused(capsys, *arguments)


def test_a_block_size_that_does_not_divide_the_hidden_size_is_refused(
    tiny_folder: Path, text: Path, out: Path, capsys: Capture
) -> None:
    message = refused(capsys, *quick(tiny_folder, out, text, "--block-size", 128))
    assert "128" in message and "64" in message
    assert os.listdir(out.parent) == []


def test_a_block_size_that_does_not_divide_the_intermediate_size_is_refused_or_works(
    tiny_folder: Path, text: Path, out: Path, capsys: Capture
) -> None:
    arguments = (tiny_folder, out, *UNTRAINED, "--calibration", text, "--block-size", 64, "--json")
    if run(*arguments) == 0:
        errors = json.loads(capsys.readouterr().out)["layers"][1]["relative_error"]
        assert errors["int8"] < errors["int4"] < errors["skip"]
    else:
        capsys.readouterr()
        assert "96" in refused(capsys, *arguments)


# The source


def test_an_unknown_architecture_is_refused_and_the_supported_ones_are_listed(
    source: Path, text: Path, out: Path, capsys: Capture
) -> None:
    config = source / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mamba2"}))
    message = refused(capsys, *quick(source, out, text))
    assert "mamba2" in message
    assert all(name in message for name in REGISTRY)
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "/no/such/folder", "nowhere.gguf"])
def test_a_missing_model_is_refused(model: str, text: Path, out: Path, capsys: Capture) -> None:
    assert model in refused(capsys, *quick(model, out, text))
    assert os.listdir(out.parent) == []


def test_a_failure_in_the_midst_of_an_export_leaves_nothing(
    source: Path, text: Path, out: Path, capsys: Capture
) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    assert "model.layers.3.mlp.up_proj" in refused(capsys, *quick(source, out, text))
    assert os.listdir(out.parent) == []


def test_weights_that_are_not_finite_are_refused_in_one_line(
    source: Path, text: Path, out: Path, capsys: Capture
) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.inf
    save_file(tensors, source / "model.safetensors")
    assert "finite" in refused(capsys, *quick(source, out, text))
    assert os.listdir(out.parent) == []


# The calibration file


@pytest.mark.parametrize(
    "content", [b"", b" \n\t", b"\x00\xff\xfe\x80" * 500, SENTENCE.encode(), None]
)
def test_an_unusable_calibration_file_is_refused_by_its_name(
    content: bytes | None, tiny_folder: Path, tmp_path: Path, out: Path, capsys: Capture
) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused(capsys, *quick(tiny_folder, out, path))
    assert os.listdir(out.parent) == []


def test_a_calibration_file_that_is_too_short_says_how_long_it_must_be(
    tiny_folder: Path, tmp_path: Path, out: Path, capsys: Capture
) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(SENTENCE)
    assert "512" in refused(capsys, *quick(tiny_folder, out, path))


def test_a_folder_as_calibration_file_is_refused(
    tiny_folder: Path, tmp_path: Path, out: Path, capsys: Capture
) -> None:
    assert str(tmp_path) in refused(capsys, *quick(tiny_folder, out, tmp_path))


# The destination


def test_an_existing_bundle_is_kept_and_the_remedy_is_named(
    tiny_folder: Path, full_bundle: Path, text: Path, out: Path, capsys: Capture
) -> None:
    shutil.copytree(full_bundle, out)
    before = files_of(out)
    message = refused(capsys, *quick(tiny_folder, out, text))
    assert "--overwrite" in message and str(out) in message
    assert files_of(out) == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_kept_even_with_overwrite(
    kind: str, tiny_folder: Path, text: Path, out: Path, capsys: Capture
) -> None:
    if kind == "folder":
        out.mkdir()
    precious = out / "precious" if kind == "folder" else out
    precious.write_text("do not lose me")
    for more in ((), ("--overwrite",)):
        message = refused(capsys, *quick(tiny_folder, out, text, *more))
        assert "not a bundle" in message
    assert precious.read_text() == "do not lose me"
    assert os.listdir(out.parent) == ["out"]


def test_overwrite_replaces_a_bundle(
    tiny_folder: Path, full_bundle: Path, text: Path, out: Path, capsys: Capture
) -> None:
    shutil.copytree(full_bundle, out)
    assert run(*quick(tiny_folder, out, text, "--overwrite", "--max-length", 77)) == 0
    assert dash_onnx.load(out).manifest.model.max_length == 77
    assert os.listdir(out.parent) == ["out"]


def test_an_empty_folder_is_a_destination(
    tiny_folder: Path, text: Path, out: Path, capsys: Capture
) -> None:
    out.mkdir()
    assert run(*quick(tiny_folder, out, text)) == 0
    assert answer(out)


def test_folders_above_the_destination_are_made(
    tiny_folder: Path, text: Path, out: Path, capsys: Capture
) -> None:
    assert run(*quick(tiny_folder, out / "of" / "mine", text)) == 0
    assert answer(out / "of" / "mine")


def test_a_destination_below_a_file_is_refused(
    tiny_folder: Path, text: Path, out: Path, capsys: Capture
) -> None:
    out.write_text("a file")
    assert str(out) in refused(capsys, *quick(tiny_folder, out / "below", text))
    assert out.read_text() == "a file"


def test_overwriting_a_link_to_a_bundle_leaves_no_stray_files(
    tiny_folder: Path, full_bundle: Path, text: Path, out: Path, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copytree(full_bundle, tmp_path / "real")
    out.symlink_to(tmp_path / "real")
    code = run(*quick(tiny_folder, out, text, "--overwrite"))
    assert code in (0, 2)  # either is sound
    assert os.listdir(out.parent) == ["out"]
    assert answer(out)


def test_an_interrupt_between_the_two_renames_keeps_the_previous_bundle(
    tiny_folder: Path,
    full_bundle: Path,
    text: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    shutil.copytree(full_bundle, out)
    before = files_of(out)
    rename = Path.rename

    def interrupted(self: Path, target: Any) -> Path:
        if Path(target) == out and self.name == "bundle":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert run(*quick(tiny_folder, out, text, "--overwrite")) == 130
    assert os.listdir(out.parent) == ["out"]
    assert files_of(out) == before


# The environment


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
    text: Path,
    out: Path,
    recwarn: pytest.WarningsRecorder,
    capsys: Capture,
) -> None:
    assert run(*quick(tiny_folder, out, text, "--device", "cuda", "--json")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["target"]["device"] == "cuda"
    assert json.loads(captured.out)["target"]["dtype"] == "float16"
    assert captured.err == ""
    with pytest.raises(dash_onnx.DashError, match="exported for device 'cuda'"):
        dash_onnx.load(out)
    assert [str(warning.message) for warning in recwarn] == []  # they would go to stderr


# Interrupts: real processes, killed while layers are being written


def started(model: Path, out: Path, text: Path) -> subprocess.Popen[str]:
    code = "import sys; from dash_onnx.cli.export import main; sys.exit(main())"
    arguments = [model, out, *UNTRAINED, "--calibration", text, "--overwrite"]
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
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, tuple[Path, int, str]]:
    """By signal: the destination, the exit code and stderr of an export that it hit."""
    processes = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        out = tmp_path_factory.mktemp("hit") / "out"
        shutil.copytree(full_bundle, out)
        processes[number] = (out, started(tiny_folder, out, text))
    waiting, deadline = dict(processes), time.monotonic() + 60
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_export_leaves_the_previous_bundle_as_it_was(
    number: signal.Signals, interrupted: dict, full_bundle: Path
) -> None:
    out, code, _ = interrupted[number]
    assert code != 0
    assert files_of(out) == files_of(full_bundle)
    assert answer(out) == answer(full_bundle)


def test_ctrl_c_is_one_line_with_exit_code_130_and_leaves_no_temporary_folder(
    interrupted: dict,
) -> None:
    out, code, errors = interrupted[signal.SIGINT]
    assert code == 130
    assert errors.strip() == "dash-export: interrupted"
    assert os.listdir(out.parent) == ["out"]


def test_a_terminated_export_leaves_no_temporary_folder(interrupted: dict) -> None:
    out, _, errors = interrupted[signal.SIGTERM]
    assert "Traceback" not in errors
    assert os.listdir(out.parent) == ["out"]


def test_the_next_export_works_beside_what_a_killed_one_left(
    interrupted: dict, tiny_folder: Path, text: Path, capsys: Capture
) -> None:
    out, _, _ = interrupted[signal.SIGKILL]
    assert run(*quick(tiny_folder, out, text, "--overwrite", "--max-length", 55)) == 0
    assert dash_onnx.load(out).manifest.model.max_length == 55
