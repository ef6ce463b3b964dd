"""The wide form: what stands in for INT4 where a pass has many rows."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_biased
from scored_bundle import with_scorer
from test_fused import TOOL as FUSE
from test_fused import Client

import dash_onnx
from dash_onnx.core.actions import WIDE, Form
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import head_path, layer_path
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.facts import PassCosts
from dash_onnx.core.forms import form_of, head_form_of, widened_in_prompts
from dash_onnx.core.manifest import MANIFEST_NAME, Manifest
from dash_onnx.core.policy import make_policy
from dash_onnx.exporters.graphs.wide import quantize_columns
from dash_onnx.runtime import passes as runtime_passes
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.ort import create_session

LAYERS = 4
WIDENED = frozenset({"int4", "int2"})
PROMPT = "the keeper counts the ships that pass in the night " * 4

# Milliseconds of one layer (896 wide, MLP of 4,864) on an Intel Xeon with AMX, measured.
AMX = PassCosts(
    rows=(1, 4, 8, 16, 64, 512),
    contexts=(0,),
    layers_ms={
        "int8": ((0.563, 0.955, 1.536, 2.551, 9.499, 74.764),),
        "int4": ((0.326, 0.729, 1.334, 2.551, 8.854, 76.503),),
        "wide": ((0.859, 0.969, 1.067, 1.207, 3.447, 27.207),),
    },
    plain_rows=(),
    plain_ms=(),
    head_rows=(1, 16),
    heads_ms={"int4": (2.0, 9.0), "wide": (4.0, 5.0)},
)
# Invented: an ARM processor whose kernel of blocks is the faster one up to some 200 rows.
ARM = dataclasses.replace(
    AMX,
    layers_ms={
        "int8": ((0.6, 0.9, 1.2, 2.0, 7.0, 56.0),),
        "int4": ((0.4, 0.7, 1.0, 1.8, 6.0, 48.0),),
        "wide": ((1.0, 1.8, 2.6, 4.4, 9.0, 30.0),),
    },
    heads_ms={"int4": (2.0, 9.0), "wide": (6.0, 20.0)},
)


def with_passes(folder: Path, **changes: Any) -> Path:
    """Changes what the profile says of passes."""
    manifest = Bundle(folder).manifest
    assert manifest.costs.passes is not None
    passes = dataclasses.replace(manifest.costs.passes, **changes)
    costs = dataclasses.replace(manifest.costs, passes=passes)
    changed = dataclasses.replace(manifest, costs=costs)
    (folder / MANIFEST_NAME).write_text(changed.to_text(), "utf-8")
    return folder


def faster_when_wide(folder: Path, rows: int = 8) -> Path:
    """Lets the profile say that the wide form is the faster one from some rows on."""
    manifest = Bundle(folder).manifest
    assert manifest.costs.passes is not None
    forms: list[Form] = [*manifest.costs.passes.layers_ms]
    heads: list[Form] = [*manifest.costs.passes.heads_ms]
    most = 2 * rows - 1
    slope = 1 / (rows - 1.5)  # so that both cost 2 ms just below that many rows
    line = {
        form: (2.0, 2.0) if form == WIDE else (1.0, 1.0 + slope * (most - 1))
        for form in forms + heads
    }
    return with_passes(
        folder,
        rows=(1, most),
        contexts=(0,),
        layers_ms={form: (line[form],) for form in forms},
        plain_rows=(),
        plain_ms=(),
        head_rows=(1, most),
        heads_ms={form: line[form] for form in heads},
    )


@pytest.fixture(scope="module")
def wide_bundle(
    tiny_folder: Path,
    night: Path,
    export_tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny model with a wide form, which is the faster one from eight rows on. Read-only."""
    exported = export_tiny(tiny_folder, calibration=(night,), wide=True)
    folder = tmp_path_factory.mktemp("wide") / "bundle"
    return faster_when_wide(Path(shutil.copytree(exported, folder)))


@pytest.fixture
def model(wide_bundle: Path) -> Iterator[Model]:
    with dash_onnx.load(wide_bundle) as model:
        yield model


def wide_layers(model: Model) -> int:
    return sum(path.endswith("/wide.onnx") for path in model.loaded if path.startswith("layers/"))


def test_each_output_feature_has_a_scale_of_its_own_and_zeros_stay_zeros() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weight[1] *= 1000
    weight[3] = 0
    values, scales = quantize_columns(weight)
    assert values.shape == (64, 5) and values.dtype == np.int8
    assert np.abs(values).max() == 127 and not values[:, 3].any()
    error = np.abs((values * scales).T - weight.numpy())
    assert (error <= scales[:, None] / 2 * (1 + 1e-5)).all()


