"""Tasks from local JSON lines, their scored part decoded token by token under the policy.

Prompts follow lm-evaluation-harness, so that figures can be compared with published ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dash_onnx.core.budget import Budget
from dash_onnx.core.errors import SourceError
from dash_onnx.core.policy import Policy
from dash_onnx.core.text import json_lines
from dash_onnx.runtime.engine import Model
from dash_onnx.runtime.evaluate import log_softmax


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        context: what is prefilled.
        choices: continuations to score; a single one must be what the model finds most likely.
        answer: index of the right one.
        generate: the model writes freely and must begin with the (only) choice.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    generate: bool = False


@dataclass(frozen=True)
class TaskResult:
    """What `run_task` measured.

    Attributes:
        accuracy: share of right items: greedy match, exact match, or the most likely choice.
        stderr: its standard error.
        accuracy_norm: likewise with the log-likelihood divided by its length in characters;
            None where items have no choices.
        items: how many.
        cost_ms: profiled mean cost of a scored token; None where the model wrote freely.
    """

    accuracy: float
    stderr: float
    accuracy_norm: float | None
    items: int
    cost_ms: float | None


def read_task(path: Path, max_items: int | None = None) -> list[Item]:
    """Reads a task file.

    Args:
        path: JSON lines of LAMBADA (`context`, `continuation`, or `text`), HellaSwag (`ctx`,
            `endings`, `label`), ARC (`question`, `choices`, `answerKey`), or free generation with
            exact match (`prompt`, `answer`).
        max_items: the first so many; None takes all.

    Raises:
        SourceError: a line is not JSON or of none of these forms.
    """
    items: list[Item] = []
    for where, record in json_lines(path):
        if max_items is not None and len(items) >= max_items:
            break
        try:
            item = _item(record)
            if not item.context or not item.choices:
                raise ValueError("nothing to score, or nothing before it")
            items.append(item)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise SourceError(
                f"{where} is no item of LAMBADA (context, continuation), HellaSwag "
                "(ctx, endings, label), ARC (question, choices, answerKey) or exact match "
                "(prompt, answer)"
            ) from None
    if not items:
        raise SourceError(f"{path} holds no item")
    return items


def _item(record: dict[str, Any]) -> Item:
    if "endings" in record:
        context = record["ctx"]
        if "ctx_a" in record and "ctx_b" in record:
            context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
        context = f"{record['activity_label']}: {context}"
        endings = tuple(" " + _clean(ending) for ending in record["endings"])
        return Item(_clean(context), endings, int(record["label"]))
    if "answerKey" in record:
        labels, texts = record["choices"]["label"], record["choices"]["text"]
        context = f"Question: {record['question']}\nAnswer:"
        return Item(context, tuple(f" {t}" for t in texts), labels.index(record["answerKey"]))
    if "continuation" in record:
        return Item(record["context"].rstrip(), (" " + record["continuation"].strip(),), 0)
    if "answer" in record:
        return Item(record["prompt"], (str(record["answer"]),), 0, generate=True)
    context, _, last = record["text"].rpartition(" ")
    if not context:
        raise ValueError("a single word")
    return Item(context, (" " + last,), 0)


def _clean(text: str) -> str:
    """HellaSwag's WikiHow markup."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return re.sub(" +", " ", text)


def run_task(
    model: Model,
    items: Sequence[Item],
    policy: str | Policy = "",
    budget: Budget | None = None,
    on_item: Callable[[], None] = lambda: None,
) -> TaskResult:
    """Scores every item.

    The context but its last token is prefilled at the highest exported precision; the last one
    and the scored tokens are decoded under the policy.

    Args:
        model: a loaded bundle.
        items: from `read_task`.
        policy: see `make_policy`.
        budget: likewise.
        on_item: called after each item.
    """
    chosen = model.policy(policy, budget)
    costs = model.manifest.costs
    right, right_norm, spent = [], [], []
    for item in items:
        totals, greedy = [], []
        if item.generate:
            right.append(_generates(model, item, chosen))
            on_item()
            continue
        border = len(model.text.encode(item.context))
        cache = model.new_cache()  # the choices share the context
        for choice in item.choices:
            # Encoded together, as the harness does: a tokenizer may merge across the border.
            ids = model.text.encode(item.context + choice)
            total, match = 0.0, True
            scored = model.score(ids[:-1], prompt_tokens=border - 1, policy=chosen, cache=cache)
            for target, token in zip(ids[border:].tolist(), scored, strict=True):
                total += log_softmax(token.logits)[target]
                match &= int(token.logits.argmax()) == target
                spent.append(chosen.cost_ms(token.path, costs))
            totals.append(total)
            greedy.append(match)
        if len(item.choices) == 1:
            right.append(greedy[0])
        else:
            lengths = [len(choice) - 1 for choice in item.choices]  # without the space before it
            right.append(int(np.argmax(totals)) == item.answer)
            right_norm.append(int(np.argmax(np.divide(totals, lengths))) == item.answer)
        on_item()
    share = float(np.mean(right))
    return TaskResult(
        accuracy=share,
        stderr=math.sqrt(share * (1 - share) / max(len(right) - 1, 1)),
        accuracy_norm=float(np.mean(right_norm)) if right_norm else None,
        items=len(right),
        cost_ms=float(np.mean(spent)) if spent else None,
    )


def _generates(model: Model, item: Item, policy: Policy) -> bool:
    wanted = item.choices[0].strip()
    budget = len(model.text.encode(wanted)) + 8
    text = model.generate(item.context, policy=policy, max_new_tokens=budget)
    found = text.strip()
    return found.startswith(wanted) and not found[len(wanted) : len(wanted) + 1].isalnum()
