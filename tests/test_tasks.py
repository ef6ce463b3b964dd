"""Tasks from JSON lines, scored token by token under a policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tool import Capture, Tool

from dash_onnx.cli.eval import main
from dash_onnx.core.errors import SourceError
from dash_onnx.runtime.engine import Model
from dash_onnx.runtime.evaluate import log_softmax
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.tasks import Item, read_task, run_task

TOOL = Tool("dash-eval", main)
CONTEXT = "the keeper of the lighthouse counts"
CHOICES = (" ships", " the ships that pass", " 42")
ARC = {
    "question": "What passes?",
    "choices": {"text": ["ships", "light"], "label": ["A", "B"]},
    "answerKey": "B",
}


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"context": "a b ", "continuation": "c"}, Item("a b", (" c",), 0)),
        ({"text": "a b c"}, Item("a b", (" c",), 0)),
        (ARC, Item("Question: What passes?\nAnswer:", (" ships", " light"), 1)),
        (
            {"activity_label": "Rowing", "ctx": "A man [title] rows", "endings": ["on", "o[x] ff"],
             "label": "1"},
            Item("Rowing: A man. rows", (" on", " o ff"), 1),
        ),
        (
            {"activity_label": "Rowing", "ctx": "A man. he", "ctx_a": "A man.", "ctx_b": "he",
             "endings": ["rows"], "label": 0},
            Item("Rowing: A man. He", (" rows",), 0),
        ),
        ({"prompt": "2 + 2 =", "answer": 4}, Item("2 + 2 =", ("4",), 0, generate=True)),
        ({"text": "one line\u2028still"}, Item("one", (" line\u2028still",), 0)),
    ],
)  # fmt: skip
def test_every_form_is_read(record: dict[str, Any], wanted: Item, tmp_path: Path) -> None:
    assert read_task(written(tmp_path / "t.jsonl", record)) == [wanted]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "{",
        "[]",
        '{"text": "word"}',
        '{"prompt": "a"}',
        '{"endings": []}',
        '{"activity_label": "a", "ctx": "b", "endings": [], "label": 0}',
        '{"context": "", "continuation": "x"}',
    ],
)
def test_a_line_of_another_form_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(SourceError) as caught:
        read_task(path)
    assert "\n" not in str(caught.value)


def log_likelihood(model: Model, choice: str, policy: str) -> float:
    """Of a continuation, from one pass over the whole text."""
    border = len(model.text.encode(CONTEXT))
    ids = model.text.encode(CONTEXT + choice)
    rows = log_softmax(model.logits(ids[:-1], policy=policy)[border - 1 :])
    return float(np.take_along_axis(rows, ids[border:, None], 1).sum())


@pytest.mark.parametrize("policy", ["full", "int8"])
def test_the_most_likely_choice_is_right(tiny_model: Model, policy: str) -> None:
    totals = [log_likelihood(tiny_model, choice, policy) for choice in CHOICES]
    best = int(np.argmax(totals))
    items = [Item(CONTEXT, CHOICES, answer) for answer in range(len(CHOICES))]
    for item in items:
        result = run_task(tiny_model, [item], policy)
        assert result.accuracy == (item.answer == best)
    result = run_task(tiny_model, items, policy)
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.stderr == pytest.approx((2 / 9 / 2) ** 0.5)
    by_length = int(np.argmax(np.divide(totals, [len(choice) for choice in CHOICES])))
    assert result.accuracy_norm == pytest.approx(1 / 3) and by_length in range(3)
    assert result.items == 3 and result.cost_ms > 0


def test_the_choices_share_the_prefilled_context(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    prefill = SequenceState.prefill

    def noting(sequence: SequenceState, ids: np.ndarray, *plan: Any) -> np.ndarray:
        ran.append(len(ids))
        return prefill(sequence, ids, *plan)

    monkeypatch.setattr(SequenceState, "prefill", noting)
    run_task(tiny_model, [Item(CONTEXT, CHOICES, 0)])
    assert ran[0] == len(tiny_model.text.encode(CONTEXT)) - 1
    assert ran[1:] == [1] * (len(CHOICES) - 1)  # the last token alone, which gives the logits


def test_a_single_continuation_must_be_what_the_model_says(tiny_model: Model) -> None:
    ids = tiny_model.text.encode(CONTEXT)
    token = next(tiny_model.generate_step(ids, max_new_tokens=1, ignore_eos=True)).token
    said = tiny_model.text.decode([*ids, token])[len(tiny_model.text.decode(ids)) :]
    same = tiny_model.text.encode(CONTEXT + said).tolist() == [*ids, token]
    right = run_task(tiny_model, [Item(CONTEXT, (said,), 0)]).accuracy
    assert right == 1.0 or not same
    assert run_task(tiny_model, [Item(CONTEXT, (" the ships that pass",), 0)]).accuracy == 0.0


def test_generation_is_compared_exactly(tiny_model: Model) -> None:
    written = iter(["4.", " 4", "42", "44 and 4", "no such answer"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "generate", lambda *_, **__: next(written))
        result = run_task(tiny_model, [Item(CONTEXT, ("4",), 0, True)] * 5)
    assert result.accuracy == pytest.approx(0.4) and result.accuracy_norm is None
    assert result.cost_ms is None
    text = tiny_model.generate(CONTEXT, max_new_tokens=4)
    assert run_task(tiny_model, [Item(CONTEXT, (text.strip()[:1],), 0, True)]).items == 1


def test_the_command_scores_a_file(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path / "arc.jsonl", ARC, ARC, ARC)
    found = TOOL.json_of(capsys, tiny_bundle, "--task", path, "--max-items", 2, "--policy", "int4")
    assert found["items"] == 2 and 0 <= found["accuracy"] <= 1
    assert TOOL.run(tiny_bundle, "--task", path, "--policy", "full") == 0
    assert "accuracy" in capsys.readouterr().out
    path.write_text("{}")
    assert "is no item of" in TOOL.refused(capsys, tiny_bundle, "--task", path)
