"""Node and the npm packages of an example, for the tests that need them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> Path:
    """The folder of an example whose packages are installed; skips without, fails in CI."""
    folder = EXAMPLES / name
    missing = []
    if shutil.which("node") is None:
        missing.append("node is not installed")
    elif not (folder / "node_modules").is_dir():
        missing.append(f"examples/{name} lacks its packages: run `make node`")
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing[0])
    return folder
