"""Other forms of the training text: the same words, apart, in lines, in lower case."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_tokenizer
from tokenizers import Tokenizer

from dash_onnx.exporters.train import forms
from dash_onnx.exporters.train.forms import in_other_forms

TEXT = '<s>The keeper (of the "lighthouse"), at 3.14, counts:\n\nall the ships, that pass!</s>Ah.'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer().backend_tokenizer


def rows_of(tokenizer: Tokenizer, text: str, count: int = 1) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids] * count)


def text_of(tokenizer: Tokenizer, row: torch.Tensor) -> str:
    return str(tokenizer.decode(row.tolist(), skip_special_tokens=False))


def always(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(forms, "_SHARES", ((getattr(forms, form), 1.0),))


def test_punctuation_stands_apart_as_in_corpora(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, "_spaced")
    (row,) = in_other_forms(rows_of(tokenizer, TEXT), tokenizer, 0)
    wanted = '<s>The keeper ( of the " lighthouse " ) , at 3.14 , counts : \n\nall the ships ,'
    assert text_of(tokenizer, row).startswith(wanted)


def test_lines_get_one_width_and_paragraphs_stay(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, "_wrapped")
    words = "the ships that pass in the night " * 20
    rows = rows_of(tokenizer, f"<s>{words}\n\n{words}", 8)
    widths = set()
    for row in in_other_forms(rows, tokenizer, 0):
        text = text_of(tokenizer, row)
        assert "\n\n" in text
        longest = max(map(len, text.removeprefix("<s>").split("\n")[:5]))
        assert 35 <= longest <= 90
        widths.add(longest)
    assert len(widths) > 1


def test_special_tokens_keep_their_case_and_places(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, "_lower")
    (row,) = in_other_forms(rows_of(tokenizer, "<s>AB</s>CD<s>"), tokenizer, 0)
    assert text_of(tokenizer, row) == "<s>ab</s>cd<s>"


def test_a_form_of_fewer_tokens_is_followed_by_the_end_of_the_row(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, "_lower")
    rows = rows_of(tokenizer, "THE KEEPER OF THE LIGHTHOUSE")  # single letters; in lower case words
    (row,) = in_other_forms(rows, tokenizer, 0)
    assert len(row) == len(rows[0])
    text = text_of(tokenizer, row)
    assert text.startswith("the keeper of the lighthouse") and text.endswith("LIGHTHOUSE")


def test_some_rows_change_others_stay_and_a_seed_repeats_them(tokenizer: Tokenizer) -> None:
    rows = rows_of(tokenizer, TEXT, 64)
    found = in_other_forms(rows, tokenizer, 0)
    assert found.shape == rows.shape and found.dtype == rows.dtype
    changed = (found != rows).any(1).float().mean()
    assert 0.4 < changed < 0.9
    assert torch.equal(in_other_forms(rows, tokenizer, 0), found)
    assert not torch.equal(in_other_forms(rows, tokenizer, 1), found)


def test_a_tokenizer_without_special_tokens_will_do(tokenizer: Tokenizer) -> None:
    plain = Tokenizer.from_str(tokenizer.to_str().replace('"special":true', '"special":false'))
    rows = rows_of(plain, TEXT, 8)
    assert in_other_forms(rows, plain, 0).shape == rows.shape
