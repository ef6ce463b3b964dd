"""What the tools do before they import PyTorch and transformers."""

from __future__ import annotations

import logging
import os

from dash_onnx.exporters.installed import require

_LOG = logging.getLogger(__name__)


def prepare_export() -> None:
    """Checks that the tools of the export are installed; they are quiet unless we are verbose.

    Raises:
        DashError: some are missing.
    """
    require()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    if _LOG.isEnabledFor(logging.DEBUG):
        transformers.logging.set_verbosity_warning()
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
