"""What the tools do before they import PyTorch and transformers."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys

from dash_onnx.exporters.installed import require

_LOG = logging.getLogger(__name__)


def prepare_export() -> None:
    """Checks that the packages an export needs are installed, and imports them.

    They are silent unless the log is verbose. Garbage collection skips what they import, half a
    million permanent objects: an export collects after each layer.

    Raises:
        DashError: some are missing.
    """
    require()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    collects = gc.isenabled()
    gc.disable()
    try:
        import transformers

        import dash_onnx.exporters.pipeline  # noqa: F401
    finally:
        if collects:
            gc.enable()
    if not gc.get_freeze_count():
        gc.freeze()
        atexit.register(_unfreeze)
    if _LOG.isEnabledFor(logging.DEBUG):
        transformers.logging.set_verbosity_warning()
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _unfreeze() -> None:
    """Before Triton, which PyTorch's default build imports, prints all that is left as leaks."""
    if "triton" in sys.modules:
        gc.unfreeze()
