"""The order of layers and scorer on CUDA streams, with a driver that records and is late."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import DeviceError
from dash_onnx.runtime.buffers import Buffer
from dash_onnx.runtime.cuda import CudaBackend, CudaGraphBackend, Driver, open_driver
from dash_onnx.runtime.cuda.backend import CudaBuffer
from dash_onnx.runtime.deciders import FixedPath, ScoredDecider
from dash_onnx.runtime.kv import CAPACITY
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.ort import Device, create_session
from dash_onnx.runtime.rows import Rows
from dash_onnx.runtime.sequence import SequenceState

LAYERS = 4
PROMPT = np.arange(20, 33)
TOKENS = range(100, 130)
MULTIPLIER = 0.18


class StandIn:
    """Stands for the CUDA driver library on host memory. Nothing runs before somebody waits for it.

    Attributes:
        log: what was called, in order.
        refuses: name of the function that returns an error.
        alive: what was created and not yet destroyed, by handle.
        recorded: what was called since a recording began, or None.
        error: what ORT raises while its run is recorded.
        nodes: whether what is recorded has any.
        node: their kind.
        disturbed: threads that used the device while another one recorded.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self.refuses = ""
        self.queues: dict[int, list[Callable[[], object]]] = defaultdict(list)
        self._events: dict[int, tuple[int, int]] = {}  # stream, and how much of it came before
        self._handles = 0
        self.alive: dict[int, str] = {}
        self.error: BaseException | None = None
        self.nodes = True
        self.node = 0  # a kernel
        self._entered: set[int] = set()
        self.names: dict[int, str] = {}  # of the streams, which every model makes in this order
        self._memory: dict[int, Any] = {}
        self.recorded: list[Callable[[], object]] | None = None
        self._recorder = 0
        self.disturbed: set[int] = set()
        self._graphs: dict[int, list[Callable[[], object]]] = {}

    def watch(self) -> None:
        """Something is about to use the device."""
        if self.recorded is not None and threading.get_ident() != self._recorder:
            self.disturbed.add(threading.get_ident())

    def _cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: int) -> None:
        assert self.names[stream.value or 0] == "layers" and mode == 1 and self.recorded is None
        assert threading.get_ident() in self._entered
        self.recorded, self._recorder = [], threading.get_ident()
        time.sleep(0.001)  # a chance for other threads to disturb it

    def _cuStreamEndCapture(self, stream: ctypes.c_void_p, place: Any) -> None:
        assert self.recorded is not None
        assert threading.get_ident() == self._recorder
        self._new("graph", place)
        self._graphs[place._obj.value], self.recorded = self.recorded, None

    def _cuGraphGetNodes(self, graph: ctypes.c_void_p, nodes: Any, count: Any) -> None:
        assert self.alive[graph.value or 0] == "graph"
        count._obj.value = len(self._graphs[graph.value or 0]) if self.nodes else 0
        for index in range(count._obj.value if nodes is not None else 0):
            nodes[index] = index + 1

    def _cuGraphNodeGetType(self, node: ctypes.c_void_p, kind: Any) -> None:
        assert node.value
        kind._obj.value = self.node

    def _cuGraphInstantiateWithFlags(self, place: Any, graph: ctypes.c_void_p, _: Any) -> None:
        assert self.alive[graph.value or 0] == "graph"
        self._new("executable", place)
        self._graphs[place._obj.value] = self._graphs[graph.value or 0]

    def _cuGraphLaunch(self, graph: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        assert self.names[stream.value or 0] == "layers"
        assert self.alive[graph.value or 0] == "executable"
        assert threading.get_ident() in self._entered
        self.watch()
        for run in self._graphs[graph.value]:
            run()

    def __getattr__(self, name: str) -> Callable[..., int]:
        known = vars(StandIn)[f"_{name}"]  # a misspelt one is an error

        def function(*arguments: Any) -> int:
            if name == self.refuses:
                return 719
            known(self, *arguments)
            return 0

        return function

    def _new(self, kind: str, place: Any, value: int | None = None) -> None:
        self._handles += 1
        place._obj.value = value or self._handles
        self.alive[place._obj.value] = kind

    def _cuInit(self, _: int) -> None:
        pass

    def _cuDevicePrimaryCtxRetain(self, place: Any, device: int) -> None:
        assert device == 0
        place._obj.value = 77

    def _cuCtxSetCurrent(self, context: ctypes.c_void_p) -> None:
        assert context.value == 77
        self._entered.add(threading.get_ident())

    def _cuStreamCreate(self, place: Any, _: int) -> None:
        self._new("stream", place)
        self.names[place._obj.value] = ("layers", "scorer")[len(self.names) % 2]

    def _cuEventCreate(self, place: Any, flags: int) -> None:
        assert flags == 2  # timing would make every wait slower
        self._new("event", place)

    def _cuMemHostAlloc(self, place: Any, size: ctypes.c_size_t, _: int) -> None:
        memory = (ctypes.c_char * size.value)()
        self._memory[ctypes.addressof(memory)] = memory
        self._new("memory", place, ctypes.addressof(memory))

    def _cuEventRecord(self, event: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        assert event.value is not None and stream.value is not None
        self.log.append(("record", self.names[stream.value]))
        self._events[event.value] = stream.value, len(self.queues[stream.value])

    def _cuStreamWaitEvent(self, stream: ctypes.c_void_p, event: ctypes.c_void_p, _: int) -> None:
        assert event.value in self._events and stream.value is not None
        self.log.append(("wait", self.names[stream.value]))

    def _cuMemcpyDtoHAsync_v2(
        self, target: ctypes.c_void_p, source: Any, size: ctypes.c_size_t, stream: ctypes.c_void_p
    ) -> None:
        assert stream.value is not None
        self.log.append(("copy", self.names[stream.value]))
        places = target.value, source.value, size.value
        self.queues[stream.value].append(lambda: ctypes.memmove(*places))

    def _copy(self, target: Any, source: Any, size: ctypes.c_size_t) -> None:
        """On the legacy default stream, which waits for what both streams were given before."""
        self.watch()
        assert threading.get_ident() in self._entered
        for queue in self.queues.values():
            for run in queue:
                run()
            queue.clear()
        self._events = {key: (stream, 0) for key, (stream, _) in self._events.items()}
        ctypes.memmove(target.value, source.value, size.value)

    _cuMemcpyDtoH_v2 = _cuMemcpyHtoD_v2 = _cuMemcpyDtoD_v2 = _copy

    def _cuEventSynchronize(self, event: ctypes.c_void_p) -> None:
        assert event.value is not None
        stream, count = self._events[event.value]
        self.log.append(("host waits", self.names[stream]))
        for run in self.queues[stream][:count]:
            run()
        self.queues[stream] = self.queues[stream][count:]
        self._events = {
            key: (other, max(left - count, 0) if other == stream else left)
            for key, (other, left) in self._events.items()
        }

    def _cuStreamSynchronize(self, stream: ctypes.c_void_p) -> None:
        assert stream.value is not None
        self.log.append(("synchronize", self.names[stream.value]))

    def _destroy(self, kind: str, handle: ctypes.c_void_p) -> None:
        assert self.alive.pop(handle.value or 0) == kind

    def _cuEventDestroy_v2(self, event: ctypes.c_void_p) -> None:
        self._destroy("event", event)

    def _cuMemFreeHost(self, memory: ctypes.c_void_p) -> None:
        self._destroy("memory", memory)

    def _cuGraphDestroy(self, graph: ctypes.c_void_p) -> None:
        self._destroy("graph", graph)

    def _cuGraphExecDestroy(self, executable: ctypes.c_void_p) -> None:
        self._destroy("executable", executable)


class Session:
    """Runs a graph of layers at once, as a device may, and the scorer's as late as it may.

    While the driver records, nothing runs.
    """

    def __init__(self, session: Any, name: str, stream: int, driver: StandIn):
        self._session, self._name, self._stream, self._driver = session, name, stream, driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        key = "disable_synchronize_execution_providers"
        assert options.get_run_config_entry(key) == "1"
        self._driver.watch()
        if self._driver.recorded is not None:
            assert self._driver.names[self._stream] == "layers"
            self._driver.log.append((self._name, "recorded"))
            if self._driver.error is not None:
                raise self._driver.error

            def launched() -> None:
                self._driver.log.append((self._name, "launched"))
                self._session.run_with_iobinding(binding)

            self._driver.recorded.append(launched)
            return
        self._driver.log.append((self._name, self._driver.names[self._stream]))
        if self._driver.names[self._stream] == "scorer":
            queue = self._driver.queues[self._stream]
            queue.append(lambda: self._session.run_with_iobinding(binding))
        else:
            self._session.run_with_iobinding(binding)


class HostBuffer(CudaBuffer):
    """A buffer of the device, in the host's memory: ORT binds it there."""

    device: Device = "cpu"


class OnHost:
    """What a CUDA backend does, on the CPU."""

    stand_in: StandIn
    driver: Driver

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return HostBuffer(shape, dtype, self.driver)

    def session(self, graph: Path, *, scorer: bool = False, **_: Any) -> Session:  # type: ignore[override]
        self.stand_in.watch()
        stream = (self.scorer if scorer else self.layers).value  # type: ignore[attr-defined]
        return Session(
            create_session(graph, "cpu"), graph.stem.split("-")[0], stream, self.stand_in
        )


class Streams(OnHost, CudaBackend):
    """Two streams of the stand-in."""


class Recorder(OnHost, CudaGraphBackend):
    """Likewise, with recordings."""


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("s") / "out")))


