"""Threads, and how a bundle behaves in a process that belongs to an app."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import BundleError, PolicyError
from dash_onnx.runtime import ort, sessions
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.model import Model


def runtime_with(set_pool: Callable[..., None]) -> SimpleNamespace:
    """What `use_threads` needs of ONNX Runtime."""

    class InferenceSession:
        def __init__(self, model: object, sess_options: object = None): ...

    return SimpleNamespace(
        set_global_thread_pool_sizes=set_pool,
        InferenceSession=InferenceSession,
        SessionOptions=SimpleNamespace,
    )


def test_a_second_size_of_the_thread_pool_is_warned_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[int, int]] = []
    module = runtime_with(lambda *pair: sizes.append(pair))
    monkeypatch.setattr(ort, "onnxruntime", lambda: module)
    monkeypatch.setattr(ort, "_pool_threads", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ort.use_threads(3)
        ort.use_threads(3)
        ort.use_threads(None)
    with pytest.warns(RuntimeWarning, match="threads=2 ignored: .* has 3 threads"):
        ort.use_threads(2)
    assert sizes == [(3, 1)]


def test_one_thread_needs_no_pool_until_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    module = runtime_with(lambda *pair: sizes.append(pair))
    monkeypatch.setattr(ort, "onnxruntime", lambda: module)
    monkeypatch.setattr(ort, "_pool_threads", None)
    ort.use_threads(1)
    assert sizes == [] and ort.thread_count() == 1
    ort.use_threads(4)
    assert sizes == [(4, 1)] and ort.thread_count() == 4


def test_the_pool_of_the_app_is_shared_and_said_once_where_a_size_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taken(*_: int) -> None:
        raise RuntimeError("Global thread pools have already been created, cannot replace them")

    monkeypatch.setattr(ort, "onnxruntime", lambda: runtime_with(taken))
    monkeypatch.setattr(ort, "_pool_threads", None)
    with pytest.warns(RuntimeWarning, match="threads=3 ignored: .* was set by this app"):
        ort.use_threads(3)
    monkeypatch.setattr(ort, "_pool_threads", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ort.use_threads(None)


# What an app may do beside a bundle: each case is a process of its own.
_HOST = """
import onnxruntime as ort, dash_onnx, warnings, os, time
warnings.simplefilter("error")
graph = {graph!r}
def host(shared):
    options = ort.SessionOptions()
    options.use_per_session_threads = not shared
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
def generate(threads=None, **options):
    model = dash_onnx.load({bundle!r}, threads=threads, **options)
    return [step.token for step in model.generate_step(range(10, 20), max_new_tokens=4)]
