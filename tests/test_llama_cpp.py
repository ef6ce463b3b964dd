"""llama.cpp as a peer: what it computes from the demo file is what our bundle computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dash_onnx
from dash_onnx.core.statistics import kl_divergence, log_softmax

pytest.importorskip("xllamacpp", reason="needs `make .venv/.bench`")

from dash_onnx.bench.contenders import LlamaCpp

pytestmark = pytest.mark.demo


def test_it_reads_the_demo_model_as_we_do(demo_gguf: Path, demo_bundle: Path) -> None:
    peer = LlamaCpp(str(demo_gguf), "", 1)
    model = dash_onnx.load(demo_bundle)
    ids = model.text.encode("The lighthouse keeper counts the ships that pass").tolist()
    theirs = peer.logits(ids, 4)
    assert theirs.shape == (len(ids) - 4, model.manifest.model.vocab_size)
    ours = model.logits(np.array(ids), policy="full")[4:]
    # It rounds activations to INT8 as `int8` does.
    assert kl_divergence(log_softmax(ours), log_softmax(theirs)).mean() < 0.02
    times = peer.decode(ids, 6)
    assert len(times) == 6 and min(times) > 0
