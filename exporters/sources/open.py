"""Decides what the MODEL argument is and opens it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from dash_onnx.core.errors import SourceError, first_line
from dash_onnx.core.gguf import parts_of, stem_of
from dash_onnx.exporters.sources.folder import has_weights, open_folder
from dash_onnx.exporters.sources.gguf import open_gguf
from dash_onnx.exporters.sources.license import DOCUMENTS, documents_in, license_of_card
from dash_onnx.exporters.sources.source import PICKLED, Source, check_token_ids

T = TypeVar("T")

_WEIGHTS = ("*.safetensors",)
_TEXT_FILES = ("*.json", "*.jinja", "tokenizer*", "merges.txt", *DOCUMENTS)
_USUAL = "Q4_K_M"
_ONLINE = ": go online, or give a local folder or a GGUF file"
_HUB_IGNORED = ["consolidated*", "original/*"]  # the same weights in another layout


def open_source(
    model: str,
    supported: Collection[str],
    requantize: bool = False,
    revision: str | None = None,
    *,
    weights: bool = True,
) -> Source:
    """Opens a model without reading its weights.

    Args:
        model: a local folder with safetensors, a `.gguf` file, or a hub id: `org/name`, or
            `org/name:Q4_K_M` for the GGUF file of that quantization in it.
        supported: the `model_type`s that have an exporter.
        requantize: requantize quantized weights instead of keeping their integers.
        revision: branch, tag or commit of a hub id; None takes its main branch.
        weights: download a hub id's weights; if False, only names and shapes are known of those not
            yet downloaded. A GGUF file is always downloaded.

    Raises:
        SourceError: nothing readable is there, or it names a token that its vocabulary lacks.
        UnsupportedError: the model's architecture is not in `supported`.
    """
    source = _opened(model, supported, requantize, revision, weights)
    check_token_ids(source)
    return source


def _opened(
    model: str, supported: Collection[str], requantize: bool, revision: str | None, weights: bool
) -> Source:
    path = Path(model)
    if revision is not None and path.exists():
        raise SourceError(f"--revision is for hub ids; {model} is a local path")
    if path.is_dir():
        _refuse(requantize, model)
        return open_folder(path, kind="folder", name=path.resolve().name, supported=supported)
    if model.endswith(".gguf"):
        if not path.is_file():
            raise SourceError(f"no GGUF file at {model}")
        return open_gguf(path, supported, requantize)
    if path.exists():
        raise SourceError(f"{model} is neither a folder nor a .gguf file")
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise SourceError(f"no model at {model}: not a folder, a .gguf file or a hub id (org/name)")
    name, _, quantization = model.partition(":")
    if not quantization:
        folder = _download(name, revision, *_TEXT_FILES, *(_WEIGHTS if weights else ()))
        commit = folder.name  # the hub's cache has a folder per commit
        shapes = {} if weights or has_weights(folder) else _shapes(name, commit)
        if shapes or any(folder.glob("*.safetensors")):
            _refuse(requantize, model)
            return open_folder(
                folder, kind="hub", name=name, supported=supported, revision=commit, shapes=shapes
            )
    file = _gguf_file(name, quantization, _files(name, revision, quantization))
    folder = _download(name, revision, *parts_of(file), *DOCUMENTS)
    found = open_gguf(folder / file, supported, requantize)
    documents = documents_in(folder)
    return replace(
        found,
        revision=folder.name,
        repository=name,
        license=found.license or license_of_card(documents),
        documents=documents,
    )


def _refuse(requantize: bool, model: str) -> None:
    if requantize:
        raise SourceError(f"--requantize is for GGUF files, and {model} is in safetensors")


def _files(name: str, revision: str | None, quantization: str) -> list[str]:
    """Names of the files of a hub id; without the hub, of those in its cache if it has the wanted.

    Raises:
        SourceError: see `_asked`.
    """
    import huggingface_hub

    try:
        info = _asked(name, revision, lambda: huggingface_hub.model_info(name, revision=revision))
    except SourceError as error:
        folder = _download(name, revision, *DOCUMENTS)  # the cache's, or the same error
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
        if any(_is_of(file, quantization or _USUAL) for file in files):
            return files
        here = f"; or ask for a file that is here: {', '.join(files)}" if files else ""
        raise SourceError(f"{error}{here}") from None
    return [file.rfilename for file in info.siblings or []]


def _gguf_file(name: str, quantization: str, files: Sequence[str]) -> str:
    """The file of a quantization; if none is named, Q4_K_M as in llama.cpp, or the first one.

    Raises:
        SourceError: there is no such file.
    """
    found = [file for file in files if file.endswith(".gguf") and "mmproj" not in file.lower()]
    wanted = quantization or _USUAL
    fitting = [file for file in found if _is_of(file, wanted)]
    if not fitting and not quantization:
        fitting = found
    if fitting:
        return min(fitting, key=lambda file: (len(stem_of(file)), file))  # part 1 of a split one
    if quantization:
        have = ", ".join(Path(file).name for file in found) or "it has none at all"
        raise SourceError(f"{name} has no GGUF file of {quantization}: {have}")
    pickled = any(file.endswith((".bin", ".pt")) for file in files)
    raise SourceError(f"{name} has no safetensors or GGUF weights{PICKLED if pickled else ''}")


def _is_of(file: str, quantization: str) -> bool:
    return quantization.lower() in Path(file).name.lower()


def _shapes(name: str, revision: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a hub id, read from the headers of its files."""
    import huggingface_hub

    try:
        metadata = _asked(
            name,
            revision,
            lambda: huggingface_hub.get_safetensors_metadata(name, revision=revision),
        )
    except SourceError:
        return {}
    return {
        tensor: tuple(info.shape)
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    }


def _download(model: str, revision: str | None, *patterns: str) -> Path:
    """Downloads some files of a hub id; returns their folder in the hub's cache.

    Raises:
        SourceError: see `_asked`.
    """
    import huggingface_hub

    found = _asked(
        model,
        revision,
        lambda: huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=[*patterns], ignore_patterns=_HUB_IGNORED
        ),
    )
    return Path(found)


def _asked(model: str, revision: str | None, ask: Callable[[], T]) -> T:
    """Calls the hub and returns its answer.

    Raises:
        SourceError: the call failed; the message states a remedy.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return ask()
    except Exception as error:  # also from its HTTP client, which differs between releases
        reason, remedy = first_line(error), ""
        if constants.HF_HUB_OFFLINE and not isinstance(error, HFValidationError):
            reason, remedy = "HF_HUB_OFFLINE is set", _ONLINE
        elif isinstance(error, LocalEntryNotFoundError | ConnectionError):
            remedy = _ONLINE
        elif isinstance(error, HfHubHTTPError):
            remedy = ": check the name; a gated or private model needs `hf auth login`"
        elif not isinstance(error, OSError | ValueError):
            remedy = _ONLINE
        at = f" at revision {revision!r}" if revision else ""
        raise SourceError(
            f"no local folder {model!r}, and the hub did not give a model of that name{at} "
            f"({reason}){remedy}"
        ) from None
