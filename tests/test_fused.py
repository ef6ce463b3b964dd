"""The fused graph: any ONNX Runtime client takes the decisions of our runtime."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cli_tool import Capture, Tool
from families import CASES, LAYERS, save_random
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.cli.fuse import main
from dash_onnx.core.actions import SKIP, Action
from dash_onnx.core.budget import PRESETS
from dash_onnx.core.bundle import Bundle, list_files, replace_manifest
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import ScoredPolicy
from dash_onnx.exporters.fused import (
    BUDGET,
    CLIENTS,
    DATA,
    FACTS,
    MODEL,
    PATH,
    FuseOptions,
    adapter,
    fuse,
)
from dash_onnx.exporters.fused.rewrite import names_read
from dash_onnx.exporters.fused.widen import widen
from dash_onnx.runtime.deciders import FixedPath, ScoredDecider
from dash_onnx.runtime.model import Model

TOOL = Tool("dash-fuse", main)
PROMPT = list(range(20, 33))
STATIC = "static:int8,int4,skip,int8"
PLAN = ("int8",) * 4, "int8"  # path and head of prompts


@pytest.fixture(scope="module", params=[(1, 2, 3), (2,)], ids=["every layer", "one point"])
def bundle(
    tiny_bundle: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """With one decision point the layers after it have a common branch."""
    folder = tmp_path_factory.mktemp("f") / "out"
    return with_scorer(Path(shutil.copytree(tiny_bundle, folder)), request.param)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return dash_onnx.load(bundle)


@pytest.fixture(scope="module", params=CLIENTS)
def client_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def fused(bundle: Path, client_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copied alone to another place: nothing else may be needed."""
    out = tmp_path_factory.mktemp("fused") / "graph"
    assert TOOL.run(bundle, out, "--for", client_name) == 0
    return Path(shutil.move(out, tmp_path_factory.mktemp("elsewhere") / "moved"))


