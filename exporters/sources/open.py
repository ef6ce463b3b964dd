"""Decides what the MODEL argument is and opens it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from dash_onnx.core.errors import SourceError, first_line
from dash_onnx.exporters.sources.folder import open_folder
from dash_onnx.exporters.sources.gguf import open_gguf
from dash_onnx.exporters.sources.source import Source, check_token_ids

_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*"]
_HUB_IGNORED = ["consolidated*"]  # the same weights in another layout


def open_source(
    model: str,
    supported: Collection[str],
    requantize: bool = False,
    revision: str | None = None,
) -> Source:
    """Opens a model without reading its weights.

    Args:
        model: a local folder with safetensors, a `.gguf` file, or a hub id (`org/name`).
        supported: the `model_type`s that have an exporter.
        requantize: round quantized weights anew instead of keeping their integers.
        revision: branch, tag or commit of a hub id; None takes its main branch.

    Raises:
        SourceError: nothing readable is there, or a token that it names is not in its vocabulary.
        UnsupportedError: the model's architecture is not in `supported`.
    """
    source = _opened(model, supported, requantize, revision)
    check_token_ids(source)
    return source


def _opened(
    model: str, supported: Collection[str], requantize: bool, revision: str | None
) -> Source:
    path = Path(model)
    if revision is not None and path.exists():
        raise SourceError(f"--revision is for hub ids; {model} is a local path")
    if path.is_dir():
        return open_folder(path, kind="folder", name=path.resolve().name, supported=supported)
    if model.endswith(".gguf"):
        if not path.is_file():
            raise SourceError(f"no GGUF file at {model}")
        return open_gguf(path, supported, requantize)
    if path.exists():
        raise SourceError(f"{model} is neither a folder nor a .gguf file")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise SourceError(f"no model at {model}: not a folder, a .gguf file or a hub id (org/name)")
    folder = _download(model, revision)
    commit = folder.name  # the hub's cache has a folder for each
    return open_folder(folder, kind="hub", name=model, supported=supported, revision=commit)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED
        )
        return Path(found)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, OSError) as error:
        reason = first_line(error)
        if isinstance(error, HfHubHTTPError):
            reason += "; a gated model needs `hf auth login`"
        at = f" at revision {revision!r}" if revision else ""
        raise SourceError(
            f"no local folder {model!r}, and the hub did not give a model of that name{at} "
            f"({reason})"
        ) from None
