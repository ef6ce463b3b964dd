"""`python -m dash_onnx run BUNDLE ...` is `dash-run BUNDLE ...`."""

from __future__ import annotations

import importlib
import sys

TOOLS = ("bench", "eval", "export", "fuse", "info", "profile", "report", "run", "serve", "train")


def main() -> int:
    """Calls the tool that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TOOLS:
        asked = name in ("-h", "--help")
        usage = f"usage: python -m dash_onnx {{{','.join(TOOLS)}}} ..."
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    tool = importlib.import_module(f"dash_onnx.cli.{name}")
    return int(tool.main(sys.argv[2:]))


if __name__ == "__main__":
    raise SystemExit(main())