class Client:
    """What optimum or transformers.js do: K/V that grow by concatenation."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.facts = json.loads((folder / FACTS).read_text())
        self.session = onnxruntime.InferenceSession(
            folder / MODEL, providers=["CPUExecutionProvider"]
        )
        facts = manifest.model
        empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_dim), np.float32)
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.names = [o.name for o in self.session.get_outputs()]
        self.past = {
            name.replace("present", "past_key_values"): empty
            for name in self.names
            if name.startswith("present")
        }
        self.length = 0

    def __call__(self, ids: list[int], **extra: np.ndarray) -> tuple[np.ndarray, list[str]]:
        positions = np.arange(self.length, self.length + len(ids))[None]
        self.length += len(ids)
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
        }
        if "position_ids" in self.inputs:
            feeds["position_ids"] = positions
        if BUDGET in self.inputs:
            feeds[BUDGET] = np.array([self.facts["budgets"]["default"]], np.float32)
        found = dict(
            zip(self.names, self.session.run(None, {**feeds, **self.past, **extra}), strict=True)
        )
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        path = found[PATH].tolist() if PATH in found else []
        return found["logits"][0], [self.facts["actions"][index] for index in path]


def multiplier_at(model: Model, budget: float) -> float:
    policy = model.policy("dash", budget)
    return float(policy.multiplier)  # type: ignore[attr-defined]


@pytest.mark.parametrize("budget", [None, 0.25, 0.35, 0.6])
def test_decisions_and_logits_are_those_of_the_runtime(
    fused: Path, model: Model, budget: float | None
) -> None:
    chosen = budget or model.manifest.scorer.presets["balanced"]  # type: ignore[union-attr]
    extra = {} if budget is None else {BUDGET: np.array([budget], np.float32)}
    client = Client(fused, model.manifest)
    sequence = model.new_sequence()
    ours = sequence.prefill(np.array(PROMPT), *PLAN)
    theirs, path = client(PROMPT, **extra)
    np.testing.assert_allclose(theirs[-1], ours, atol=2e-4)
    assert set(path) == {"int8"}
    paths = set()
    for token in range(100, 140):
        ours, decided = sequence.forward(
            token, ScoredDecider(sequence, "int8", multiplier_at(model, chosen))
        )
        theirs, path = client([token], **extra)
        assert path == list(decided)
        np.testing.assert_allclose(theirs[-1], ours, atol=2e-4)
        paths.add(tuple(path))
    assert len(paths) > 1 or budget not in (0.35, 0.6)


@pytest.mark.parametrize("budget", [0.3, 0.4, 0.6])
def test_rows_of_other_heads_and_unused_actions_decide_as_the_runtime(
    budget: float, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path / "out")), often=SKIP)
    manifest = Bundle(folder).manifest
    assert manifest.scorer is not None
    first, second, third = manifest.scorer.points
    shares = {**second.shares, SKIP: 0.0}
    points = (replace(first, head="int4"), replace(second, shares=shares), third)
    points = (*points[:2], replace(third, budget=1.05, shares=shares))
    points = (*points, replace(third, budget=1.1, multiplier=1e-6, shares=shares))
    replace_manifest(folder, replace(manifest, scorer=replace(manifest.scorer, points=points)))
    assert TOOL.run(folder, tmp_path / "graph") == 0
    model = dash_onnx.load(folder)
    policy = model.policy("dash", budget)
    assert isinstance(policy, ScoredPolicy)
    used = policy.used(4, model.manifest.actions)
    assert (SKIP in used[1]) == (budget < 0.5)
    client, sequence = Client(tmp_path / "graph", model.manifest), model.new_sequence()
    sequence.prefill(np.array(PROMPT), *PLAN)
    client(PROMPT)
    for token in range(100, 130):
        decider = ScoredDecider(sequence, "int8", policy.multiplier, used=used)
        _, decided = sequence.forward(token, decider)
        _, path = client([token], **{BUDGET: np.array([budget], np.float32)})
        assert path == list(decided)


def test_a_table_of_one_row_decides_as_the_runtime(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path / "out")))
    manifest = Bundle(folder).manifest
    assert manifest.scorer is not None
    point = replace(manifest.scorer.points[1], budget=0.71135)
    facts = replace(manifest.scorer, points=(point,), presets=dict.fromkeys(PRESETS, 0.71135))
    replace_manifest(folder, replace(manifest, scorer=facts))
    assert TOOL.run(folder, tmp_path / "graph", "--policy", "dash") == 0
    model = dash_onnx.load(folder)
    client, sequence = Client(tmp_path / "graph", model.manifest), model.new_sequence()
    sequence.prefill(np.array(PROMPT), *PLAN)
    client(PROMPT)
    for token in range(100, 110):
        decider = ScoredDecider(sequence, "int8", point.multiplier)
        _, decided = sequence.forward(token, decider)
        assert client([token])[1] == list(decided)


@pytest.mark.parametrize("variants", [("full", "int8", "int4"), ("int8",)], ids="+".join)
def test_a_budget_that_skips_most_layers_decides_as_the_runtime(
    variants: tuple[Action, ...],
    tiny_folder: Path,
    night: Path,
    export_tiny: Callable[..., Path],
    tmp_path: Path,
) -> None:
    exported = export_tiny(tiny_folder, calibration=(night,), variants=variants)
    folder = with_scorer(Path(shutil.copytree(exported, tmp_path / "out")), (2,), often=SKIP)
    assert TOOL.run(folder, tmp_path / "graph") == 0
    model = dash_onnx.load(folder)
    client, sequence = Client(tmp_path / "graph", model.manifest), model.new_sequence()
    sequence.prefill(np.array(PROMPT), *PLAN)
    assert set(client(PROMPT)[1]) == {"int8"}
    seen: set[str] = set()
    for token in range(100, 140):
        budget = 0.5 if token % 2 else 0.25  # that of the graph, and one that skips more
        ours, decided = sequence.forward(
            token, ScoredDecider(sequence, "int8", multiplier_at(model, budget))
        )
        theirs, path = client([token], **{BUDGET: np.array([budget], np.float32)})
        assert path == list(decided)
        np.testing.assert_allclose(theirs[-1], ours, atol=2e-4)
        seen |= set(path)
    assert SKIP in seen and len(seen) > 1


def test_layers_that_a_budget_fixes_are_fixed_in_the_graph(
    tiny_bundle: Path, client_name: str, tmp_path: Path
) -> None:
    folder = with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path / "out")), (2,))
    manifest = Bundle(folder).manifest
    assert manifest.scorer is not None
    fixed: list[tuple[Action | None, ...]] = [
        ("int8", "int4", None, SKIP),
        ("int8", None, None, SKIP),
        ("full", None, None, "int4"),
    ]
    points = [replace(p, fixed=f) for p, f in zip(manifest.scorer.points, fixed, strict=True)]
    scorer = replace(manifest.scorer, points=tuple(points))
    replace_manifest(folder, replace(manifest, scorer=scorer))
    assert TOOL.run(folder, tmp_path / "graph", "--for", client_name) == 0
    with dash_onnx.load(folder) as model:
        client, sequence = Client(tmp_path / "graph", model.manifest), model.new_sequence()
        sequence.prefill(np.array(PROMPT), *PLAN)
        client(PROMPT)
        free = set[str]()
        for token in range(100, 130):
            budget = (0.3, 0.5, 0.7)[token % 3]
            policy = model.policy("dash", budget)
            assert isinstance(policy, ScoredPolicy)
            used = policy.used(LAYERS, model.manifest.actions)
            decider = ScoredDecider(sequence, "int8", policy.multiplier, None, used)
            ours, decided = sequence.forward(token, decider)
            theirs, path = client([token], **{BUDGET: np.array([budget], np.float32)})
            assert path == list(decided)
            np.testing.assert_allclose(theirs[-1], ours, atol=2e-4)
            assert budget == 0.7 or (path[0], path[3]) == ("int8", SKIP)
            free.add(path[2])
        assert len(free) > 1


def test_what_has_no_branch_is_not_decided(fused: Path, model: Model) -> None:
    client = Client(fused, model.manifest)
    client(PROMPT)
    assert set(client([100], **{BUDGET: np.array([0.99], np.float32)})[1]) == {"int8"}


@pytest.mark.parametrize(
    ("name", "rank"),
    [("gemma2", 32), ("olmo2", 0), ("stablelm", 32), ("stablelm parallel", 0), ("gpt_neox", 32)],
)
def test_every_form_of_layer_becomes_part_of_one_graph(
    name: str, rank: int, night: Path, tmp_path: Path, export_tiny: Callable[..., Path]
) -> None:
    """With other norms, attention and MLP beside each other, and skips without compensation."""
    source = save_random(tmp_path / "source", CASES[name])
    options = {"variants": ("int8",), "compensation_rank": rank}
    out = export_tiny(source, calibration=(night,), **options)
    skipped = ",".join("skip" if layer == 1 else "int8" for layer in range(LAYERS))
    assert TOOL.run(out, tmp_path / "flat", "--policy", f"static:{skipped}") == 0
    model = dash_onnx.load(out)
    client, sequence = Client(tmp_path / "flat", model.manifest), model.new_sequence()
    policy = model.policy(f"static:{skipped}")
    assert policy.uniform is not None
    ours = sequence.prefill(np.array(PROMPT), policy.uniform, policy.head)
    np.testing.assert_allclose(client(PROMPT)[0][-1], ours, atol=2e-4)
    for token in (100, 101, 102):
        ours = sequence.forward(token, FixedPath(policy.uniform, policy.head))[0]
        np.testing.assert_allclose(client([token])[0][-1], ours, atol=2e-4)


def test_a_static_policy_is_a_flat_graph(bundle: Path, model: Model, tmp_path: Path) -> None:
    assert TOOL.run(bundle, tmp_path / "flat", "--policy", STATIC) == 0
    graph = onnx.load(tmp_path / "flat" / MODEL, load_external_data=False).graph
    chooses = [node.output[0] for node in graph.node if node.op_type == "If"]
    assert chooses == ["logits"]  # see rewrite.rescore_last
    assert BUDGET not in {value.name for value in graph.input}
    client, sequence = Client(tmp_path / "flat", model.manifest), model.new_sequence()
    policy = model.policy(STATIC)
    assert policy.uniform is not None
    ours = sequence.prefill(np.array(PROMPT), policy.uniform, policy.head)
    np.testing.assert_allclose(client(PROMPT)[0][-1], ours, atol=2e-4)
    for token in range(100, 110):
        ours = sequence.forward(token, FixedPath(policy.uniform, policy.head))[0]
        np.testing.assert_allclose(client([token])[0][-1], ours, atol=2e-4)


def test_of_a_prompt_the_head_looks_twice_at_the_last_row(
    bundle: Path, model: Model, tmp_path: Path
) -> None:
    assert TOOL.run(bundle, tmp_path / "flat", "--policy", "int4") == 0
    policy = model.policy("int4")
    assert policy.uniform is not None and policy.head == "int4"
    ids = list(range(20, 60))
    for count in (len(ids), 5):  # a prompt, and a pass with drafts
        client, sequence = Client(tmp_path / "flat", model.manifest), model.new_sequence()
        errors = [
            np.abs(row - sequence.prefill(np.array([token]), policy.uniform, policy.head)).max()
            for row, token in zip(client(ids[:count])[0], ids, strict=False)
        ]
        assert errors[-1] <= 2e-4
        assert (max(errors) <= 2e-4) == (count == 5)


def test_several_tokens_after_a_prompt_run_at_the_precision_of_prompts(
    fused: Path, model: Model
) -> None:
    client, sequence = Client(fused, model.manifest), model.new_sequence()
    for part in (PROMPT, [50, 51, 52]):
        ours = sequence.prefill(np.array(part), *PLAN)
        np.testing.assert_allclose(client(part)[0][-1], ours, atol=2e-4)


def test_prompts_run_at_a_precision_of_their_own(
    bundle: Path, model: Model, tmp_path: Path
) -> None:
    assert TOOL.run(bundle, tmp_path / "graph", "--prefill", "full") == 0
    client, sequence = Client(tmp_path / "graph", model.manifest), model.new_sequence()
    head = model.policy("dash").head
    ours = sequence.prefill(np.array(PROMPT), ("full",) * model.manifest.model.num_layers, head)
    theirs, path = client(PROMPT)
    np.testing.assert_allclose(theirs[-1], ours, atol=2e-4)
    assert set(path) == {"full"}
    wanted, decided = sequence.forward(
        100, ScoredDecider(sequence, head, model.policy("dash").multiplier)
    )  # type: ignore[attr-defined]
    theirs, path = client([100])
    np.testing.assert_allclose(theirs[-1], wanted, atol=2e-4)
    assert path == list(decided) and "full" not in path


def test_the_folder_is_complete_and_its_graph_valid(fused: Path, client_name: str) -> None:
    onnx.checker.check_model(fused / MODEL, full_check=False)
    wanted = {MODEL, DATA, FACTS, "tokenizer.json", "tokenizer_config.json", "config.json"}
    wanted |= {"generation_config.json", "chat_template.jinja"}
    if CLIENTS[client_name].genai_files:
        wanted |= {"genai_config.json", *map(adapter, ("quality", "balanced", "fast"))}
    assert {path.name for path in fused.iterdir()} == wanted


def test_the_inputs_are_those_of_the_client(fused: Path, model: Model, client_name: str) -> None:
    facts, inputs = CLIENTS[client_name], Client(fused, model.manifest).inputs
    assert ("position_ids" in inputs) == facts.position_ids
    assert (BUDGET in inputs) == facts.feeds_budget


def test_weights_of_branches_lie_where_the_client_finds_them(fused: Path, client_name: str) -> None:
    graph = onnx.load(fused / MODEL, load_external_data=False).graph
    branches = [
        attribute.g for node in graph.node if node.op_type == "If" for attribute in node.attribute
    ]
    external = onnx.TensorProto.EXTERNAL
    found = any(t.data_location == external for g in branches for t in g.initializer)
    assert found == CLIENTS[client_name].data_in_branches


def test_products_are_of_the_kind_that_the_client_is_fast_at(fused: Path, client_name: str) -> None:
    graph = onnx.load(fused / MODEL, load_external_data=False).graph
    branches = [one.g.node for node in graph.node for one in node.attribute if one.HasField("g")]
    kinds = {node.op_type for nodes in (graph.node, *branches) for node in nodes}
    assert ("FusedMatMul" not in kinds) == CLIENTS[client_name].multiplies_blocks


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 80, 96])  # whole blocks of 32, a part of one, an odd count
@pytest.mark.parametrize("zeros", [False, True])
def test_widened_products_are_those_of_blocks(bits: int, columns: int, zeros: bool) -> None:
    rng = np.random.default_rng(0)
    rows, blocks = 24, -(-columns // 32)
    arrays = {
        "values": rng.integers(0, 256, (rows, blocks, 32 * bits // 8), np.uint8),
        "scales": rng.random(rows * blocks, np.float32),
    }
    if zeros:
        packed = -(-blocks * bits // 8)
        arrays["zeros"] = rng.integers(0, 256, (rows, packed), np.uint8).ravel()
    product = onnx.helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", N=rows, K=columns, bits=bits,
        block_size=32,
    )  # fmt: skip
    kind = onnx.TensorProto.FLOAT
    ports = [onnx.helper.make_tensor_value_info(n, kind, [1, 3, s]) for n, s in
             (("x", columns), ("y", rows))]  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(a, name) for name, a in arrays.items()]
    graph = onnx.helper.make_graph([product], "g", ports[:1], ports[1:], tensors)
    x = rng.standard_normal((1, 3, columns), np.float32)
    wanted = run_graph(graph, x)
    graph.initializer.extend(widen(graph))
    kept = zeros and bits == 4 and blocks % 2 == 1  # rows of zero points that end within a byte
    assert (graph.node[0].op_type == "MatMulNBits") == kept
    np.testing.assert_allclose(run_graph(graph, x), wanted, rtol=1e-4, atol=1e-4 * columns)


def run_graph(graph: onnx.GraphProto, x: np.ndarray) -> np.ndarray:
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def test_genai_is_told_the_names_of_the_graph(bundle: Path, tmp_path: Path) -> None:
    fused = tmp_path / "graph"
    assert TOOL.run(bundle, fused) == 0
    config = json.loads((fused / "genai_config.json").read_text())
    facts = Bundle(bundle).manifest.model
    assert config["model"]["decoder"]["num_hidden_layers"] == facts.num_layers
    graph = onnx.load(fused / MODEL, load_external_data=False).graph
    declared = {value.name for value in (*graph.input, *graph.output)}
    decoder = config["model"]["decoder"]
    for name in (*decoder["inputs"].values(), *decoder["outputs"].values()):
        assert (name % 3 if "%d" in name else name) in declared


def test_genai_is_told_the_sampling_and_no_token_that_the_model_has_not(
    bundle: Path, tmp_path: Path
) -> None:
    """It refuses a null."""
    folder = Path(shutil.copytree(bundle, tmp_path / "out"))
    stored = folder / "generation_config.json"
    sampling = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1}
    stored.write_text(json.dumps({"eos_token_id": 1, **sampling}))
    manifest = json.loads((folder / "dash.json").read_text())
    manifest["files"] = {n: dataclasses.asdict(f) for n, f in list_files(folder).items()}
    (folder / "dash.json").write_text(json.dumps(manifest))
    fuse(Bundle(folder), tmp_path / "graph", FuseOptions("genai", "int8"), overwrite=False)
    config = json.loads((tmp_path / "graph" / "genai_config.json").read_text())
    model, search = config["model"], config["search"]
    assert search["do_sample"] and (search["temperature"], search["top_k"]) == (0.7, 50)
    assert search["repetition_penalty"] == 1.1
    assert "bos_token_id" not in model and model["pad_token_id"] == model["eos_token_id"] == 1


def test_weights_are_stored_once_each(fused: Path, bundle: Path) -> None:
    stored = sum(
        facts.bytes
        for name, facts in Bundle(bundle).manifest.files.items()
        if name.endswith(".data") and "/full." not in name and "int4.onnx" not in name
    )
    layers = [f"layers/{i:02d}/int4.onnx.data" for i in range(4)]
    stored += sum(Bundle(bundle).manifest.files[name].bytes for name in layers)
    assert (fused / DATA).stat().st_size < 1.2 * stored + 200_000


# The command


def test_json_names_the_folder(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    found = TOOL.json_of(capsys, bundle, tmp_path / "graph", "--budget", "fast")
    assert found["folder"] == str(tmp_path / "graph") and found["bytes"] > 1e5


def test_an_existing_folder_needs_overwrite_and_survives_a_failure(
    bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "graph"
    assert TOOL.run(bundle, out, "--policy", "int8") == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "--overwrite" in TOOL.refused(capsys, bundle, out)
    monkeypatch.setattr("dash_onnx.exporters.fused.folder.genai_config", None)
    with pytest.raises(TypeError):
        TOOL.run(bundle, out, "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--policy", "random"), "has no graph"),
        (("--policy", "int3"), "unknown policy"),
        (("--budget", "7"), "outside 0..1"),
        (("--budget", "lots"), "nor a preset"),
        (("--policy", "int8", "--prefill", "full"), "takes no prefill"),
        (("--policy", "dash", "--prefill", "wide"), "needs a policy with one path"),
    ],
)
def test_misuse_is_one_line(
    bundle: Path, tmp_path: Path, arguments: tuple[str, ...], why: str, capsys: Capture
) -> None:
    assert why in TOOL.refused(capsys, bundle, tmp_path / "graph", *arguments)
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize("client", ["genai", "web"])
def test_a_graph_holds_no_weight_that_nothing_reads(
    bundle: Path, client: str, tmp_path: Path
) -> None:
    assert TOOL.run(bundle, tmp_path / "graph", "--policy", "dash", "--for", client) == 0
    model = onnx.load(tmp_path / "graph" / MODEL, load_external_data=False)
    read = names_read(model.graph.node)
    assert all(tensor.name in read for tensor in model.graph.initializer)


def test_other_data_in_the_place_is_not_replaced(
    bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / MODEL).write_text("another program's")
    assert f"holds no {FACTS}" in TOOL.refused(capsys, bundle, tmp_path, "--overwrite")
