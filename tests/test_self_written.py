"""Text that a model writes itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.text import TextCodec
from dash_onnx.exporters.calibration.openings import OPENINGS, openings
from dash_onnx.exporters.calibration.self_written import sample_text, self_written, turns_of
from dash_onnx.runtime.model import Model


def written(bundle: Path, count: int = 5, length: int = 12, seed: int = 3) -> np.ndarray:
    openings = [(token,) for token in range(7, 7 + count)]
    return sample_text(Bundle(bundle), openings, length, np.random.default_rng(seed), "text")


def test_a_seed_repeats_a_text_and_another_gives_another(tiny_bundle: Path) -> None:
    ids = written(tiny_bundle)
    assert ids.shape == (5, 12)
    np.testing.assert_array_equal(ids[:, 0], np.arange(7, 12))
    np.testing.assert_array_equal(written(tiny_bundle), ids)
    assert (written(tiny_bundle, seed=4) != ids).any()
    assert (ids[0] != ids[1]).any()


def test_tokens_are_drawn_as_int8_predicts_them(tiny_bundle: Path, tiny_model: Model) -> None:
    """Of many draws after the same token, each token's share is its probability."""
    count = 3000
    ids = sample_text(Bundle(tiny_bundle), [(9,)] * count, 2, np.random.default_rng(0), "text")
    logits = tiny_model.logits([9], policy="int8")[0].astype(np.float64)
    wanted = np.exp(logits - logits.max())
    wanted /= wanted.sum()
    found = np.bincount(ids[:, 1], minlength=len(wanted)) / count
    assert np.abs(found - wanted).max() < 4 * np.sqrt(wanted.max() / count)
    expected = 0.5 * np.sqrt(2 / np.pi) * np.sqrt(wanted * (1 - wanted) / count).sum()
    assert np.abs(found - wanted).sum() / 2 == pytest.approx(expected, rel=0.2)


def test_every_second_sequence_is_a_conversation(tiny_bundle: Path) -> None:
    codec = TextCodec(Bundle(tiny_bundle))
    turns = turns_of(codec)
    assert turns is not None
    parts = (turns.first, turns.answer, turns.user)
    around = [codec.tokenizer.decode(part, skip_special_tokens=False) for part in parts]
    assert around == ["<s>user\n", "</s>\n<s>assistant\n", "</s>\n<s>user\n"]
    ids = self_written(Bundle(tiny_bundle), codec, 12, 200, 0, "text")
    assert ids.shape == (12, 200)
    answered = 0
    for row in ids[::2].tolist():
        expected, given = turns.first, 0
        while True:
            assert tuple(row[given : given + len(expected)]) == expected[: len(row) - given]
            start = given + len(expected)
            ends = [place for place in range(start, len(row)) if row[place] in turns.ends]
            if not ends:
                break
            expected = turns.user if expected == turns.answer else turns.answer
            given, answered = ends[0], answered + 1
    assert answered
    assert len({*ids[1::2, 0].tolist()}) > 3


def test_documents_begin_with_bos_if_texts_do(tiny_bundle: Path) -> None:
    codec = TextCodec(Bundle(tiny_bundle))
    special = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    codec.tokenizer.post_processor = special
    ids = self_written(Bundle(tiny_bundle), codec, 4, 8, 0, "text")
    assert ids[1::2, 0].tolist() == [0, 0] and ids[1, 1] != ids[3, 1]


@pytest.mark.parametrize(
    "template", [None, "<s>{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"]
)
def test_a_model_without_turns_writes_documents(template: str | None, tiny_bundle: Path) -> None:
    codec = TextCodec(Bundle(tiny_bundle))
    codec.chat_template = template
    assert turns_of(codec) is None


def test_each_opening_comes_once_before_any_comes_again() -> None:
    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    count = len(OPENINGS)
    found = openings(encode, count + 3, 500, np.random.default_rng(0))
    assert sorted(bytes(ids).decode() for ids in found[:count]) == sorted(OPENINGS)
    assert len({*found[count:]}) == 3
    assert found != openings(encode, count + 3, 500, np.random.default_rng(1))


def test_of_a_short_document_the_model_writes_half() -> None:
    found = openings(lambda _: np.arange(9), 2, 10, np.random.default_rng(0))
    assert found == [(0, 1, 2, 3, 4)] * 2
    assert openings(lambda _: np.empty(0, int), 1, 10, np.random.default_rng(0)) == [(0,)]
