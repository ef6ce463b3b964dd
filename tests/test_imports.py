"""What an import loads, and what is refused with a remedy."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import dash_onnx
from dash_onnx.cli import common, fuse
from dash_onnx.cli.prepare import prepare_export
from dash_onnx.core.errors import DeviceError
from dash_onnx.exporters.export import pipeline
from dash_onnx.exporters.fused import CLIENTS
from dash_onnx.exporters.train.options import PLANS
from dash_onnx.runtime import ort
from dash_onnx.runtime.model import Model

EXPORT_ONLY = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "gguf")

BLOCK = f"import sys\nfor name in {EXPORT_ONLY!r}: sys.modules[name] = None\n"
REPORT = (
    "import json\n"
    "roots = {name.partition('.')[0] for name, module in sys.modules.items() if module}\n"
    "print(json.dumps([result, sorted(roots)]))\n"
)
GENERATE = (
    "from dash_onnx.runtime.load import load\n"
    "model = load(sys.argv[1], threads=1)\n"
    "steps = model.generate_step([10, 20, 30], policy='random:1', max_new_tokens=6,"
    " ignore_eos=True)\n"
    "result = [step.token for step in steps]\n"
    "result.append(model.generate('the ships', max_new_tokens=3))\n"
    "result.append(model.chat([{'role': 'user', 'content': 'Hi'}], max_new_tokens=3))\n"
)


def python(
    code: str, *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def report(code: str, *arguments: object) -> tuple[list, set[str]]:
    """Runs code that sets `result`; returns it with the roots of all loaded modules."""
    done = python(code + REPORT, *arguments)
    assert done.returncode == 0, done.stderr
    result, roots = json.loads(done.stdout)
    return result, set(roots)


@pytest.fixture(scope="module")
def expected(tiny_model: Model) -> list:
    """What `GENERATE` gives in this process."""
    steps = tiny_model.generate_step(
        [10, 20, 30], policy="random:1", max_new_tokens=6, ignore_eos=True
    )
    return [
        *(step.token for step in steps),
        tiny_model.generate("the ships", max_new_tokens=3),
        tiny_model.chat([{"role": "user", "content": "Hi"}], max_new_tokens=3),
    ]


def test_the_runtime_generates_where_the_exporters_packages_are_missing(
    tiny_bundle: Path, expected: list
) -> None:
    result, roots = report(BLOCK + GENERATE, tiny_bundle)
    assert result == expected
    assert not roots & set(EXPORT_ONLY)


def test_the_runtime_does_not_load_the_exporters_packages_where_they_are_installed(
    tiny_bundle: Path, expected: list
) -> None:
    result, roots = report("import sys\n" + GENERATE, tiny_bundle)
    assert result == expected
    assert not roots & set(EXPORT_ONLY)


@pytest.mark.parametrize("module", ["run", "eval"])
def test_the_tools_of_the_runtime_do_without_the_exporters_packages(module: str) -> None:
    code = f"import dash_onnx.cli.{module}, dash_onnx.eval.text\nresult = []\n"
    _, roots = report(BLOCK + code)
    assert not roots & {*EXPORT_ONLY, "lm_eval", "datasets"}


def test_tasks_do_without_the_exporters_packages(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"context": "the keeper of the", "continuation": "lighthouse"}\n')
    code = (
        "import sys, dash_onnx.cli.eval as tool\n"
        "result = tool.main([sys.argv[1], '--task', sys.argv[2], '--policy', 'int4'])\n"
    )
    done = python(code + REPORT, tiny_bundle, path)
    assert done.returncode == 0, done.stderr
    result, roots = json.loads(done.stdout.splitlines()[-1])
    assert result == 0 and not set(roots) & {"torch", "transformers"}


def test_importing_the_package_loads_neither_runtime_nor_exporters() -> None:
    _, roots = report("import sys\nimport dash_onnx\nresult = dash_onnx.__version__\n")
    assert not roots & {*EXPORT_ONLY, "onnxruntime", "tokenizers", "numpy", "jinja2"}


def test_the_package_offers_load_and_model() -> None:
    from dash_onnx.runtime import load, model

    assert dash_onnx.load is load.load
    assert dash_onnx.Model is model.Model
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        dash_onnx.lode  # noqa: B018


def test_the_steps_of_the_export_import_pytorch_when_they_are_called() -> None:
    _, roots = report(BLOCK + "from dash_onnx import export, fuse, train\nresult = []\n")
    assert not roots & {*EXPORT_ONLY, "onnxruntime"}
    done = python(BLOCK + "import dash_onnx\ndash_onnx.export('model', 'out')\n")
    assert "DashError: reading a model needs torch" in done.stderr


def test_the_package_works_in_a_clone_beside_an_installed_one(tmp_path: Path) -> None:
    """Python finds the clone's first, where runtime/ and exporters/ lie beside it."""
    for folder in ("dash_onnx", "runtime", "exporters"):
        shutil.copytree(Path(dash_onnx.__file__).parents[1] / folder, tmp_path / folder)
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import dash_onnx, dash_onnx.exporters.api\n"
        "print(dash_onnx.load.__code__.co_filename)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).parent == tmp_path / "runtime"


