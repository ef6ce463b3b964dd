"""What must hold on every device: on the CPU in every run, on a GPU by `pytest -m gpu`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import logits_of, reference_logits
from scored_bundle import with_scorer
from transformers import LlamaForCausalLM

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import DeviceError
from dash_onnx.core.policy import RandomPolicy
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.deciders import FixedPath, ScoredDecider
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.ort import Device, create_session
from dash_onnx.runtime.rows import Rows

MIXED = "static:full,int8,skip,int4"
IDS = np.random.default_rng(5).integers(2, 384, 40)
PROMPT = 12
# The tiny model's logits reach some 5; FP16 keeps three digits of them through four layers.
TOLERANCE = {"cpu": 1e-4, "cuda": 0.05}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    found: Device = request.param
    return found


@pytest.fixture(scope="module")
def bundle(
    device: Device, tiny_with: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """With a scorer that decides before each layer."""
    folder = tmp_path_factory.mktemp(device) / "out"
    return with_scorer(Path(shutil.copytree(tiny_with(device=device), folder)))


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return dash_onnx.load(bundle)


def test_the_highest_precision_equals_transformers(
    model: Model, device: Device, tiny_folder: Path
) -> None:
    reference = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    wanted = reference_logits(reference, IDS)
    assert np.abs(wanted).max() > 10 * TOLERANCE[device]  # the comparison means something
    found = model.logits(IDS, policy="full")
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE[device])
    decoded = logits_of(model.score(IDS, prompt_tokens=PROMPT, policy="full"))
    np.testing.assert_allclose(decoded, wanted[PROMPT:], atol=TOLERANCE[device])


@pytest.mark.gpu
def test_every_graph_has_kernels_for_the_device(bundle: Path) -> None:
    """A node that CUDA lacks would run on the CPU, with copies before and after."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    missing = {}
    for graph in sorted(bundle.rglob("*.onnx")):
        try:
            given = {"providers": ["CUDAExecutionProvider"], "enable_fallback": 0}
            ort.InferenceSession(graph, options, **given)
        except Exception as error:
            missing[graph.relative_to(bundle).as_posix()] = str(error).splitlines()[0]
    assert not missing


@pytest.mark.parametrize("policy", ["int8", "int4", MIXED])
def test_a_path_decodes_as_its_graphs_do_on_the_cpu(
    model: Model, bundle: Path, device: Device, policy: str
) -> None:
    on_cpu = Model(Bundle(bundle), Backend())
    wanted, found = (
        logits_of(one.score(IDS, prompt_tokens=PROMPT, policy=policy)) for one in (on_cpu, model)
    )
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE[device])


def decisions(model: Model, tokens: int) -> list[tuple[str, ...]]:
    """Paths of the tokens of a fixed text."""
    ids = np.random.default_rng(1).integers(2, 384, tokens).tolist()
    paths: list[tuple[str, ...]] = []
    while len(paths) < tokens:
        sequence = model.new_sequence()
        sequence.prefill(IDS[:PROMPT], ("int8",) * sequence.num_layers, "int8")
        decider = ScoredDecider(sequence, "int8", 0.18)
        part = ids[len(paths) : len(paths) + model.manifest.model.max_length - PROMPT - 1]
        paths += [sequence.forward(token, decider)[1] for token in part]
    return paths


@pytest.mark.gpu
def test_a_scorer_beside_the_layers_decides_as_one_between_them(model: Model, bundle: Path) -> None:
    """Whatever races there are show as another decision somewhere."""
    from dash_onnx.runtime.cuda import CudaBackend, Driver, open_driver

    one = Model(Bundle(bundle), CudaBackend(Driver(open_driver()), overlap=False))
    tokens = 20_000
    wanted = decisions(one, tokens)
    assert len(set(wanted)) > 10
    assert decisions(model, tokens) == wanted


def test_two_generations_at_once_equal_one_alone(model: Model) -> None:
    def text(number: int) -> list[int]:
        prompt = (IDS[:PROMPT] + number) % 384
        steps = model.generate_step(
            prompt, policy="dash", budget=0.5, max_new_tokens=60, ignore_eos=True
        )
        return [step.token for step in steps]

    alone = [text(number) for number in range(6)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(text, range(6))) == alone


@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_rows_of_a_batch_have_the_logits_of_each_alone(
    model: Model, bundle: Path, device: Device, graphs: bool
) -> None:
    """Of different lengths and paths, while the cache grows, and after two rows change places."""
    if graphs and device == "cpu":
        pytest.skip("only a GPU has graphs")
    loaded = dash_onnx.load(bundle, cuda_graphs=True) if graphs else model
    rows, alone = Rows.new(loaded._sessions, 3, capacity=32), [model.new_sequence() for _ in "abc"]
    policy = model.policy("random:1")
    assert isinstance(policy, RandomPolicy)
    paths = policy.paths()
    for row, one in enumerate(alone):
        ids, path = IDS[: 5 + 9 * row], next(paths)
        for state in (rows.states[row], one):
            state.prefill(ids, path, "full")
    for step, token in enumerate(IDS.tolist()):
        running = [0, 2] if step % 3 == 0 else [0, 1, 2]
        if step == 20:
            rows.states[0].kv.exchange(rows.states[2].kv)
            alone[0], alone[2] = alone[2], alone[0]
        deciders = [FixedPath(next(paths), "full") for _ in running]
        logits, _ = rows.forward(running, [[(token + row) % 384] for row in running], deciders)
        for row, own, decider in zip(running, logits, deciders, strict=True):
            wanted, _ = alone[row].forward((token + row) % 384, decider)
            np.testing.assert_allclose(own[0], wanted, atol=TOLERANCE[device])
    assert rows.states[2].kv.capacity > 32


@pytest.mark.gpu
def test_cuda_graphs_change_no_token(model: Model, bundle: Path) -> None:
    recorded = dash_onnx.load(bundle, cuda_graphs=True)
    for options in ({"policy": "full"}, {"policy": MIXED}, {"policy": "dash", "budget": 0.5}):
        wanted, found = (
            [s.token for s in one.generate_step(IDS, max_new_tokens=80, ignore_eos=True, **options)]
            for one in (model, recorded)
        )
        assert found == wanted, options


@pytest.mark.gpu
def test_a_device_that_is_full_is_one_line_and_the_process_goes_on(model: Model) -> None:
    from dash_onnx.runtime.cuda import CudaBackend

    backend = model._sessions.backend
    assert isinstance(backend, CudaBackend)
    free, total = torch.cuda.mem_get_info()
    # Zeros of the host are pages that nobody has touched: only the device must hold them.
    with pytest.raises(DeviceError, match="of free memory on the GPU") as caught:
        backend.buffer((total,), "uint8")
    assert "\n" not in str(caught.value)
    assert torch.cuda.mem_get_info()[0] > 0.8 * free
    assert len(list(model.generate_step(IDS, max_new_tokens=8, ignore_eos=True))) == 8


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="has CUDA")
def test_a_session_that_would_run_on_the_cpu_is_refused_for_cuda(
    tiny_bundle: Path,
) -> None:
    """ORT lists CUDA even where its libraries do not load, and then takes the CPU."""
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(DeviceError, match="cannot load CUDA or cuDNN: install those"),
    ):
        create_session(tiny_bundle / "embed.onnx", "cuda")
