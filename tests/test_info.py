"""`dash-info`: sizes from the config, against what an export writes."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tool import Capture, Tool
from conftest import save_tiny
from scored_bundle import with_scorer

from dash_onnx.cli.info import main
from dash_onnx.cli.plans import plans_table
from dash_onnx.core.budget import shown as shown_budget
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import EMBED_PATH, data_name, head_path
from dash_onnx.core.facts import StaticPoint
from dash_onnx.core.manifest import MANIFEST_NAME
from dash_onnx.core.plans import frontier, preset_plans
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.exporters.export.sizes import sizes_of
from dash_onnx.exporters.sources import open_source

TOOL = Tool("dash-info", main)
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "vocab_size": 1024}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that weights outweigh the nodes of its graphs, with biases."""
    folder = tmp_path_factory.mktemp("source") / "wide"
    return save_tiny(folder, attention_bias=True, tie_word_embeddings=True, **WIDE)


def written(bundle: Path, path: str) -> int:
    files = Bundle(bundle).manifest.files
    return sum(files[name].bytes for name in (path, data_name(path)) if name in files)


def estimated(folder: Path, **options: Any) -> dict[str, Any]:
    """What an export with these options would write and need."""
    source = open_source(str(folder), REGISTRY, False, None)
    found = dataclasses.asdict(sizes_of(source, ExportOptions(**options)))
    return json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("device", "variants", "large_head"),
    [  # each pair of values once
        ("cpu", "full,int8,int4", 1 << 26),
        ("cpu", "int8", 0),
        ("cuda", "full,int8,int4", 0),
        ("cuda", "int8", 1 << 26),
    ],
)
def test_sizes_are_those_of_the_export(
    device: str,
    variants: str,
    large_head: int,
    monkeypatch: pytest.MonkeyPatch,
    wide: Path,
    night: Path,
    export_tiny: Callable[..., Path],
    capsys: Capture,
) -> None:
    monkeypatch.setattr("dash_onnx.exporters.export.options._LARGE_HEAD", large_head)
    options: dict[str, Any] = {"device": device, "variants": tuple(variants.split(","))}
    options["wide"] = False
    bundle = export_tiny(wide, calibration=(night,), **options)
    estimates = estimated(wide, **options)
    found = TOOL.json_of(capsys, wide, "--variants", variants)
    assert device != "cpu" or found["estimates"] == estimates
    manifest = Bundle(bundle).manifest
    for action in manifest.actions:
        layers = sum(layer.bytes[action] for layer in manifest.layers)
        assert estimates["layers"][action] == pytest.approx(layers, rel=0.01), action
    for head in manifest.exported_heads:
        size = written(bundle, head_path(head))
        assert estimates["heads"][head] == pytest.approx(size, rel=0.01), head
    assert estimates["embedding"] == pytest.approx(written(bundle, EMBED_PATH), rel=0.01)
    graphs = sum(f.bytes for name, f in manifest.files.items() if ".onnx" in name)
    assert estimates["bundle"] == pytest.approx(graphs, rel=0.01)
    assert found["model"]["num_layers"] == 2
    assert found["model"]["max_length"] == manifest.model.max_length


def test_parameters_of_a_tied_embedding_count_once(wide: Path, capsys: Capture) -> None:
    from transformers import LlamaForCausalLM

    count = LlamaForCausalLM.from_pretrained(wide).num_parameters()
    capsys.readouterr()  # transformers may show a bar, which is not the tool's
    assert TOOL.json_of(capsys, wide)["estimates"]["parameters"] == count


def test_memory_to_run_counts_full_weights_as_fp32_on_a_cpu_only(
    wide: Path,
) -> None:
    cpu, cuda = (
        estimated(wide, variants=("full", "int8"), device=device) for device in ("cpu", "cuda")
    )

    def weights(estimates: dict[str, Any]) -> int:
        return int(estimates["layers"]["full"] + estimates["heads"]["full"])

    process = cuda["run"]["full"] - weights(cuda)
    assert cpu["run"]["full"] == process + 2 * weights(cpu)
    assert process > 0
    assert cpu["kv_per_token"] == 2 * 2 * 2 * 64 * 4 == 2 * cuda["kv_per_token"]


@pytest.mark.parametrize(("kind", "bytes_each"), [("int8", 1), ("int4", 0.5)])
def test_a_quantized_cache_is_counted(kind: str, bytes_each: float, wide: Path) -> None:
    estimates = estimated(wide, kv_cache=kind)
    assert estimates["kv_per_token"] == pytest.approx(2 * 2 * 2 * 64 * bytes_each, rel=0.1)


def test_a_model_is_shown_without_reading_its_weights(wide: Path, capsys: Capture) -> None:
    path = wide / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    try:
        path.write_bytes(
            whole[:header] + b"\xff" * (len(whole) - header)
        )  # not a number among them
        assert TOOL.run(wide) == 0
    finally:
        path.write_bytes(whole)
    shown = capsys.readouterr().out
    assert "folder:wide: llama, 0.00" in shown
    assert "2 layers, 256 wide (768 inside)" in shown
    assert "memory to export about" in shown
    assert [line.split()[0] for line in shown.splitlines() if "MB  " in line] == [
        "layers,",
        "LM",
        "memory",
    ]


def test_a_model_is_judged_for_this_machine(wide: Path, capsys: Capture) -> None:
    here = TOOL.json_of(capsys, wide)["here"]
    assert here["read_gb_per_s"] > 0 and here["export_s"] > 0 and here["training_s"] > 0
    assert here["free_disk_bytes"] > 0
    assert here["tokens_per_s"]["int4"] > here["tokens_per_s"]["int8"] > 0
    assert TOOL.run(wide) == 0
    shown = capsys.readouterr().out
    assert "time to export about" in shown and "GB/s; they are good to a factor of two" in shown