def test_the_wide_form_loses_little_and_the_manifest_says_how_much(wide_bundle: Path) -> None:
    manifest = Bundle(wide_bundle).manifest
    assert manifest.wide is not None and manifest.wide.tokens > 100
    assert 0 < manifest.wide.kl < 0.01
    for layer in manifest.layers:
        assert 0 < layer.relative_error[WIDE] < layer.relative_error["int4"] / 2
        assert layer.bytes[WIDE] > layer.bytes["int4"]


def test_a_row_depends_on_none_of_those_it_shares_a_pass_with(wide_bundle: Path) -> None:
    head = create_session(wide_bundle / head_path(WIDE), "cpu")
    size = Bundle(wide_bundle).manifest.model.hidden_size
    rows = np.random.default_rng(0).standard_normal((1, 16, size)).astype(np.float32)
    rows[0, 3] *= 100  # by the final norm no outlier, but not without it
    together = head.run(["logits"], {"hidden": rows})[0][0]
    alone = [head.run(["logits"], {"hidden": row[None, None]})[0][0, 0] for row in rows[0]]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_row_of_zeros_stays_finite(wide_bundle: Path) -> None:
    head = create_session(wide_bundle / head_path(WIDE), "cpu")
    size = Bundle(wide_bundle).manifest.model.hidden_size
    logits = head.run(["logits"], {"hidden": np.zeros((1, 4, size), np.float32)})[0]
    assert np.isfinite(logits).all() and not logits.any()


@pytest.mark.parametrize(
    ("passes", "rows", "layer", "head"),
    [
        (AMX, 1, "int4", "int4"),  # one row is what was measured for the policy
        (AMX, 4, "int4", "int4"),
        (AMX, 8, "wide", "wide"),
        (AMX, 512, "wide", "wide"),
        (AMX, 2000, "wide", "wide"),
        (ARM, 8, "int4", "int4"),
        (ARM, 64, "int4", "int4"),
        (ARM, 512, "wide", "int4"),
        (None, 512, "int4", "int4"),
    ],
)
def test_the_cheapest_form_runs_on_each_machine(
    passes: PassCosts | None, rows: int, layer: Form, head: Form
) -> None:
    assert form_of(passes, "int4", rows, 0, WIDENED) == layer
    assert head_form_of(passes, "int4", rows, WIDENED) == head
    assert form_of(passes, "int8", rows, 0, WIDENED) == "int8"  # which loses less
    assert form_of(passes, "skip", rows, 0, WIDENED) == "skip"


def test_the_context_counts_where_the_forms_attend_differently() -> None:
    both = {"int4": ((1.0, 5.0), (2.0, 6.0)), "wide": ((2.0, 4.0), (9.0, 9.0))}
    passes = dataclasses.replace(AMX, rows=(1, 8), contexts=(0, 1000), layers_ms=both)
    assert [form_of(passes, "int4", 8, context, WIDENED) for context in (0, 200, 1000)] == [
        "wide",
        "wide",
        "int4",
    ]
    assert passes.layer_ms("wide", 8, 500) == pytest.approx(6.5)


def test_a_context_beyond_the_last_measured_one_changes_no_form() -> None:
    each = {"int4": (93.0, 130.0, 213.0), "wide": (73.0, 110.0, 204.0)}  # invented
    layers = {form: tuple((ms / 512, ms) for ms in found) for form, found in each.items()}
    passes = dataclasses.replace(AMX, rows=(1, 512), contexts=(0, 1000, 3500), layers_ms=layers)
    assert passes.layer_ms("int4", 512, 8192) < passes.layer_ms("wide", 512, 8192)
    for context in (0, 1000, 3500, 8192, 1 << 17):
        assert form_of(passes, "int4", 512, context, WIDENED) == "wide"


def test_each_part_of_a_prompt_runs_in_the_form_for_the_tokens_before_it(
    wide_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(wide_bundle, tmp_path / "b"))
    passes = Bundle(folder).manifest.costs.passes
    assert passes is not None
    slow: dict[Form, Any] = {form: ((9.0, 9.0), (9.0, 9.0)) for form in passes.layers_ms}
    layers = {**slow, "int4": ((1.0, 2.0), (1.0, 2.0)), "wide": ((2.0, 1.0), (2.0, 3.0))}
    with_passes(folder, rows=(1, 64), contexts=(0, 100), layers_ms=layers)
    monkeypatch.setattr(runtime_passes, "CAPACITY", 64)
    decider, found = FixedPath(("int4",) * LAYERS, "int4"), []
    with dash_onnx.load(folder) as model:
        sequence = model.new_sequence()
        sequence.reserve(192)
        for part in np.split(np.arange(192, dtype=np.int64), 3):
            before = model.loaded
            sequence.layers(part, decider)
            found.append({PurePath(path).stem for path in model.loaded - before})
    assert found == [{"embed", "wide"}, {"int4"}, set()]