@pytest.fixture
def driver() -> StandIn:
    return StandIn()


def loaded(bundle: Path, driver: StandIn | None, kind: type[CudaBackend] = Streams) -> Model:
    """A model on the CPU, or on the streams of a stand-in."""
    if driver is None:
        return dash_onnx.load(bundle)
    backend = kind(Driver(driver))
    backend.stand_in = driver  # type: ignore[attr-defined]
    return Model(Bundle(bundle), backend)


def recording(bundle: Path, driver: StandIn) -> Model:
    return loaded(bundle, driver, Recorder)


def decoded(
    model: Model, driver: StandIn | None = None
) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Paths and logits; of the driver's log only the last token stays."""
    sequence = model.new_sequence()
    sequence.prefill(PROMPT, ("int8",) * model.manifest.model.num_layers, "int8")
    decider = ScoredDecider(sequence, "int8", MULTIPLIER)
    paths, rows = [], []
    for token in TOKENS:
        if driver:
            driver.log.clear()
        logits, path = sequence.forward(token, decider)
        paths.append(path)
        rows.append(logits.copy())
    return paths, np.stack(rows)  # type: ignore[return-value]


def test_decisions_are_those_of_the_cpu(bundle: Path, driver: StandIn) -> None:
    paths, logits = decoded(loaded(bundle, None))
    assert len(set(paths)) > 3
    found, rows = decoded(loaded(bundle, driver))
    assert found == paths
    np.testing.assert_array_equal(rows, logits)