"""


@pytest.mark.parametrize(
    "body",
    [
        "host(False); generate()",  # the app's sessions came first
        "ort.set_global_thread_pool_sizes(2, 1); host(True); generate()",
        "generate(threads=1); host(False); generate(threads=1)",
        "generate(); host(True)",
        "generate(); host(False); host(False).run(None, {'input_ids': [[1]]}); generate()",
        "generate(); ort.InferenceSession(graph); ort.InferenceSession(graph, providers=None)",
        "generate(); ort.InferenceSession(path_or_bytes=graph, sess_options=ort.SessionOptions())",
        "generate(); options = ort.SessionOptions(); options.intra_op_num_threads = 3; "
        "session = ort.InferenceSession(graph, options); "
        "assert (options.use_per_session_threads, options.intra_op_num_threads) == (True, 3); "
        "session.set_providers(['CPUExecutionProvider']); session.run(None, {'input_ids': [[1]]})",
        "create = ort.InferenceSession.__init__; generate(share_pool=False); "
        "assert ort.InferenceSession.__init__ is create; host(True)",
        "tokens = generate(2); u = os.times(); time.sleep(1.5); v = os.times(); "
        "assert v.user - u.user + v.system - u.system < 0.3, 'threads spin while idle'",
    ],
)
@pytest.mark.usefixtures("every_core")
def test_a_bundle_is_a_good_guest(tiny_bundle: Path, body: str) -> None:
    code = _HOST.format(graph=str(tiny_bundle / "embed.onnx"), bundle=str(tiny_bundle)) + body
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "ignored" not in result.stderr  # as ORT warns of options that the pool overrides


def test_a_closed_model_says_so(tiny_bundle: Path) -> None:
    with dash_onnx.load(tiny_bundle) as model:
        assert model.generate("the keeper", max_new_tokens=2, ignore_eos=True) is not None
    with pytest.raises(dash_onnx.DashError, match="closed; load the bundle again"):
        model.generate("the keeper", max_new_tokens=2)


def test_closing_frees_the_sessions(tiny_bundle: Path) -> None:
    created: list[weakref.ref[Any]] = []

    class Watched(Backend):
        def session(self, graph: Path | bytes, *, scorer: bool = False, **options: Any) -> Any:
            session = super().session(graph, scorer=scorer, **options)
            created.append(weakref.ref(session))
            return session

    model = Model(Bundle(tiny_bundle), Watched())
    cache = model.new_cache()
    model.generate("the keeper", max_new_tokens=2, ignore_eos=True, cache=cache)
    model.close()
    assert created and not [session for session in created if session() is not None]
    with pytest.raises(BundleError, match="closed"):
        model.generate("the keeper", max_new_tokens=2, cache=cache)
    model = Model(Bundle(tiny_bundle), Watched())
    model.generate("the keeper", max_new_tokens=2, ignore_eos=True)
    gc.disable()
    try:
        del model
        assert not [session for session in created if session() is not None]
    finally:
        gc.enable()


def test_a_cache_serves_its_own_model_only(tiny_bundle: Path, tiny_model: Model) -> None:
    with dash_onnx.load(tiny_bundle) as other:
        cache = other.new_cache()
        for run in (tiny_model.generate, tiny_model.generate_step, tiny_model.score):
            with pytest.raises(PolicyError, match="of this model"):
                [*run([5, 6], cache=cache)]


def test_preloading_a_policy_loads_what_it_uses(tiny_bundle: Path) -> None:
    model = dash_onnx.load(tiny_bundle)
    model.preload("static:int8*3,int4")
    loaded = {path for path in model.loaded if path.startswith("layers/")}
    wanted = {f"layers/{i:02d}/{a}.onnx" for i, a in enumerate(("int8", "int8", "int8", "int4"))}
    assert loaded == wanted
    model.preload("static:int8*3,int4", prefill="full")
    loaded = {path for path in model.loaded if path.startswith("layers/")}
    assert loaded == wanted | {f"layers/{i:02d}/full.onnx" for i in range(4)}


@pytest.mark.parametrize("policy", ["int4", "static:int8,skip,int4*2"])
def test_nothing_is_loaded_but_what_a_policy_uses(tiny_bundle: Path, policy: str) -> None:
    with dash_onnx.load(tiny_bundle, policy=policy) as model:
        model.preload("")
        preloaded = set(model.loaded)
        model.generate("the keeper", max_new_tokens=4, ignore_eos=True)
        assert set(model.loaded) == preloaded
        uniform = model.policy().uniform
        assert uniform is not None
        runs = [a if a != "skip" else "int8" for a in uniform]  # the highest of the others
        prompt = {f"layers/{i:02d}/{action}.onnx" for i, action in enumerate(runs)}
        rest = {f"layers/{i:02d}/{action}.onnx" for i, action in enumerate(uniform)}
        assert preloaded == {"embed.onnx", f"head/{model.policy().head}.onnx"} | prompt | rest


def test_what_does_not_fit_the_memory_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "available_bytes", lambda: 1000)
    with dash_onnx.load(tiny_bundle) as model:
        with pytest.raises(dash_onnx.DashError, match="free: choose a policy that uses fewer"):
            model.preload("int4")
        assert model.loaded == frozenset()


def test_a_thread_pool_that_could_not_be_set_is_not_taken_for_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: int) -> None:
        raise RuntimeError("no threads")

    module = runtime_with(fail)
    monkeypatch.setattr(ort, "onnxruntime", lambda: module)
    monkeypatch.setattr(ort, "_pool_threads", None)
    with pytest.raises(RuntimeError):
        ort.use_threads(3)
    sizes: list[tuple[int, int]] = []
    module.set_global_thread_pool_sizes = lambda *pair: sizes.append(pair)
    ort.use_threads(3)
    assert sizes == [(3, 1)]
