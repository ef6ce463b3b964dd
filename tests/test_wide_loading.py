"""What the wide form takes of the memory, and what a prompt in it loses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_wide import LAYERS, PROMPT, wide_bundle, wide_layers, with_passes  # noqa: F401

import dash_onnx
from dash_onnx.cli import run
from dash_onnx.core.actions import WIDE, Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import head_path
from dash_onnx.exporters.architectures import REGISTRY
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.exporters.export.sizes import sizes_of
from dash_onnx.exporters.sources import open_source
from dash_onnx.runtime.model import Model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BATCH = ["the", "a", "ship"] * 3


@pytest.mark.parametrize("prefill", [None, "int8"])
def test_a_batch_loads_nothing_more_once_its_policy_is_preloaded(
    wide_bundle: Path,  # noqa: F811
    prefill: Action | None,
) -> None:
    options = dash_onnx.GenerationOptions(policy="int4", prefill=prefill, max_new_tokens=9)
    with dash_onnx.load(wide_bundle, policy="int4") as model:
        expected = model.bytes_to_load()
        model.preload("int4", prefill=prefill)
        loaded = model.loaded
        assert head_path(WIDE) in loaded and wide_layers(model) == LAYERS
        assert model.bytes_to_load() == 0
        assert prefill is not None or model.loaded_bytes == expected
        model.batch(BATCH, parallel=9, options=options)
        assert model.loaded == loaded


def test_the_wide_head_may_wait_for_the_first_batch(wide_bundle: Path) -> None:  # noqa: F811
    options = dash_onnx.GenerationOptions(policy="int4", max_new_tokens=9, speculate=False)
    with dash_onnx.load(wide_bundle, policy="int4") as model:
        model.preload("int4", batches=False)
        loaded = model.loaded
        assert head_path(WIDE) not in loaded and wide_layers(model) == LAYERS
        model.generate("the ship", options=options)
        assert model.loaded == loaded and model.bytes_to_load() > 0  # it is counted beforehand
        model.batch(BATCH, parallel=9, options=options)
        assert model.loaded == {*loaded, head_path(WIDE)} and model.bytes_to_load() == 0


def test_the_drafts_of_one_answer_do_without_a_wide_head_that_is_not_loaded(
    wide_bundle: Path,  # noqa: F811
) -> None:
    with dash_onnx.load(wide_bundle, policy="int4") as model:
        model.preload("int4", batches=False)
        loaded, own, forms = model.loaded, model.manifest.heads["int4"], []
        for wide in (False, True):
            drafts = model.new_sequence()
            drafts.advance(12)
            drafts.embed(np.zeros(12, np.int64))
            drafts.head(own, every=True)
            forms += drafts._passes[12].heads
            assert wide or model.loaded == loaded
            model.preload("int4")
        assert forms == [own, WIDE]


def test_a_question_whose_answer_may_repeat_it_loads_the_wide_head(
    wide_bundle: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(Model, "preload", lambda *_, batches, **__: seen.append(batches))
    (tmp_path / "old.txt").write_text("the ship")
    for words in (["hi"], ["hi " * 400], ["hi", "--expected", str(tmp_path / "old.txt")]):
        run.main([str(wide_bundle), *words, "--policy", "int4", "--max-tokens", "1"])
    assert seen == [False, True, True]


@pytest.mark.parametrize(
    ("policy", "memory"), [("int4", "low"), ("int8", "high"), ("full", "high"), (None, "low")]
)
def test_what_never_runs_wide_loads_no_wide_head(
    wide_bundle: Path,  # noqa: F811
    policy: str | None,
    memory: dash_onnx.runtime.sessions.Memory,
) -> None:
    with dash_onnx.load(wide_bundle, memory=memory) as model:
        model.preload(policy)
        assert head_path(WIDE) not in model.loaded and wide_layers(model) == 0


def test_a_head_that_is_never_faster_wide_is_not_loaded(wide_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = Path(shutil.copytree(wide_bundle, tmp_path / "b"))
    passes = Bundle(folder).manifest.costs.passes
    assert passes is not None
    rows = (1.0, 2.0)
    with_passes(folder, heads_ms={**dict.fromkeys(passes.heads_ms, rows), WIDE: (2.0, 3.0)})
    with dash_onnx.load(folder) as model:
        model.preload("int4")
        assert head_path(WIDE) not in model.loaded and wide_layers(model) == LAYERS


def test_every_graph_means_every_graph(wide_bundle: Path) -> None:  # noqa: F811
    with dash_onnx.load(wide_bundle) as model:
        model.preload()
        graphs = {path for path in model.manifest.files if path.endswith(".onnx")}
        assert model.loaded == graphs


def test_memory_to_run_counts_the_wide_head(tiny_folder: Path) -> None:
    source = open_source(str(tiny_folder), REGISTRY, False, None)
    without, sizes = (sizes_of(source, ExportOptions(wide=wide)) for wide in (False, True))
    wide = sizes.layers[WIDE] + sizes.heads[WIDE]
    for policy in ("int4", "policy"):
        assert sizes.run[policy] == without.run[policy] + wide, policy
    assert sizes.run["int8"] == without.run["int8"]


def test_the_first_token_is_measured_as_a_prompt_runs_by_default(
    wide_bundle: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import prompt_forms

    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\nthe ships {PROMPT}\n")
    words = [wide_bundle, "--reference", wide_bundle, "--prompts", tmp_path / "prompts.txt"]
    monkeypatch.setattr(sys, "argv", ["prompt_forms.py", *map(str, words), "--json"])
    prompt_forms.main()
    rows = json.loads(capsys.readouterr().out)
    kl = {row["precision"]: row["kl"] for row in rows}
    assert [*kl] == ["full", "int8", "int4", "default"]
    assert kl["full"] == 0 < kl["default"] < kl["int4"]