def test_a_layer_waits_for_its_decision_and_a_decision_for_no_layer(
    bundle: Path, driver: StandIn
) -> None:
    paths, _ = decoded(loaded(bundle, driver), driver)
    *before, last = paths[-1]
    wanted = [("embed", "layers")]
    for action in before:  # every layer but the first is a decision point
        wanted += [
            ("record", "layers"),  # its input is there
            ("wait", "scorer"),
            ("scorer", "scorer"),
            ("copy", "scorer"),
            ("record", "scorer"),
            (action, "layers"),  # runs meanwhile
            ("host waits", "scorer"),
        ]
    assert driver.log == [*wanted, (last, "layers"), ("int8", "layers")]


def test_synchronizing_waits_for_the_layers(bundle: Path, driver: StandIn) -> None:
    model = loaded(bundle, driver)
    driver.log.clear()
    model.new_sequence().sessions.backend.synchronize()
    assert driver.log == [("synchronize", "layers")]


def test_what_a_generation_took_is_given_back_at_once(bundle: Path, driver: StandIn) -> None:
    model = loaded(bundle, driver)
    taken = len(driver.alive)
    sequence = model.new_sequence()
    decider = ScoredDecider(sequence, "int8", MULTIPLIER)
    sequence.forward(100, decider)
    assert len(driver.alive) > taken
    del sequence, decider
    assert len(driver.alive) == taken


def test_an_error_of_the_driver_is_one_line(bundle: Path, driver: StandIn) -> None:
    sequence = loaded(bundle, driver).new_sequence()
    driver.refuses = "cuStreamWaitEvent"
    with pytest.raises(
        DeviceError, match=r"^CUDA driver: cuStreamWaitEvent failed with error 719$"
    ):
        sequence.forward(100, ScoredDecider(sequence, "int8", MULTIPLIER))


def test_a_missing_driver_is_one_line() -> None:
    with pytest.raises(DeviceError, match=r"^no CUDA driver .*; install one, or use --device cpu$"):
        open_driver("libnosuchdriver.so.1")


