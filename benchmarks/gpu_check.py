"""Does a bundle for CUDA work on this machine, and how fast is it? In nine minutes, offline.

    make gpu-check WHEELS=folder                                       # on a machine with a GPU
    python benchmarks/gpu_check.py --shape 8b --layers 32 --limit 6    # a larger model
    python benchmarks/gpu_check.py --device cpu --layers 2 --limit 6   # a rehearsal on any other

torch, transformers, onnx and onnxscript must be installed; everything else is taken from the wheels
in FOLDER, above all onnxruntime-gpu. Every part runs in its own process with a time limit, so that
a failure in one does not hide others; the summary is printed last, and as JSON in
build/gpu/summary.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
BUDGET_S = 530.0  # for all parts; the remainder limits each part
TEXT = ROOT / "README.md"  # enough for random weights


@dataclass
class Part:
    """A part of the check, and its result.

    Attributes:
        name: name in the summary.
        command: command of the process.
        limit_s: seconds after which it is stopped.
        needs: file without which it cannot run.
        seconds: time it took.
        failed: why there is no result, in one line; "" if there is one.
        result: its output: the JSON that it printed, else its last lines.
    """

    name: str
    command: list[str]
    limit_s: float
    needs: Path | None = None
    seconds: float = 0.0
    failed: str = ""
    result: Any = None

    def run(self, most_s: float, environment: dict[str, str]) -> None:
        """Runs the part with a time limit; its messages go to stderr as they arrive."""
        if self.needs is not None and not self.needs.exists():
            self.failed = f"there is no {self.needs}: an earlier part failed"
            return
        started = time.monotonic()
        try:
            done = subprocess.run(
                self.command,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                timeout=max(most_s, 1.0),
                env={**os.environ, **environment},
                cwd=ROOT,
            )
        except subprocess.TimeoutExpired:
            self.failed = f"stopped after {time.monotonic() - started:.0f} s"
            return
        finally:
            self.seconds = time.monotonic() - started
        lines = done.stdout.strip().splitlines()
        try:
            self.result = json.loads(lines[-1])
        except (IndexError, ValueError):
            self.result = lines[-3:]
        if done.returncode:
            self.failed = f"exit code {done.returncode}"


def main() -> int:
    """Runs the parts; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="to install from")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", type=Path, help="instead of random weights; needs its --layers")
    parser.add_argument("--shape", default="1b", help="of random weights (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=16, help="(default: 16, as Llama 1B)")
    parser.add_argument(
        "--genai", type=Path, nargs="*", default=[], help="models of GenAI's builder to run beside"
    )
    parser.add_argument("--limit", type=float, default=1, help="times the usual time limits")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.machine:
        print(json.dumps(machine()))
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        site = ready(arguments.wheels)
    except subprocess.CalledProcessError as error:
        print(f"gpu-check: error: {error.cmd[1:4]} ended with {error.returncode}", file=sys.stderr)
        return 2
    path, libraries = [site], cuda_libraries(site)
    if "PYTHONPATH" in os.environ:
        path.append(os.environ["PYTHONPATH"])
    environment = {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    started, parts = time.monotonic(), list_of_parts(arguments)
    for part in parts:
        if arguments.parts and part.name not in arguments.parts:
            continue
        print(f"gpu-check: {part.name}: {' '.join(part.command[1:])}", file=sys.stderr, flush=True)
        left_s = arguments.limit * BUDGET_S - (time.monotonic() - started)
        part.run(min(arguments.limit * part.limit_s, left_s), environment)
        print(line_of(part, parts[0].result), file=sys.stderr, flush=True)
    done = [part for part in parts if part.seconds or part.failed]
    summary = {part.name: part.result if not part.failed else part.failed for part in done}
    (WORK / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"\ngpu-check: {time.monotonic() - started:.0f} s")
    for part in done:
        print(line_of(part, parts[0].result))
    return int(any(part.failed for part in done))


def ready(wheels: Path | None) -> str:
    """Folder with the packages that this Python lacks: those of the wheels, and this project."""
    site = WORK / "site"
    if wheels is not None:
        files = sorted(map(str, wheels.glob("*.whl")))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(site), *files], check=True)
    try:
        known = importlib.util.find_spec("dash_onnx.exporters")
    except ModuleNotFoundError:  # of the package above it
        known = None
    if known is None:
        build = "import setuptools; setuptools.setup()"
        command = [sys.executable, "-c", build, "--quiet", "build_py", "--build-lib", str(site)]
        newest = {**os.environ, "PYTHONPATH": str(site)}  # setuptools may be among the wheels
        subprocess.run(command, check=True, cwd=ROOT, env=newest)
    return str(site)


def cuda_libraries(site: str) -> list[str]:
    """Folders of CUDA's libraries: PyTorch's packages are not where ONNX Runtime looks for them."""
    found = [str(lib) for folder in (site, *sys.path) for lib in Path(folder).glob("nvidia/*/lib")]
    return [*found, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]


