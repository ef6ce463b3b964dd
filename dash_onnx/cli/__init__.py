"""The command line tools: one module each; `common` is shared."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import PurePath
from typing import NoReturn

_SCRIPT = PurePath(sys.argv[0] if sys.argv else "")
_TOOL = _SCRIPT.stem if _SCRIPT.stem.startswith("dash-") else "dash-onnx"
# A process started for a tool: its console script, or `python -m dash_onnx`.
_OURS = _TOOL == _SCRIPT.stem or _SCRIPT.parts[-2:] == ("dash_onnx", "__main__.py")


def leave(*_: object) -> NoReturn:
    """Handles Ctrl-C while a tool is still importing: one line, and no traceback."""
    os.write(2, f"\n{_TOOL}: interrupted\n".encode())
    os._exit(130)


# Until `common.run` takes over.
if _OURS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
