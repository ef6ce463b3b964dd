"""The peers' clients: from the same weights they compute what we compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needed
from gguf_files import write_model
from gguf_models import FAMILIES, tiny_model

import dash_onnx
from dash_onnx.bench.worker import Worker
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.statistics import kl_divergence, log_softmax
from dash_onnx.exporters.fused import FuseOptions, fuse

pytestmark = pytest.mark.slow  # quick, but the peers are installed for the slow tests


@pytest.fixture(params=["llama.cpp", "openvino", "openvino-f32"])
def peer(request: pytest.FixtureRequest, demo_gguf: Path) -> Worker:
    kind = request.param
    if kind == "llama.cpp":  # skipped in CI, too, which has no time to compile it
        pytest.importorskip("llama_cpp", reason="run `make .venv/.llama-cpp`")
    else:
        needed("openvino_genai")
    worker = Worker(kind, kind, str(demo_gguf), 1)
    request.addfinalizer(worker.close)
    return worker


@pytest.mark.demo
def test_a_peer_reads_the_demo_model_as_we_do(peer: Worker, trained_bundle: Path) -> None:
    model = dash_onnx.load(trained_bundle)
    ids = model.text.encode("The lighthouse keeper counts the ships that pass").tolist()
    times = peer.decode(ids, 5)
    assert len(times) == 5 and min(times) > 0
    assert len(peer.decode(ids, 2)) == 2
    if (theirs := peer.logits(ids, 4)) is None:
        assert peer.name.startswith("openvino")
        return
    assert theirs.shape == (len(ids) - 4, model.manifest.model.vocab_size)
    # Both round activations to INT8.
    ours = model.logits(np.array(ids), policy="int8")[4:]
    assert kl_divergence(log_softmax(ours), log_softmax(theirs)).mean() < 0.02


def test_genai_decodes_and_scores_up_to_its_context_and_nothing_beyond(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    needed("onnxruntime_genai")
    bundle = Bundle(tiny_bundle)
    fuse(bundle, tmp_path / "out", FuseOptions(policy="int8"), overwrite=False)
    room = bundle.manifest.model.max_length
    worker = Worker("genai", "genai", str(tmp_path / "out"), 1)
    ids = np.random.default_rng(3).integers(2, 300, room).tolist()
    assert len(worker.decode(ids[:-3], 3)) == 3
    assert worker.decode(ids[:-3], 4) == worker.decode(ids, 4) == []
    rows = worker.logits(ids, room - 3)
    assert rows is not None and len(rows) == 3
    worker.close()


def test_transformers_agrees_on_the_tiny_model(tiny_folder: Path, tiny_bundle: Path) -> None:
    needed("dash_onnx_peers")
    ids = list(range(10, 26))
    rows = []
    for kind, path in (("dash", tiny_bundle), ("transformers", tiny_folder)):
        worker = Worker(kind, kind, str(path), 1, *(["full"] if kind == "dash" else []))
        assert len(worker.decode(ids, 3)) == 3
        rows.append(worker.logits(ids, 5))
        worker.close()
    assert rows[0] is not None and len(rows[0]) == 11
    np.testing.assert_allclose(*rows, atol=5e-3)


_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ALIKE: dict[str, dict[str, Any]] = {
    # Which layers have windows goes by the number of layers there.
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    # The ramp of YaRN begins and ends at whole dimensions there.
    "gpt_oss": {"rope_parameters": {**FAMILIES["gpt_oss"]["rope_parameters"], "truncate": True}},
    "mistral": {"sliding_window": None},  # never has one there
    "olmoe": {"num_key_value_heads": 4},  # as many as of queries there
    # The context that is allocated, not the text, decides between short and long factors there.
    "phi3": {"rope_parameters": {**_PLAIN, "partial_rotary_factor": 0.5}},
}
"""What llama.cpp computes otherwise than transformers, left out."""


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_model_that_the_tests_write_as_gguf(
    family: str, tmp_path: Path
) -> None:
    """So the files that our reader is tested with are those that it meets."""
    pytest.importorskip("llama_cpp", reason="run `make .venv/.llama-cpp`")
    model, path = tiny_model(family, **ALIKE.get(family, {})), tmp_path / "tiny.gguf"
    write_model(path, model)
    ids = np.random.default_rng(3).integers(2, 300, 30).tolist()
    worker = Worker("llama.cpp", "llama.cpp", str(path), 1)
    theirs = worker.logits(ids, 4)
    worker.close()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, 4:].numpy()
    assert theirs is not None
    # K/V in FP16.
    assert kl_divergence(log_softmax(wanted), log_softmax(theirs)).max() < 1e-4


def test_llama_cpp_draws_the_same_tokens_with_its_lookup_in_fewer_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="run `make .venv/.llama-cpp`")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from dash_onnx_peers.llama_cpp import LlamaCpp

    path = tmp_path / "tiny.gguf"
    write_model(path, tiny_model("llama"))
    peer, passes = LlamaCpp(str(path), 1), list[int]()
    run = peer._next

    def counted(ids: Any, rows: int = 1) -> Any:
        passes.append(rows)
        return run(ids, rows)

    monkeypatch.setattr(peer, "_next", counted)
    ids = np.random.default_rng(3).integers(2, 300, 10).tolist() * 3
    alone, _ = peer.answer(ids, 60, drafts=False)
    assert passes == [1] * len(alone) and len(alone) > 20
    passes.clear()
    assert peer.answer(ids, 60, drafts=True)[0] == alone
    assert max(passes) == 3 and len(passes) < len(alone) < sum(passes)
