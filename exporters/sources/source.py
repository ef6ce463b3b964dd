"""What the exporter needs from a model, wherever it comes from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from dash_onnx.core.contract import SOURCE_FOLDER
from dash_onnx.core.errors import DashError, SourceError, UnsupportedError
from dash_onnx.exporters.quantize.blockwise import Quantized, row_groups

T = TypeVar("T")

PICKLED = (
    ": pickled weights are never read; give a release in safetensors, or save the model again with "
    "transformers' save_pretrained()"
)
"""Ends the message about a model that has no other weights."""

_UNUSED = re.compile(r"(inv_freq|attention\.(masked_)?bias|\.eps|_scale|\.scale)$")
"""Names of tensors that no family needs: constants, and factors that are read with another one."""


class Weights(Protocol):
    """Tensors by their Hugging Face name, read from disk at each look-up."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            SourceError: there is no such tensor.
        """
        ...

    def __getitem__(self, name: str) -> torch.Tensor:
        """Reads a tensor.

        Raises:
            SourceError: there is no such tensor, or it has values that are not finite.
        """
        ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Reads only some rows of an embedding; apart from that, like a look-up."""
        ...

    def packed(self, name: str) -> Quantized | None:
        """The weight as integers, if the source stores it in a form that graphs can hold."""
        ...

    def unread(self, prefix: str) -> list[str]:
        """Names of the tensors below a layer's prefix that have not been looked up."""
        ...


@dataclass(frozen=True)
class Table:
    """An embedding `[N, K]` that stays in its file: a slice reads its rows."""

    weights: Weights
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with all rows."""
        return self.weights.shape(self.name)

    def __getitem__(self, rows: slice, /) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        return self.weights.rows(self.name, start, stop)


class Shapes:
    """Weights known only by their shapes; a subclass that has the tensors adds reading.

    Attributes:
        shapes: shape of each tensor, by its Hugging Face name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        """Takes the shapes."""
        self.shapes = dict(shapes)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        if name not in self.shapes:
            raise SourceError(f"the weights have no tensor {name!r}")
        return self.shapes[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        raise SourceError(f"{name} was not downloaded")

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Weights`."""
        return self[name][start:stop]

    def packed(self, name: str) -> None:
        """See `Weights`: none has integers."""

    def unread(self, prefix: str) -> list[str]:
        """See `Weights`: there is none to read."""
        return []


class Wrapped:
    """Weights of another source; a subclass reads some of them in another way."""

    def __init__(self, weights: Weights):
        """Wraps the weights of another source."""
        self.stored = weights

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        return self.stored.shape(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.stored[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Weights`: embeddings are read as they are."""
        return self.stored.rows(name, start, stop)

    def packed(self, name: str) -> Quantized | None:
        """See `Weights`."""
        return self.stored.packed(name)

    def unread(self, prefix: str) -> list[str]:
        """See `Weights`."""
        return self.stored.unread(prefix)


def left_of(names: Iterable[str], read: Collection[str | None], prefix: str) -> list[str]:
    """The names below a layer's prefix that a family may need and that have not been looked up."""
    left = (name for name in names if name.startswith(prefix) and name not in read)
    return sorted(name for name in left if not _UNUSED.search(name))


@dataclass(frozen=True)
class Source:
    """A causal LM opened for reading; no weight has been read yet.

    Attributes:
        kind: how it is stored.
        name: short name, for the manifest.
        config: transformers configuration; its `model_type` selects the architecture.
        weights: tensors by Hugging Face name.
        tokenizer: a tokenizer with a `tokenizers` backend.
        generation_config: EOS ids and sampling defaults.
        files: what all of this is read from.
        revision: commit of a hub id.
        repository: hub id that a GGUF file comes from.
        license: as named in the model's metadata.
        documents: license, notices and model card, which are copied into the bundle.
        integers: whether most of its layers may be stored in integers that the graphs can keep.
    """

    kind: Literal["hub", "folder", "gguf"]
    name: str
    config: PretrainedConfig
    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig
    files: tuple[Path, ...]
    revision: str | None = None
    repository: str | None = None
    license: str | None = None
    documents: tuple[Path, ...] = ()
    integers: bool = True

    @property
    def origin(self) -> str:
        """Kind, name and revision, in one word."""
        place = f"{self.repository}/" if self.repository else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.kind}:{place}{self.name}{revision}"

    def save_text_files(self, folder: Path) -> None:
        """Writes tokenizer, chat template and both configurations, as transformers does.

        The documents are copied to a folder of their own.
        """
        for path in self.documents:
            (folder / SOURCE_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / SOURCE_FOLDER / path.name)
        self.tokenizer.save_pretrained(folder)
        # `save_pretrained` would refuse what the model's own file says, such as an unused option.
        self.generation_config.to_json_file(folder / "generation_config.json")
        self.config.to_json_file(folder / "config.json")


