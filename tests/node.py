"""Node and the npm packages of an example, for the tests that need them."""

from __future__ import annotations

import shutil
from pathlib import Path

from conftest import missing

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> Path:
    """The folder of an example whose packages are installed; skips without, fails in CI."""
    folder = EXAMPLES / name
    if shutil.which("node") is None:
        missing("node is not installed")
    if not (folder / "node_modules").is_dir():
        missing(f"examples/{name} lacks its packages: run `make node`")
    return folder
