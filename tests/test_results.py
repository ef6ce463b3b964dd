"""docs/results.md: it is what the committed measurements give."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scored_bundle import with_scorer

from dash_onnx.bench.measure import dominated, is_preset
from dash_onnx.core.budget import PRESETS

FOLDER = Path(__file__).parent.parent / "benchmarks"

AT_CONTEXT = {"prefill_tokens_per_s": 900.0, "tokens_per_s": 170.0}
KL = {"cost": 0.3, "kl": 0.1234, "kl_stderr": 0.01, "top1": 0.8}
SPEED = {
    "tokens_per_s": 200.0, "decode_ms": [4.0, 5.0, 6.0], "ttft_ms": [40.0], "kl": 0.0123,
    "kl_stderr": 0.001, "peak_rss_bytes": 5e8, "load_s": 1.0,
    "contexts": {
        "512": {"prefill_tokens_per_s": 1024.0, "tokens_per_s": 190.0},
        "1000": AT_CONTEXT,
        "3500": {**AT_CONTEXT, "peak_rss_bytes": 7.89e8},
    },
}  # fmt: skip
SCORES = {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.02, "sample_len": 100}}
ANSWERS = {"name": "fast", "length": 80.0, "length_stderr": 2.0, "ended": 0.3}
BENCH = {
    "contenders": [
        {**SPEED, "name": "dash int4", "tokens_per_s": 130.0},
        {**SPEED, "name": "genai peers/int4", "tokens_per_s": 100.0},
    ]
}
DRAFTS = {
    "target": "int8", "kind": "editing", "ms_per_token": 12.34, "accepted": 0.6, "prompts": 6,
    "differs": [],
}  # fmt: skip
MEAN = {"target": "int8", "kind": "Spec-Bench, geometric mean"}
DRAWN = {"target": "int8", "kind": "all", "nats_error": 0.02}
FIRST = {"precision": "int8", "chats": 20, "kl": 0.002, "kl_stderr": 0.0, "kl_max": 0.01}
SCALE = {"export_s": 300.0, "export_gb": 4.0, "bundle_gb": 1.6, "pass_s": 12.0}
PRINTED: dict[str, list[tuple[str, Any]]] = {
    "speed": [
        (
            "dash-bench out --json",
            {
                "read_gb_per_s": 34.0,
                "contenders": [
                    {**SPEED, "name": "dash dash@fast"},
                    {
                        **SPEED,
                        "name": "genai peers/int4",
                        "kl": None,
                        "contexts": {"1000": AT_CONTEXT},
                    },
                ],
            },
        )
    ],
    "memory": [("dash-bench out --memory low --json", BENCH)],
    "other_memory": [
        ("dash-bench out --json", BENCH),
        ("dash-bench out --memory low --json", {"contenders": [{**SPEED, "name": "dash int8"}]}),
    ],
    "quality": [
        (
            "python benchmarks/policies.py out --text a.txt",
            {
                "text": "a.txt",
                "rows": [
                    {**KL, "name": "int8", "policy": "int8"},
                    {**KL, "name": "fast", "policy": "dash"},
                    {**KL, "name": "fast", "policy": "static", "kl": 0.4321},
                ],
            },
        )
    ],
    "tasks": [(f"dash-eval out --budget {name}", {"results": SCORES}) for name in ("fast", "0.3")],
    "other_tasks": [("dash-eval other --policy int4", {"results": SCORES})],
    "answers": [
        ("python benchmarks/answers.py", [{**ANSWERS, "repeated": 0.1, "repeated_stderr": 0.02}])
    ],
    "drafts": [
        (
            "python benchmarks/speculate.py out --json",
            {
                "model": "m",
                "rows": [
                    {**DRAFTS, "speculate": "off", "ratio": 1.0, "accepted": None},
                    {**DRAFTS, "speculate": "on", "ratio": 1.7, "differs": [{"gap": 0.031}]},
                    {**DRAFTS, "speculate": "GenAI", "ms_per_token": 20.0},
                    {**DRAFTS, "speculate": "GenAI + ngram", "ms_per_token": 16.0},
                ],
                "means": [
                    {**MEAN, "speculate": "off", "ratio": 1.0},
                    {**MEAN, "speculate": "on", "ratio": 1.456},
                ],
            },
        ),
    ],
    "drawn": [
        (
            "python benchmarks/speculate.py out --temperature 1 --json",
            {
                "model": "m",
                "rows": [
                    {**DRAWN, "speculate": "off", "ratio": 1.0, "nats": 0.812},
                    {**DRAWN, "speculate": "on", "ratio": 1.2, "nats": 0.799},
                ],
            },
        ),
        (
            "python benchmarks/speculate.py out --parallel 4 --json",
            [{"target": "int8", "kind": "qa", "off": 91.2, "on": 123.4, "ratio": 1.353}],
        ),
    ],
    "server": [
        (
            "python benchmarks/serve.py out --json",
            {
                "dash-serve": {
                    "tokens_per_s": {"1": 70.0, "8": 180.4},
                    "between_ms": {
                        "1": {"p50": 13.0, "p99": 20.0},
                        "8": {"p50": 41.0, "p99": 77.0},
                    },
                    "while_long_prompts_arrive": {"p50": 45.0, "p99": 68.4},
                },
                "dash-run --batch": {"tokens_per_s": {"1": 71.0, "8": 181.4}},
            },
        )
    ],
    "other": [
        ("dash-export m.gguf full", None),
        ("dash-export m.gguf out --json", {"export": {"seconds": 100.0, "peak_rss_bytes": 2e9}}),
        (
            "python benchmarks/prompt_forms.py --reference full out",
            [
                {**FIRST, "other_first_token": 1},
                {**FIRST, "other_first_token": 3, "precision": "default"},
            ],
        ),
        ("dash-bench out --peer genai:peers/int4", BENCH),
        ("dash-bench out --peer genai:peers/int4 --prompts lines.txt", BENCH),
    ],
    "scale": [
        (
            "python benchmarks/scale.py models --json",
            [
                {
                    "shape": "1b",
                    "measured": [{**SCALE, "layers": n, "pass_gb": 2.3} for n in (2, 4)],
                    **(SCALE | {"layers": 16, "export_s": 900.0}),
                }
            ],
        )
    ],
    "shapes": [
        ("python benchmarks/big.py model --shape lfm2-1.2b --layers 16 --gguf q4_0.gguf", None),
        ("dash-export model out --json", {"export": {"seconds": 95.0, "peak_rss_bytes": 2e9}}),
        ("dash-bench out --peer genai:lfm2-1.2b/int4 --json", BENCH),
        ("rm -r lfm2-1.2b", None),
        ("python benchmarks/big.py model --shape qwen3.5-0.8b --layers 24", None),
        ("dash-export model out --json", {"export": {"seconds": 95.0, "peak_rss_bytes": 2e9}}),
        ("dash-bench out --json", {"contenders": [{**SPEED, "name": "dash int4"}]}),
    ],
}

DOMINATED = {
    # By a hair: 0.949 times as fast, 0.0107 nats more with a standard error of 0.0106.
    ("speed", 0, "dash @balanced"): "genai fused/dash",
}
"""By part, number of its table and preset: the row that dominates it, each with the reason why that
is accepted."""

WITH_PRESETS = {
    "speed": 1,
    "memory": 1,
    "other": 2,
    "amx/other": 1,
    "vnni/speed": 1,
    "vnni/memory": 1,
    "vnni/other": 1,
}
"""By part, how many of its tables have presets with their loss."""


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import results

    return results


@pytest.fixture
def parts() -> dict[str, Any]:
    same = {
        "commit": "abc",
        "date": "2026-01-01",
        "machine": "one",
        "versions": {"numpy": "2.4"},
        "bundle": "def",
    }
    return {
        name: {
            **same,
            "files": {"a.txt": {"bytes": 1000, "sha256": "0123"}},
            "commands": [{"command": c, "seconds": 130.0, "found": f} for c, f in commands],
        }
        for name, commands in PRINTED.items()
    }


def test_the_page_and_the_readme_are_what_the_measurements_give() -> None:
    subprocess.run([sys.executable, FOLDER / "results.py", "--check"], check=True)


def test_llama_cpp_stands_beside_genai_where_it_was_measured(
    results: Any, parts: dict[str, Any]
) -> None:
    without, parts = results.page(parts), copy.deepcopy(parts)
    command = parts["drafts"]["commands"][0]
    command["command"] += " --llama-cpp q4_0.gguf"
    for name, ms in (("llama.cpp", 10.0), ("llama.cpp + lookup", 8.0)):
        command["found"]["rows"] += [{**DRAFTS, "speculate": name, "ms_per_token": ms}]
    page = results.page(parts)
    assert "| editing | 50 | 62 | 100 | 125 | 81 | 81 | 1.30 |" in page.splitlines()
    assert "llama.cpp runs Q4_0" in page and "llama.cpp runs Q4_0" not in without
    parts["draft_peers"] = parts["drafts"]  # where they were measured apart
    apart = results.page(parts)
    assert apart.count(command["command"]) == page.count(command["command"]) + 1


def test_no_preset_is_dominated_but_for_known_exceptions(results: Any) -> None:
    found, tables, recorded = {}, dict[str, int](), FOLDER / "results"
    for path in sorted(recorded.rglob("*.json")):
        name, part = str(path.relative_to(recorded).with_suffix("")), json.loads(path.read_text())
        for bench in results.tables.found(part):
            rows = results.tables.results(bench) if "contenders" in bench else []
            presets = {row.name.rpartition("@")[2] for row in filter(is_preset, rows) if row.kl}
            if not presets:
                continue
            assert presets == {*PRESETS}, path
            number = tables[name] = tables.get(name, 0) + 1
            for preset, other in dominated(rows):
                found[name, number - 1, preset.name] = other.name
    assert found == DOMINATED
    assert tables == WITH_PRESETS


def test_each_table_says_which_preset_is_dominated(results: Any, parts: dict[str, Any]) -> None:
    parts = copy.deepcopy(parts)
    rows = parts["speed"]["commands"][0]["found"]["contenders"]
    assert results.page(parts).count("No preset is dominated by another row.") == 1
    faster = {"decode_ms": [3.0, 4.0, 3.0], "kl": 0.0023}
    rows += [{**rows[0], **faster, "name": "genai fused/int4"}]
    told = (
        "Dominated: policy at `fast` by ORT GenAI, our fused graph of `int4` (0.750 times as fast, "
        "0.0100 nats more)."
    )
    lines = results.page(parts).splitlines()
    assert lines[lines.index(told) - 2].startswith("| ORT GenAI, our fused graph of `int4`")


def test_each_table_has_its_figures_and_commands(results: Any, parts: dict[str, Any]) -> None:
    page = results.page(parts)
    for row in (
        "| policy at `fast` | 200 (167-250) | 1.00 | 40 | 1024 | 170 | 170 | 0.0123 ± 0.0010 "
        "| 500 | 789 | 1.0 |",
        "| ORT GenAI, INT4 | 200 (167-250) | 1.00 | 40 | - | 170 | - | - | 500 | - | 1.0 |",
        "| every layer INT8 | 200 (167-250) | 1024 | 170 | 170 | 500 | 789 |",
        "| a.txt | policy at `fast` | 0.300 | 0.1234 ± 0.0100 | 80.0% | 0.4321 at 0.300 |  |  |  |",
        "| arc | acc | 100 | 50.0% ± 2.0% | 50.0% ± 2.0% |",
        "| policy at `fast` | 80.0 ± 2.0 | 30% | 10.0% ± 2.0% |",
        "| every layer INT4 | 1.30 | 130 (167-250) | 0.0123 ± 0.0010 | 500 |",
        "| int8 | 0.0020 | 0.0100 | 1 of 20 |",
        "| default of `int4`: wide where faster | 0.0020 | 0.0100 | 3 of 20 |",
        "| int8 | editing | 12.3 | 1.70 | - | 60% | 5 of 6 | 0.03 |",
        "| int8 | geometric mean of kinds |  | 1.70 |  |  |  |  |",
        "| int8 | Spec-Bench, geometric mean |  | 1.46 |  |  |  |  |",
        "| editing | 50 | 62 | 81 | 81 | 1.30 |",  # of ms, not of the ratios beside them
        "| on | 0.799 ± 0.020 | 1.20 |",
        "| qa | 91 | 123 | 1.35 |",
        "| dash-serve | 8 | 180 | 2.58 | 41, 77 |",
        "| dash-serve | 3, long prompts |  |  | 45, 68 |",
        "| 1b, 4 layers | 5.0 | 4.0 | 1.6 | 0.2 | 2.3 |",
        "| 1b, 16 layers | 15.0 | 4.0 | 1.6 | 0.2 | - |",
        *(
            f"{layers} layers. The graphs, calibrated on 2,000 tokens instead of the usual 8,000, "
            "were written in 2 min and 2.0 GB of memory."
            for layers in (16, 24)
        ),
    ):
        assert row in page.splitlines(), row
    for commands in PRINTED.values():
        for command, _ in commands:
            assert f"{command}   # 2 min" in page.splitlines()


@pytest.mark.parametrize("odd", ["memory", "tasks"])
@pytest.mark.parametrize("key", ["commit", "machine", "versions", "bundle"])
def test_parts_that_do_not_belong_together_are_refused(
    results: Any, parts: dict[str, Any], key: str, odd: str, tmp_path: Path
) -> None:
    parts = copy.deepcopy(parts)
    parts[odd][key] = {"numpy": "2.5"} if key == "versions" else "another"
    for name, part in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    with pytest.raises(SystemExit, match=f"differ in {key}"):
        results.read(tmp_path)


def test_a_part_with_a_model_of_its_own_may_be_measured_at_another_commit(
    results: Any, parts: dict[str, Any], tmp_path: Path
) -> None:
    parts = copy.deepcopy(parts)
    parts["other"].update(commit="another", bundle="", versions={"numpy": "2.5"})
    for name, part in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    page = results.page(results.read(tmp_path))
    assert "numpy 2.4, unless noted." in page and "unless noted" not in results.page({})
    assert page.count("Measured with numpy 2.5 at commit `another`") == 1
    assert f"Measured at commit `{parts['tasks']['commit']}`" in page


def test_each_phase_of_a_large_export_grows_with_what_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import scale

    few = {**SCALE, "layers": 2, "phases_s": {}}
    phases = {"layers": 100.0, "LM head": 40.0, "losses": 30.0}
    more = {**SCALE, "layers": 4, "export_s": 180.0, "bundle_gb": 1.8, "phases_s": phases}
    found = scale.extrapolated("1b", few, more)
    assert found["layers"] == 16 and found["bundle_gb"] == pytest.approx(1.8 + 12 * 0.1)
    # Layers take four times as long; the LM head and what has no phase, as long as before.
    losses = found["export_s"] - 4 * 100 - 40 - (180 - 170)
    assert 30 < losses < 4 * 30, "they run the LM head, too"
    assert found["pass_s"] / 12 == pytest.approx(losses / 30, rel=1e-3)
    found = scale.extrapolated("1b", few, {**more, "bundle_gb": 1.5})
    assert found["bundle_gb"] == 1.6, "nothing shrinks with more layers"


def test_another_machine_has_a_page_of_its_own(
    results: Any, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fast").mkdir()
    for name, folder, machine in (("tasks", "", "slow one"), ("server", "fast", "fast one")):
        part = {**parts[name], "machine": machine}
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(part))
    monkeypatch.setattr(sys, "argv", ["results.py", str(tmp_path)])
    results.main()
    page, other = ((tmp_path / f"results{end}.md").read_text() for end in ("", "-fast"))
    assert "slow one" in page and "fast one" not in page and "(results-fast.md)" in page
    assert "slow one" not in other and "fast one" in other and "# Results with FAST" in other


@pytest.mark.slow
def test_measuring_and_writing_go_together(
    tiny_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")))
    out = tmp_path / "results"
    words = [FOLDER / "measure.py", "bundle", "speed", "memory", "--quick", "--bundle", bundle]
    words += ["--model", tiny_folder, "--out", out]
    subprocess.run([sys.executable, *words], check=True)
    subprocess.run([sys.executable, FOLDER / "results.py", out], check=True)
    page = (out / "results.md").read_text("utf-8")
    assert "dash-info bundle --json" in page and "| preset `balanced` |" in page
    assert str(tmp_path) not in page
