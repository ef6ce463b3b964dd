"""Text that a model writes itself, sampled at temperature 1, for calibration and for training."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_onnx.core.arrays import Ids
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import BundleError, PolicyError
from dash_onnx.core.progress import Phase
from dash_onnx.core.text import TextCodec
from dash_onnx.runtime.deciders import FixedPath
from dash_onnx.runtime.devices import open_backend
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.sessions import Sessions

_BATCH = 96  # most sequences written in parallel
_BLOCK = 1024  # vocabulary tokens
KV_BYTES = 512 << 20
"""Upper bound on the K/V cache of a batch."""


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around the messages of a conversation, as token ids.

    Attributes:
        first: tokens before the user's first message.
        answer: tokens between a user message and the answer.
        user: tokens between an answer and the next user message.
        ends: tokens that end a message.
    """

    first: tuple[int, ...]
    answer: tuple[int, ...]
    user: tuple[int, ...]
    ends: frozenset[int]


def turns_of(codec: TextCodec) -> Turns | None:
    """The turns of a model's chat template; None if it has no template, or one of another kind."""
    marks = [f"({number})" for number in (333, 555, 777)]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        rest = codec.render_chat(messages, answer_next=False)
    except PolicyError:
        return None
    parts = []
    for mark in marks:
        before, _, rest = rest.partition(mark)
        parts.append(tuple(codec.encode(before, add_special_tokens=False).tolist()))
    first, answer, user = parts
    if not (first and answer and user):
        return None
    added = codec.tokenizer.get_added_tokens_decoder()  # any other token also occurs in messages
    ends = {token for token in (answer[0], user[0]) if token in added}
    return Turns(first, answer, user, codec.eos_token_ids | ends)


def self_written(
    bundle: Bundle, codec: TextCodec, sequences: int, length: int, seed: int, label: str
) -> Ids:
    """Training text of a model for which no text was given.

    Every second sequence is a conversation in which the model writes the messages of both sides
    (Magpie, arXiv 2406.08464). The others begin with a random token and become documents of many
    kinds and languages (LLM-QAT, arXiv 2305.17888).

    Args:
        bundle: the bundle whose layers run.
        codec: its tokenizer.
        sequences: number of sequences.
        length: tokens per sequence; capped at the model's context.
        seed: seed for sampling.
        label: progress label.

    Returns:
        Token ids `[sequences, length]`.

    Raises:
        BundleError: the graphs take only one sequence.
    """
    generator, model = np.random.default_rng(seed), bundle.manifest.model
    length = min(length, model.max_length)
    turns = turns_of(codec)
    if turns and len(turns.first) > length // 2:
        turns = None
    words = min(model.vocab_size, codec.tokenizer.get_vocab_size(with_added_tokens=False))
    begin = codec.begin.tolist()
    openings: list[tuple[int, ...]] = []
    for number, token in enumerate(generator.integers(words, size=sequences)):
        openings.append(turns.first if turns and number % 2 == 0 else (*begin, int(token)))
    return sample_text(bundle, openings, length, generator, label, turns)


def sample_text(
    bundle: Bundle,
    openings: Sequence[tuple[int, ...]],
    length: int,
    generator: np.random.Generator,
    label: str,
    turns: Turns | None = None,
) -> Ids:
    """Samples sequences from a bundle, at INT8 if it has it.

    Args:
        bundle: the bundle whose layers run.
        openings: the first tokens of each sequence.
        length: tokens per sequence, including its opening.
        generator: source of randomness.
        label: progress label.
        turns: in sequences that open with `turns.first`, the model writes both sides' messages.

    Returns:
        Token ids `[n, length]`.

    Raises:
        BundleError: the graphs take only one sequence.
    """
    sessions = Sessions(bundle, open_backend(bundle.manifest.target.device))
    if sessions.embed().session.get_inputs()[0].shape[0] == 1:
        raise BundleError(f"{bundle.folder} is of an earlier version of dash-onnx; export again")
    manifest = bundle.manifest
    layers = manifest.model.num_layers
    best = "int8" if "int8" in manifest.variants else manifest.variants[0]
    decider = FixedPath((best,) * layers, manifest.heads[best])
    batch = int(np.clip(KV_BYTES // (manifest.kv_bytes * length), 1, _BATCH))
    parts = np.array_split(np.arange(len(openings)), -(-len(openings) // batch))
    ids = np.empty((len(openings), length), np.int64)
    with Phase(label, total=len(openings) * (length - 1), unit="tokens") as phase:
        for part in parts:
            sequence = SequenceState(sessions, length, len(part))
            writers = [_Writer(openings[int(row)], turns) for row in part]
            ids[part, 0] = [writer.given.popleft() for writer in writers]
            for position in range(length - 1):
                logits = sequence.forward(ids[part, position, None], decider)[0]
                ids[part, position + 1] = [
                    writer.next(_draw(row, generator))
                    for writer, row in zip(writers, logits.reshape(len(part), -1), strict=True)
                ]
                phase.update(len(part))
    return ids


class _Writer:
    """Chooses the next token of one sequence: a prescribed one, or the one that was drawn."""

    def __init__(self, opening: tuple[int, ...], turns: Turns | None):
        """`turns` applies only if the sequence opens with `turns.first`."""
        self.given = deque(opening)
        self._turns = turns if turns and opening == turns.first else None
        self._answers = False  # whose message is being written

    def next(self, drawn: int) -> int:
        if not self.given and self._turns and drawn in self._turns.ends:
            self.given.extend(self._turns.user if self._answers else self._turns.answer)
            self._answers = not self._answers
        return self.given.popleft() if self.given else drawn


def _draw(logits: npt.NDArray[np.floating], generator: np.random.Generator) -> int:
    """Draws a token by inverting the cumulative distribution, over blocks and then within one."""
    weights = np.exp(logits - logits.max(), dtype=np.float32)
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    heights = np.cumsum(sums)
    drawn = generator.random() * heights[-1]
    block = int(np.searchsorted(heights, drawn, side="right"))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    place = int(np.searchsorted(inside, drawn - (heights[block] - sums[block]), side="right"))
    return block * _BLOCK + min(place, len(inside) - 1)