def test_a_long_prompt_runs_wide_and_a_short_one_as_the_policy_says(model: Model) -> None:
    model.generate("the keeper", policy="int4", max_new_tokens=3, ignore_eos=True)
    assert wide_layers(model) == 0
    model.generate(PROMPT, policy="int4", max_new_tokens=3, ignore_eos=True)
    assert wide_layers(model) == LAYERS
    assert layer_path(0, "int8") not in model.loaded


@pytest.mark.parametrize("policy", ["int8", "full"])
def test_a_policy_without_few_bits_runs_no_prompt_wide(model: Model, policy: str) -> None:
    model.generate(PROMPT, policy=policy, max_new_tokens=3, ignore_eos=True)
    assert wide_layers(model) == 0


def test_a_prompt_of_high_precision_runs_wide_where_that_is_asked_for(model: Model) -> None:
    model.generate(PROMPT, policy="int8", prefill="wide", max_new_tokens=3, ignore_eos=True)
    assert wide_layers(model) == LAYERS


@pytest.mark.parametrize("forms", [(None, "wide"), ("wide", None), ("int8", "wide")])
def test_prompts_in_another_form_are_not_reused(
    forms: tuple[Form | None, Form | None], model: Model
) -> None:
    batch, ids = model.new_scheduler(1), model.text.encode(PROMPT)
    for form in forms:
        options = GenerationOptions(policy="int8", prefill=form, max_new_tokens=3, ignore_eos=True)
        batch.submit(model.request(ids, lambda piece: None, options))
        while batch.step():
            pass
    assert batch.reused == 0
    batch.submit(model.request(ids, lambda piece: None, options))
    while batch.step():
        pass
    assert batch.reused > 0


def test_little_memory_leaves_the_wide_form_out(wide_bundle: Path) -> None:
    with dash_onnx.load(wide_bundle, policy="int4", memory="low") as model:
        model.preload("")
        model.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
        model.batch([PROMPT] * 10, parallel=10)
        assert wide_layers(model) == 0
        with pytest.raises(PolicyError, match="leaves it out"):
            model.generate(PROMPT, prefill="wide")
        low = model.loaded_bytes
    with dash_onnx.load(wide_bundle, policy="int4") as model:
        assert model.bytes_to_load() > low
        model.preload("")
        assert wide_layers(model) == LAYERS
        assert model.loaded_bytes > low


def test_a_batch_runs_wide_from_the_rows_on_where_that_is_faster(wide_bundle: Path) -> None:
    prompts = ["the", "a", "ship"]
    options = dash_onnx.GenerationOptions(policy="int4", max_new_tokens=24, ignore_eos=True)
    with dash_onnx.load(wide_bundle) as model:
        model.batch(prompts, parallel=3, options=options)
        assert wide_layers(model) == 0
        many = model.batch(prompts * 3, parallel=9, options=options)
        assert wide_layers(model) == LAYERS
        assert [completion.generated_tokens for completion in many] == [24] * 9


def test_what_a_text_loses_at_a_precision_is_not_measured_wide(model: Model) -> None:
    ids = np.asarray(model.text.encode(PROMPT), np.int64)
    each = np.stack([s.logits.copy() for s in model.score(ids, policy="int4", prefill="int4")])
    together = model.logits(ids, policy="int4", prompt_tokens=1, prefill="int4")
    np.testing.assert_allclose(together[1:], each, atol=1e-3)
    assert wide_layers(model) == 0


@pytest.mark.parametrize(("loses", "wide"), [(9.0, False), (11.0, True)])
def test_a_policy_that_promises_little_more_than_the_form_loses_keeps_its_prompts(
    wide_bundle: Path, tmp_path: Path, loses: float, wide: bool
) -> None:
    manifest = Bundle(with_scorer(Path(shutil.copytree(wide_bundle, tmp_path / "b")))).manifest
    assert manifest.wide is not None and manifest.scorer is not None
    points = manifest.scorer.points
    kl = manifest.wide.kl * loses / manifest.scorer.margin
    scorer = dataclasses.replace(
        manifest.scorer, points=tuple(dataclasses.replace(point, kl=kl) for point in points)
    )
    changed = dataclasses.replace(manifest, scorer=scorer)
    widened = widened_in_prompts(changed, make_policy("dash", changed, points[0].budget))
    assert ("int8" in widened) == wide
    assert "int4" in widened  # itself it loses more