def machine() -> dict[str, Any]:
    """The GPU as seen by the driver, torch and ONNX Runtime, all of which is required."""
    import onnxruntime
    import torch

    found: dict[str, Any] = {
        "onnxruntime": onnxruntime.__version__,
        "build": onnxruntime.get_build_info(),
        "providers": " ".join(onnxruntime.get_available_providers()),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["GPU"] = torch.cuda.get_device_name()
        found["free GB"] = f"{free / 1e9:.1f} of {total / 1e9:.1f}"
        found["read GB/s"] = round(_read_gigabytes_per_s(), 1)
    return found


def _read_gigabytes_per_s() -> float:
    """The best of some sums over a gigabyte of the GPU's memory."""
    import torch

    numbers, best = torch.ones(1 << 28, device="cuda"), 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        numbers.sum()
        torch.cuda.synchronize()
        best = max(best, numbers.nbytes / (time.perf_counter() - started) / 1e9)
    return best


def list_of_parts(arguments: argparse.Namespace) -> list[Part]:
    """The parts, in the order in which a defect would show first."""
    python, here, device = sys.executable, str(ROOT / "benchmarks"), arguments.device
    model, out = (arguments.model or WORK / "model").resolve(), WORK / device
    tool = [python, "-m", "dash_onnx"]
    fours, rest = divmod(arguments.layers, 4)
    quarter = "static:" + ",".join(["int4*3,skip"] * fours + ["int4"] * rest)
    bench = [*tool, "bench", str(out), "--json", "--rounds", "3", "--limit", "2"]
    marked, tests = "not gpu and not slow", ["tests/test_devices.py"]
    if device == "cuda":
        marked, tests = "gpu", [*tests, "tests/test_train.py"]
    fixed = [word for run in ("full", "int8", "int4", quarter) for word in ("--policy", run)]
    peers = [word for path in arguments.genai for word in ("--peer", f"genai:{path}")]
    trained = [word for run in ("int4", "dash@balanced", "dash@fast") for word in ("--policy", run)]
    trained += ["--skip", "quality"]
    export = [*tool, "export", str(model), str(out), "--device", device, "--overwrite", "--json"]
    export += ["--variants", "full,int8,int4", "--check", "none"]
    text = ["--calibration", str(TEXT), "--train-device", device]
    quiet = ["--log-level", "warning"]
    alone = ["--cuda-graphs", "--skip", "quality", "--skip", "contexts"]
    big = [python, f"{here}/big.py", str(model), "--shape", arguments.shape]
    big += ["--layers", str(arguments.layers)]
    manifest = out / "dash.json"
    return [
        Part("machine", [python, f"{here}/gpu_check.py", "--machine"], 60),
        Part("tests", [python, "-m", "pytest", "-q", "-m", marked, *tests], 150),
        *([] if arguments.model else [Part("model", big, 60)]),
        Part("export", [*export, *text, "--effort", "none", *quiet], 300, model),
        Part("bench", [*bench, *fixed, *peers], 120, manifest),
        *(
            [Part("bench with CUDA graphs", [*bench, *fixed, *alone], 90, manifest)]
            if device == "cuda"
            else []
        ),
        Part("rows", [python, f"{here}/rows.py", str(out), "--json"], 60, manifest),
        Part("train", [*tool, "train", str(out), *text, *quiet, "--json"], 240, manifest),
        Part("bench of the policy", [*bench, *trained], 60, manifest),
        Part("overlap", [python, f"{here}/overlap.py", str(out), "--json"], 60, manifest),
    ]


def line_of(part: Part, machine: Any) -> str:
    """Name, seconds and findings; weights read per second, as a share of what the GPU can read."""
    limit = machine.get("read GB/s") if isinstance(machine, dict) else None
    found = f"FAILED: {part.failed}" if part.failed else ""
    result = part.result
    if isinstance(result, dict) and "contenders" in result:
        rows = result["contenders"]
        first = rows[0]["tokens_per_s"]
        found += ", ".join(
            f"{row['name']} {row['tokens_per_s']:.1f} tokens/s ({row['tokens_per_s'] / first:.2f})"
            + ("" if row["kl"] is None else f" KL {row['kl']:.4f}")
            + _share(row["gb_per_s"], limit)
            for row in rows
        )
    elif isinstance(result, dict):
        plain = (f"{key} {value}" for key, value in result.items() if not _nested(value))
        found += ", ".join(plain)
    elif result:
        found += " " + " | ".join(result)
    return f"gpu-check: {part.name}: {part.seconds:.0f} s; {found}"


def _share(read: float | None, limit: float | None) -> str:
    return f" {read / limit:.0%} of {limit} GB/s" if read and limit else ""


def _nested(value: object) -> bool:
    return isinstance(value, dict | list)


if __name__ == "__main__":
    sys.exit(main())