def layers_in(names: Iterable[str]) -> int:
    """How many layers tensors belong to, by their names: `model.layers.3.x`, or `blk.3.x`."""
    found = (re.match(r"(?:\w+\.layers|blk)\.(\d{1,9})\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def readable(what: Path | str, load: Callable[[], T], problem: str = "cannot be read") -> T:
    """Runs a loader; whatever a damaged file makes it raise becomes a one-line error.

    Raises:
        SourceError: the loader raised something.
    """
    try:
        return load()
    except DashError:
        raise
    except Exception as error:
        raise SourceError(f"{what} {problem} ({type(error).__name__}: {error})") from None


def finite(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight unchanged if all its values are finite.

    Raises:
        SourceError: it has values that are not finite.
    """
    if not all(torch.isfinite(rows).all() for rows in row_groups(torch.atleast_1d(weight))):
        raise SourceError(f"{name} has values that are not finite: the weights are damaged")
    return weight


def check_layers(path: Path, claimed: object, found: int) -> None:
    """Refuses a configuration that has more or fewer layers than the weights.

    Raises:
        SourceError: the numbers differ.
    """
    if not found:
        raise SourceError(
            f"{path} has no tensor named as in the layers of a causal LM: it holds another kind of "
            "model, or one in another format"
        )
    if claimed != found:
        raise SourceError(
            f"{path} has {found} layers, its configuration says {claimed}: they do not belong "
            "together"
        )


def one_template(templates: object) -> str | None:
    """A single chat template for a model that has several by name, `tool_use` for tools."""
    if not isinstance(templates, Mapping):
        return templates if isinstance(templates, str) else None
    default, tools = templates.get("default"), templates.get("tool_use")
    if default and tools:  # of each, jinja leaves out a newline at its end
        both = (text.removesuffix("\n") for text in (tools, default))
        return "{{% if tools %}}{}{{% else %}}{}{{% endif %}}".format(*both)
    return default or tools


def check_token_ids(source: Source) -> None:
    """Refuses a model whose start or end token is not in its vocabulary.

    Raises:
        SourceError: a token is not in it.
    """
    vocabulary = getattr(source.config, "vocab_size", None)
    for key in ("bos_token_id", "eos_token_id"):
        ids = getattr(source.generation_config, key, None)
        for token in ids if isinstance(ids, list) else [ids]:
            if type(token) is type(vocabulary) is int and not 0 <= token < vocabulary:
                raise SourceError(
                    f"{source.name}: {key} {token} is not in its vocabulary of {vocabulary} tokens"
                )


def check_supported(model_type: str, supported: Collection[str]) -> None:
    """Refuses an architecture without an exporter, naming those that have one.

    Raises:
        UnsupportedError: `model_type` is not in `supported`.
    """
    if model_type not in supported:
        raise UnsupportedError(
            f"architecture {model_type!r} is not supported; supported: "
            + ", ".join(sorted(supported))
        )