def test_biases_and_heads_of_their_own_widths_are_kept(
    tmp_path: Path, night: Path, export_tiny: Callable[..., Path]
) -> None:
    folder = export_tiny(save_biased(tmp_path / "biased"), calibration=(night,), wide=True)
    manifest = Bundle(folder).manifest
    assert manifest.wide is not None and manifest.wide.kl < 0.01


def test_a_bundle_without_the_form_is_as_before(tiny_bundle: Path) -> None:
    manifest = Bundle(tiny_bundle).manifest
    assert manifest.wide is None
    assert manifest.costs.passes is None or WIDE not in manifest.costs.passes.layers_ms
    with dash_onnx.load(tiny_bundle, policy="int4") as model:
        model.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
        assert wide_layers(model) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["wide"].update(kl=-1.0), "wide has a KL below 0"),
        (lambda data: data["costs"].update(passes=None), "costs.passes must list the wide form"),
        (
            lambda data: data["costs"]["passes"]["layers_ms"].pop("int4"),
            "costs.passes must list every precision",
        ),
        (
            lambda data: data["costs"]["passes"]["layers_ms"].update(int4=[]),
            "costs.passes must have a time for each number of rows and each context",
        ),
        (
            lambda data: data["costs"]["passes"].update(rows=[8, 1]),
            "costs.passes must name rows and contexts, ascending",
        ),
        (lambda data: data["files"].pop("layers/01/wide.onnx"), "files lacks layers/01/wide.onnx"),
    ],
)
def test_a_damaged_manifest_is_refused(
    wide_bundle: Path, change: Callable[[dict], object], message: str
) -> None:
    data = json.loads((wide_bundle / MANIFEST_NAME).read_text("utf-8"))
    change(data)
    with pytest.raises(dash_onnx.DashError, match=message):
        Manifest.from_text(json.dumps(data))


def test_prompts_of_a_fused_graph_run_wide_where_that_is_asked_for(
    wide_bundle: Path, tmp_path: Path
) -> None:
    arguments = ("--policy", "int4", "--prefill", "wide")
    assert FUSE.run(wide_bundle, tmp_path / "graph", *arguments) == 0
    prompt, path = list(range(40, 60)), ("int4",) * LAYERS
    with dash_onnx.load(wide_bundle) as model:
        client, sequence = Client(tmp_path / "graph", model.manifest), model.new_sequence()
        head = model.policy("int4").head
        wide = sequence.prefill(np.array(prompt), path, head, WIDENED)
        np.testing.assert_allclose(client(prompt)[0][-1], wide, atol=1e-3)
        for token in (100, 101, 102):
            ours = sequence.forward(token, FixedPath(path, head))[0]
            np.testing.assert_allclose(client([token])[0][-1], ours, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--policy", "int8", "--prefill", "wide"), "only with int4 or int2 layers"),
        (("--policy", "int4", "--prefill", "int8"), "takes no prefill"),
    ],
)
def test_a_fused_graph_without_a_use_for_it_has_no_wide_form(
    wide_bundle: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    why: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert why in FUSE.refused(capsys, wide_bundle, tmp_path / "graph", *arguments)


def test_a_bundle_without_the_form_fuses_none(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--policy", "int4", "--prefill", "wide")
    assert "no wide form" in FUSE.refused(capsys, tiny_bundle, tmp_path / "graph", *arguments)


def test_the_prompt_of_one_path_runs_wide_where_that_loses_less_than_the_path(
    wide_bundle: Path,
) -> None:
    manifest = Bundle(wide_bundle).manifest
    assert manifest.wide is not None
    policy = make_policy("static:int8,int4,int4,int8", manifest)
    for factor, all_wide in ((2.0, True), (0.5, False)):
        policy.kl = factor * manifest.wide.kl
        assert ("int8" in widened_in_prompts(manifest, policy)) == all_wide


def test_the_prompt_of_a_path_whose_loss_is_unknown_runs_wide_only_in_layers_of_few_bits(
    wide_bundle: Path,
) -> None:
    manifest = Bundle(wide_bundle).manifest
    few = widened_in_prompts(manifest, make_policy("static:int8,int4,int4,int8", manifest))
    assert "int4" in few and "int8" not in few
    assert "int8" in widened_in_prompts(manifest, make_policy("int4", manifest))  # with any head


def test_the_best_static_path_keeps_its_loss(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path / "out")))
    manifest = Bundle(folder).manifest
    assert manifest.scorer is not None
    policy = make_policy("static", manifest, 0.95)
    assert policy.kl in [point.kl for point in manifest.scorer.static]