def test_a_policy_is_shown_with_its_text_and_margin(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = with_scorer(shutil.copytree(tiny_bundle, tmp_path / "scored"))
    manifest = Bundle(folder).manifest
    assert manifest.scorer is not None
    told = dataclasses.replace(manifest.scorer, margin=1.5)
    text = dataclasses.replace(manifest, scorer=told).to_text()
    (folder / MANIFEST_NAME).write_text(text, "utf-8")
    assert TOOL.run(folder) == 0
    shown = capsys.readouterr().out
    assert f"training on {told.training.tokens} tokens ({told.training.source})" in shown
    assert "up to 1.5 times as high on other text" in shown


def test_a_bundle_shows_its_figures(tiny_bundle: Path, capsys: Capture) -> None:
    found = TOOL.json_of(capsys, tiny_bundle)
    manifest = Bundle(tiny_bundle).manifest
    assert found["kind"] == "bundle"
    assert found["bytes"] == sum(facts.bytes for facts in manifest.files.values())
    assert found["calibration"]["sha256"] == manifest.calibration.sha256
    assert json.loads(json.dumps(found))["costs"]["machine"] == manifest.costs.machine
    assert TOOL.run(tiny_bundle) == 0
    shown = capsys.readouterr().out
    assert "no policy trained" in shown and "folder:tiny" in shown
    row = next(line for line in shown.splitlines() if line.startswith("layers, MB")).split()
    totals = [sum(layer.bytes[a] for layer in manifest.layers) for a in manifest.actions]
    assert row[2:] == [f"{total / 1e6:.1f}" for total in totals]


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
def test_the_measured_plans_are_shown_with_the_presets_that_run_them(
    trained: bool, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tiny_bundle
    if trained:
        folder = with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path / "scored")))
    manifest = Bundle(folder).manifest
    chosen = preset_plans(manifest)
    found = TOOL.json_of(capsys, folder)["plans"]
    shown = [{key: value for key, value in plan.items() if key != "presets"} for plan in found]
    assert shown == sorted(shown, key=lambda plan: float(plan["budget"]))
    for plan in (*frontier(manifest), *chosen.values()):
        assert json.loads(json.dumps(dataclasses.asdict(plan))) in shown
    for name, plan in chosen.items():
        (own,) = [one for one in found if name in one["presets"]]
        assert (own["budget"], own["kl"], own["head"]) == (plan.budget, plan.kl, plan.head)
    assert TOOL.run(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, plan in chosen.items():
        (row,) = [line for line in lines if name in line.split("  ")[0].split(", ")]
        shares = [f"{plan.time:.3f}", shown_budget(plan.budget)]
        cells = [*shares, f"{plan.kl:.4f}", plan.head, *plan.text.split()]
        assert row.split()[-len(cells) :] == cells
    assert ("decided per token" in "\n".join(lines)) == trained


def test_of_plans_that_lose_more_than_presets_may_the_slowest_is_shown(tiny_bundle: Path) -> None:
    manifest = Bundle(tiny_bundle).manifest
    losses = ((0.5, 2.0), (0.6, 1.0), (0.7, 0.1), (1.0, 0.05))
    manifest = dataclasses.replace(
        manifest,
        static=tuple(StaticPoint(b, "int4", kl, ("int4",) * 4) for b, kl in losses),
        calibration=dataclasses.replace(manifest.calibration, source="night.txt", sequences=32),
    )
    lines = plans_table(manifest)
    assert [line.split()[:-5] for line in lines[1:4]] == [[], ["balanced,", "fast"], ["quality"]]
    assert [line.split()[-4] for line in lines[1:4]] == ["0.600", "0.700", "1.000"]
    assert "within its KL limit (quality 0.02, balanced 0.1, fast 0.25 nats); " in lines[5]
    told = "quality: no plan is within its limit, so it runs the one with the lowest KL"
    assert lines[6] == told and lines[7].startswith("budget: ")


def test_what_is_neither_is_refused_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    assert "no config.json" in TOOL.refused(capsys, tmp_path)
    assert "PATH is empty" in TOOL.refused(capsys, "")
    assert "int8, int4" in TOOL.refused(capsys, tmp_path, "--variants", "int3")


@pytest.mark.parametrize("known", [True, False], ids=["a known tokenizer", "an unknown one"])
def test_no_code_of_a_folder_runs_whatever_the_terminal_answers(
    known: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_folder, folder)
    code = f"open({str(ran)!r}, 'w').close()\nclass Odd: pass\nclass OddConfig: pass\n"
    (folder / "odd.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"}
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    tokens = json.loads(path.read_text())
    tokens["auto_map"] = {"AutoTokenizer": ["odd.Odd", "odd.Odd"]}
    tokens["tokenizer_class"] = "OddTokenizer"
    path.write_text(json.dumps(tokens))
    if not known:  # so that only the code could tell
        (folder / "tokenizer.json").unlink()
    program = f"import sys; from {main.__module__} import main; sys.exit(main(sys.argv[1:]))"
    terminal, end = pty.openpty()
    os.write(terminal, b"y\ny\ny\n")
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), "--json"],
        stdin=end,
        capture_output=True,
        text=True,
        timeout=120,
    )
    os.close(terminal)
    os.close(end)
    assert not ran.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    if known:
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["model"]["num_layers"] == 4
    else:
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
