"""Chooses the calibration tokens: from the user's text, or from what the model writes itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from dash_onnx.core.arrays import Ids
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.conversation import Message, rendered
from dash_onnx.core.documents import plain
from dash_onnx.core.errors import SourceError
from dash_onnx.core.facts import Calibration, ModelFacts
from dash_onnx.core.text import begin_of
from dash_onnx.exporters.calibration.draw import draw
from dash_onnx.exporters.calibration.openings import openings
from dash_onnx.exporters.calibration.self_written import sample_text
from dash_onnx.exporters.calibration.texts import TextSource, names_of
from dash_onnx.exporters.sources import Source

SINK_TOKENS = 4
"""First tokens that soak up attention and carry massive activations (StreamingLLM, 2309.17453)."""

SEQUENCES = 64
LENGTH = 256
_FEWER_ABOVE = 500_000_000  # parameters in the layers


def sequences_of(facts: ModelFacts, exact: bool) -> int:
    """Number of sequences that a model is calibrated on.

    Args:
        facts: sizes of the model; a large one gets fewer, as each takes long.
        exact: whether its layers keep their integers, so that GPTQ rounds nothing.
    """
    large = facts.num_layers * facts.layer_parameters > _FEWER_ABOVE
    return SEQUENCES // 2 if large or exact else SEQUENCES


def calibration_ids(
    source: Source,
    texts: Sequence[TextSource],
    seed: int,
    draft: Callable[[], Bundle],
    min_tokens: int = 0,
    sequences: int = SEQUENCES,
) -> tuple[Ids, Calibration]:
    """Returns token ids `[sequences, length]` and where they came from.

    Args:
        texts: the user's own; if there are none, the model writes the text itself.
        seed: seed for sampling, and for the order of the sequences.
        draft: makes a bundle of the model to write the text.
        min_tokens: minimum number of tokens that the texts must hold.
        sequences: requested number; texts may hold fewer.

    Raises:
        SourceError: a text cannot be read, or all are too short.
    """
    if texts:
        ids = _from_text(source, texts, min_tokens, sequences)
        ids = np.random.default_rng(seed).permutation(ids)  # the first ones stand for all
    else:
        ids = _self_generated(source, seed, draft, sequences)
    return ids, Calibration(
        source=names_of(texts) or "self-generated",
        sequences=ids.shape[0],
        tokens=ids.size,
        sink_tokens=SINK_TOKENS,
        seed=seed,
        sha256=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
    )


def _from_text(source: Source, texts: Sequence[TextSource], min_tokens: int, sequences: int) -> Ids:
    template = source.tokenizer.chat_template
    known = source.tokenizer.special_tokens_map.items()
    special = {name: text for name, text in known if isinstance(text, str)}

    def render(messages: Sequence[Message]) -> str:
        return plain(messages) if template is None else rendered(template, messages, {}, special)

    encode = _encoder(source)
    length = min(LENGTH, source.config.max_position_embeddings)
    least = max(2 * length, min_tokens)
    return draw(
        texts,
        render,
        partial(encode, add_special_tokens=False),
        sequences=sequences,
        length=length,
        least=least,
        purpose="calibration",
        begin=begin_of(encode),
    )


def _self_generated(source: Source, seed: int, draft: Callable[[], Bundle], sequences: int) -> Ids:
    """Documents only: GPTQ loses less with them than with conversations (docs/decisions/0083)."""
    generator, bundle = np.random.default_rng(seed), draft()
    length = min(LENGTH, bundle.manifest.model.max_length)
    if length <= SINK_TOKENS:
        raise SourceError(
            f"a context of {length} tokens is too short for the model to write calibration text: "
            "choose a longer --max-length, or give --calibration"
        )
    encode = _encoder(source)
    begin = begin_of(encode)

    def begun(text: str) -> Ids:
        return np.concatenate([begin, encode(text, add_special_tokens=False)])

    first = openings(begun, sequences, length, generator)
    return sample_text(bundle, first, length, generator, "calibration text")


def _encoder(source: Source) -> Callable[..., Ids]:
    def encode(text: str, *, add_special_tokens: bool = True) -> Ids:
        found = source.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return np.asarray(found["input_ids"], np.int64)

    return encode