@pytest.mark.parametrize(
    ("limit", "wanted"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 8), (None, 8)]
)
def test_threads_keep_to_the_limit_of_a_container(
    limit: str | None, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    if limit is not None:
        quota.write_text(f"{limit}\n")
    monkeypatch.setattr(ort, "_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)}, raising=False)
    assert ort._usable_cores() == wanted


def test_a_list_of_the_command_line_is_one_in_python(
    tiny_folder: Path, night: Path, tmp_path: Path
) -> None:
    manifest = dash_onnx.export(
        tiny_folder, tmp_path / "out", variants="int8,int4", calibration=str(night)
    )
    assert manifest.variants == ("int8", "int4") and manifest.wide is None
    assert manifest.calibration.source == "night.txt"


def test_every_exported_name_exists() -> None:
    assert all(hasattr(dash_onnx, name) for name in dash_onnx.__all__)


# ONNX Runtime

PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]
find = ort.onnxruntime.__wrapped__  # past the cache, which others have filled


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that these distributions are installed, and which version is imported."""

    def pretend(*distributions: str, version: str | None) -> None:
        present = dict.fromkeys(distributions, version)
        monkeypatch.setattr(ort, "_version", present.get)
        module = None
        if version is not None:
            module = ModuleType("onnxruntime")
            module.__version__ = version  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "onnxruntime", module)

    return pretend


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that ONNX Runtime has these providers."""

    def pretend(*names: str) -> None:
        module = SimpleNamespace(get_available_providers=lambda: list(names), __version__="1.32.0")
        monkeypatch.setattr(ort, "onnxruntime", lambda: module)

    return pretend


def test_the_versions_asked_for_are_those_that_the_extras_install() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    wanted = {device: ".".join(map(str, least)) for device, least in ort.MINIMUM.items()}
    assert extras["cpu"] == [f"onnxruntime>={wanted['cpu']}"]
    assert extras["gpu"] == [f"onnxruntime-gpu>={wanted['cuda']}"]


def test_the_installed_onnxruntime_is_found_and_new_enough() -> None:
    assert find() is sys.modules["onnxruntime"]


@pytest.mark.parametrize(
    ("name", "version"), [("onnxruntime", "1.32.0"), ("onnxruntime-gpu", "1.28.0")]
)
def test_either_package_alone_will_do(
    installed: Callable[..., None], name: str, version: str
) -> None:
    installed(name, version=version)
    assert find() is sys.modules["onnxruntime"]


def test_both_packages_at_once_are_refused(installed: Callable[..., None]) -> None:
    installed("onnxruntime", "onnxruntime-gpu", version="1.30.0")
    with pytest.raises(DeviceError, match="`pip uninstall onnxruntime onnxruntime-gpu`"):
        find()


def test_a_missing_onnxruntime_is_told_with_the_extra_to_install(
    installed: Callable[..., None],
) -> None:
    installed(version=None)
    with pytest.raises(DeviceError, match=r"not installed: .* `pip install '.\[cpu\]'`"):
        find()


@pytest.mark.parametrize("version", ["1.31.1", "1.30.0", "1.27.4", "1.9.0", "0.99.0", "1.23"])
def test_an_old_onnxruntime_is_refused_with_the_version_wanted(
    installed: Callable[..., None], version: str
) -> None:
    installed("onnxruntime", version=version)
    with pytest.raises(DeviceError, match=f"Runtime {version} is too old .*'onnxruntime>=1.32'`"):
        find()


def test_an_old_gpu_package_is_not_mended_by_installing_the_other_one(
    installed: Callable[..., None],
) -> None:
    installed("onnxruntime-gpu", version="1.23.2")
    with pytest.raises(DeviceError, match=r"'onnxruntime-gpu>=1.28'"):
        find()


def test_a_gpu_package_that_is_new_enough_for_cuda_alone_is_refused_on_the_cpu(
    installed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tiny_bundle: Path,
    tmp_path: Path,
) -> None:
    installed("onnxruntime-gpu", version="1.30.0")
    module = find()
    monkeypatch.setattr(module, "get_available_providers", lambda: PROVIDERS, raising=False)
    for user in (ort, pipeline):
        monkeypatch.setattr(user, "onnxruntime", lambda: module)
    ort.check_device("cuda")
    refused = r"1.30.0 is too old for the device 'cpu'; .*'onnxruntime-gpu>=1.32'`"
    with pytest.raises(DeviceError, match=refused):
        dash_onnx.load(tiny_bundle)
    with pytest.raises(DeviceError, match=refused):
        pipeline.export("model", tmp_path, pipeline.ExportOptions())


@pytest.mark.parametrize("version", ["1.32.0", "1.32", "1.100.0", "2.0.0", "1.32.0.dev20260101"])
def test_newer_versions_are_compared_as_numbers(version: str) -> None:
    ort.check_version(version, "cpu")


def test_a_failure_is_not_remembered(installed: Callable[..., None]) -> None:
    ort.onnxruntime.cache_clear()
    installed(version=None)
    with pytest.raises(DeviceError):
        ort.onnxruntime()
    installed("onnxruntime", version="1.32.0")
    try:
        assert ort.onnxruntime() is sys.modules["onnxruntime"]
    finally:
        ort.onnxruntime.cache_clear()


def test_an_interrupt_while_onnx_runtime_loads_is_no_broken_installation(
    installed: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pybind11 makes an ImportError of it."""
    installed("onnxruntime", version=None)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    raised = "raise ImportError('initialization failed') from KeyboardInterrupt()"
    (tmp_path / "onnxruntime.py").write_text(raised)
    monkeypatch.syspath_prepend(tmp_path)
    ort.onnxruntime.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        ort.onnxruntime()


def test_the_cpu_is_available_here() -> None:
    ort.check_device("cpu")


@pytest.mark.parametrize("device", ["tpu", "CPU", "", "cuda:0"])
def test_an_unknown_device_is_refused_with_the_known_ones(device: str) -> None:
    with pytest.raises(DeviceError, match=f"unknown device '{device}'; choose from cpu, cuda"):
        ort.check_device(device)


def test_a_device_that_onnxruntime_lacks_is_refused_with_the_remedy(
    providers: Callable[..., None],
) -> None:
    providers("AzureExecutionProvider", "CPUExecutionProvider")
    ort.check_device("cpu")
    with pytest.raises(DeviceError, match=r"\(it has cpu\); for cuda, install the extra `\[gpu\]`"):
        ort.check_device("cuda")


def test_cuda_is_taken_where_onnxruntime_has_it(providers: Callable[..., None]) -> None:
    providers("CUDAExecutionProvider", "CPUExecutionProvider")
    ort.check_device("cuda")


def test_loading_on_an_unknown_device_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(DeviceError, match="unknown device 'tpu'"):
        dash_onnx.load(tiny_bundle, device="tpu")  # type: ignore[arg-type]


def test_a_graph_that_onnxruntime_cannot_load_is_a_bundle_error(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(dash_onnx.DashError, match=f"ONNX Runtime cannot load {path}: ") as caught:
        ort.create_session(path, "cpu")
    assert "\n" not in str(caught.value)


def test_every_command_of_the_runtime_works_without_what_windows_lacks(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """Nor does it need a stdout that holds every character."""
    text = tmp_path / "night.txt"
    text.write_text("the keeper of the lighthouse counts the ships in the night\n" * 40)
    blocked = ("fcntl", "resource", "readline", "termios", "pty")
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    code += "from dash_onnx.__main__ import main\nsys.exit(main())\n"
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    for command in (
        ("run", copy, "🚢", "--max-tokens", "3"),
        ("run", copy),
        ("eval", copy, "--text", text, "--window", "32"),
        ("info", copy),
        ("profile", copy, "--force"),
        ("bench", copy, "--policy", "int8", "--max-tokens", "4", "--rounds", "1"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, command)],
            env={**os.environ, "PYTHONIOENCODING": "cp1252"},
            input=b"hello\n",
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, (command, done.stderr)


def test_the_tools_offer_what_the_exporters_know() -> None:
    """They repeat the names, since `--help` must not load torch."""
    assert set(fuse._CLIENTS) == set(CLIENTS)
    assert common.EFFORTS == tuple(PLANS)


def test_collections_of_garbage_leave_out_what_an_export_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: len(frozen))
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    for _ in range(2):
        prepare_export()
    assert frozen == [True]


@pytest.mark.parametrize("triton", [False, True])
def test_what_is_frozen_is_collected_at_exit_if_triton_would_call_it_leaked(triton: bool) -> None:
    program = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
        "from dash_onnx.cli.prepare import prepare_export; prepare_export(); "
        f"sys.modules.update(triton=sys) if {triton} else sys.modules.pop('triton', None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == f"{not triton}\n", done.stderr