def test_the_cpu_meets_nothing_of_cuda(tiny_bundle: Path) -> None:
    code = (
        "import sys, dash_onnx\n"
        "dash_onnx.load(sys.argv[1], threads=1).generate('ab', max_new_tokens=2)\n"
        "print([name for name in sys.modules if 'cuda' in name and 'dash' in name])\n"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_what_was_recorded_runs_as_the_cpu_does(bundle: Path, driver: StandIn) -> None:
    paths, logits = decoded(loaded(bundle, None))
    found, rows = decoded(recording(bundle, driver))
    assert found == paths
    np.testing.assert_array_equal(rows, logits)
    assert Counter(what for _, what in driver.log)["launched"] > len(TOKENS)


@pytest.mark.parametrize("policy", ["int4", "static:int8,skip,int4,int8", "dash"])
@pytest.mark.parametrize("kind", [Streams, Recorder])
def test_a_batch_is_answered_as_on_the_cpu(
    bundle: Path, driver: StandIn, kind: type[CudaBackend], policy: str
) -> None:
    """With more prompts than rows, so that rows begin, end and change places."""
    options = GenerationOptions(
        policy=policy, budget=0.8 if policy == "dash" else None, max_new_tokens=30
    )
    prompts = ["ab", "the tiny model", "xyz " * 9, "a", "long " * 20, "end"]
    found, wanted = (
        model.batch(prompts, parallel=3, options=options)
        for model in (loaded(bundle, driver, kind), loaded(bundle, None))
    )
    assert found == wanted
    assert not driver.disturbed


def test_rows_of_a_bundle_for_cuda_have_the_logits_of_each_alone(
    tiny_with: Callable[..., Path], driver: StandIn
) -> None:
    """In FP16, and without the port by which the CPU's graphs take several tokens per row."""
    model = loaded(tiny_with(device="cuda"), driver)
    rows = Rows.new(model._sessions, 3, capacity=16)
    alone = [model.new_sequence() for _ in rows.states]
    path = ("int8", "skip", "full", "int4")
    for row, one in enumerate(alone):
        for state in (rows.states[row], one):
            state.prefill(PROMPT[: 3 + 4 * row], path, "full")
    assert not rows.ragged
    for token in TOKENS:
        deciders = [FixedPath(path, "full")] * 3
        logits, _ = rows.forward(range(3), [[token + row] for row in range(3)], deciders)
        for row, one in enumerate(alone):
            wanted, _ = one.forward(token + row, deciders[row])
            np.testing.assert_allclose(logits[row][0], wanted, atol=0.05)
    assert rows.states[0].kv.capacity > 16


def test_a_layer_is_recorded_once_per_action_after_two_runs(bundle: Path, driver: StandIn) -> None:
    sequence = recording(bundle, driver).new_sequence()
    for _ in range(5):
        sequence.forward(100, FixedPath(("int4",) * LAYERS, "int8"))
    counts = Counter(driver.log)
    for name, runs in {"embed": 1, "int4": LAYERS, "int8": 1}.items():
        ways = [counts[name, way] for way in ("layers", "recorded", "launched")]
        assert ways == [2 * runs, runs, 3 * runs]


def test_decisions_come_between_launches(bundle: Path, driver: StandIn) -> None:
    sequence = recording(bundle, driver).new_sequence()
    decider = ScoredDecider(sequence, "int8", MULTIPLIER)
    for _ in range(4):
        sequence.truncate(0)
        driver.log.clear()
        _, (*before, last) = sequence.forward(100, decider)
    wanted = [("embed", "launched")]
    for action in before:
        wanted += [
            ("record", "layers"),
            ("wait", "scorer"),
            ("scorer", "scorer"),
            ("copy", "scorer"),
            ("record", "scorer"),
            (action, "launched"),
            ("host waits", "scorer"),
        ]
    assert driver.log == [*wanted, (last, "launched"), ("int8", "launched")]


def test_a_grown_cache_is_recorded_anew_and_a_sequence_gives_its_graphs_back(
    bundle: Path, driver: StandIn
) -> None:
    model, ids = recording(bundle, driver), np.arange(24)
    path = ("int8",) * LAYERS
    taken = len(driver.alive)
    sequence = model.new_sequence(capacity=16)
    # Each launch repeats what the host passed by value when it was recorded: the K/V cache's
    # capacity, or the logits would be wrong after the next token.
    rows = [sequence.forward(token, FixedPath(path, "int8"))[0].copy() for token in ids.tolist()]
    assert sequence.kv.capacity == min(CAPACITY, model.manifest.model.max_length)
    layers = Counter(driver.log)["int8", "recorded"]
    assert layers == 2 * len(path) + 1  # before and after, and the head
    del sequence
    assert len(driver.alive) == taken
    wanted = model.new_sequence().prefill(ids, path, "int8", every=True)
    np.testing.assert_allclose(np.stack(rows), wanted, atol=2e-3)


def test_nothing_else_uses_the_device_while_one_generation_records(
    bundle: Path, driver: StandIn
) -> None:
    models = [recording(bundle, driver) for _ in range(2)]
    texts: list[str] = []
    together = threading.Barrier(6)

    def generate(model: Model, policy: str) -> None:
        together.wait()
        texts.append(model.generate("ab", policy=policy, max_new_tokens=9, ignore_eos=True))

    threads = [
        threading.Thread(target=generate, args=(model, policy))
        for model in models
        for policy in ("int4", "int8", "dash")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not driver.disturbed
    assert len(texts) == 6 and len(set(texts)) <= 3


@pytest.mark.parametrize(
    "use",
    [
        lambda model, _: model.new_sequence(),
        lambda _, sequence: sequence.prefill(PROMPT, ("int8",) * 4, "int8"),
        lambda _, sequence: sequence.prefill(PROMPT, ("int8",) * 4, "int8", every=True),
        lambda _, sequence: sequence.forward(100, FixedPath(("int8",) * 4, "int8")),
        lambda _, sequence: sequence.forward(PROMPT, FixedPath(("int8",) * 4, "int8"), every=True),
        lambda _, sequence: sequence.advance(20),
        lambda model, _: model.preload(),
        lambda model, _: model.close(),
        lambda model, _: Rows.new(model._sessions, 2),
        lambda _, sequence: sequence.head_of(np.zeros((2, 64), np.float32), "int8"),
    ],
)
def test_whatever_uses_the_device_waits_for_the_lock(
    bundle: Path, driver: StandIn, use: Callable[[Model, SequenceState], object]
) -> None:
    model = recording(bundle, driver)
    sequence = model.new_sequence()
    before = model.loaded
    thread = threading.Thread(target=use, args=[model, sequence])
    with sequence.sessions.backend.lock:
        driver.recorded, driver._recorder = [], threading.get_ident()
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and not driver.disturbed
        assert model.loaded == before
        driver.recorded = None
    thread.join()
    assert not driver.disturbed


@pytest.fixture
def third(bundle: Path, driver: StandIn) -> Callable[[], object]:
    """Runs the token of a sequence that is the first to be recorded."""
    sequence = recording(bundle, driver).new_sequence()
    decider = FixedPath(("int4",) * LAYERS, "int8")
    for _ in range(2):
        sequence.forward(100, decider)
    return lambda: sequence.forward(100, decider)


@pytest.mark.parametrize("name", ["cuStreamEndCapture", "cuGraphInstantiateWithFlags"])
def test_a_recording_that_the_driver_refuses_is_one_line(
    third: Callable[[], object], driver: StandIn, name: str
) -> None:
    driver.refuses = name
    with pytest.raises(
        DeviceError,
        match=f"captured .*{name} failed with error 719.*; load .* without CUDA graphs$",
    ):
        third()
    assert "graph" not in driver.alive.values()


def test_a_recording_with_calls_of_the_host_is_refused(
    third: Callable[[], object], driver: StandIn
) -> None:
    driver.node = 3
    with pytest.raises(DeviceError, match=r"would call the host in it.*without CUDA graphs$"):
        third()
    assert not {"graph", "executable"} & {*driver.alive.values()}


@pytest.mark.parametrize("error", [RuntimeError("not permitted\nmore of it"), KeyboardInterrupt()])
def test_a_recording_that_is_broken_off_leaves_the_stream_free(
    third: Callable[[], object], driver: StandIn, error: BaseException
) -> None:
    driver.error = error
    wanted = DeviceError if isinstance(error, Exception) else type(error)
    with pytest.raises(wanted) as caught:
        third()
    if wanted is DeviceError:
        assert "not permitted); load the bundle without CUDA graphs" in str(caught.value)
    assert driver.recorded is None
    assert "graph" not in driver.alive.values()


def test_an_empty_recording_is_refused(third: Callable[[], object], driver: StandIn) -> None:
    driver.nodes = False
    with pytest.raises(DeviceError, match=r"\(it is empty\)"):
        third()


def test_cuda_graphs_on_the_cpu_are_refused(bundle: Path) -> None:
    with pytest.raises(DeviceError, match=r"^CUDA graphs need --device cuda, and a bundle"):
        dash_onnx.load(bundle, cuda_graphs=True)
