"""Text augmentation: the same words with punctuation apart, in lines, in lower case."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import tiny_tokenizer
from tokenizers import Tokenizer

from dash_onnx.exporters.train.augmentation import augmented, lower, spaced, wrapped

TEXT = '<s>The keeper (of the "lighthouse"), at 3.14, counts:\n\nall the ships, that pass!</s>Ah.'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer().backend_tokenizer


def rows_of(tokenizer: Tokenizer, text: str, count: int = 1) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids] * count)


def text_of(tokenizer: Tokenizer, row: torch.Tensor) -> str:
    return str(tokenizer.decode(row.tolist(), skip_special_tokens=False))


def lowered(tokenizer: Tokenizer, text: str) -> str:
    (row,) = augmented(rows_of(tokenizer, text), tokenizer, 0, ((lower, 1.0),))
    return text_of(tokenizer, row)


def test_punctuation_stands_apart_as_in_corpora() -> None:
    text = 'The keeper (of the "lighthouse"), at 3.14, counts:\n\nall the ships'
    wanted = 'The keeper ( of the " lighthouse " ) , at 3.14 , counts : \n\nall the ships'
    assert spaced(text, random.Random(0)) == wanted


def test_lines_get_one_width_and_paragraphs_stay() -> None:
    words = ("the ships that pass in the night " * 20).strip()
    widths = set()
    for seed in range(8):
        first, second = wrapped(f"{words}\n\n{words}", random.Random(seed)).split("\n\n")
        assert first == second and first.split() == words.split()
        widths.add(max(map(len, first.split("\n"))))
    assert len(widths) > 1
    assert all(35 <= width <= 90 for width in widths)


def test_special_tokens_keep_their_case_and_places(tokenizer: Tokenizer) -> None:
    assert lowered(tokenizer, "<s>AB</s>CD<s>") == "<s>ab</s>cd<s>"


def test_a_layout_of_fewer_tokens_is_followed_by_the_end_of_the_row(tokenizer: Tokenizer) -> None:
    text = lowered(tokenizer, "THE KEEPER OF THE LIGHTHOUSE")  # letters; in lower case words
    assert text.startswith("the keeper of the lighthouse") and text.endswith("LIGHTHOUSE")


def test_some_rows_change_others_stay_and_a_seed_repeats_them(tokenizer: Tokenizer) -> None:
    rows = rows_of(tokenizer, TEXT, 64)
    found = augmented(rows, tokenizer, 0)
    assert found.shape == rows.shape and found.dtype == rows.dtype
    changed = (found != rows).any(1).float().mean()
    assert 0.4 < changed < 0.9
    assert torch.equal(augmented(rows, tokenizer, 0), found)
    assert not torch.equal(augmented(rows, tokenizer, 1), found)


def test_a_tokenizer_without_special_tokens_will_do(tokenizer: Tokenizer) -> None:
    plain = Tokenizer.from_str(tokenizer.to_str().replace('"special":true', '"special":false'))
    rows = rows_of(plain, TEXT, 8)
    assert augmented(rows, plain, 0).shape == rows.shape
