"""Where, when and with which versions a part of the results was measured."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dash_onnx.bench.memory import read_gigabytes_per_s
from dash_onnx.runtime.machine import machine_name

PACKAGES = (
    "dash-onnx onnxruntime numpy torch transformers onnxruntime-genai openvino-genai "
    "llama-cpp-python lm-eval"
).split()


def circumstances(root: Path, files: Sequence[Path], bundle: Path | None) -> dict[str, Any]:
    """Facts that results.py compares: it refuses parts of one bundle that differ in them.

    Args:
        root: root of the repository.
        files: files that the measurement reads.
        bundle: the measured bundle, if other parts measure it too.
    """
    git = ["git", "-C", str(root)]
    commit = subprocess.check_output([*git, "rev-parse", "--short=10", "HEAD"], text=True).strip()
    written = (":!docs", ":!README.md", ":!benchmarks/results")  # written by results.py
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", *written]).returncode
    return {
        "commit": commit + ("+changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{machine_name()}, {os.cpu_count()} cores",
        "read_gb_per_s": round(read_gigabytes_per_s(os.cpu_count() or 1), 1),
        "versions": {"python": platform.python_version(), **_versions()},
        "bundle": _sha256(bundle / "dash.json") if bundle else "",
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
