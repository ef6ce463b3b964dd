"""Tasks of lm-evaluation-harness: its own by name, a YAML file, or JSON lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks.hellaswag.utils import preprocess

from dash_onnx.core.errors import SourceError, first_line
from dash_onnx.core.text import json_lines

_FEWSHOT_SEED = 1234  # the harness's default few-shot seed
_BOOTSTRAP_ITERS = 1000  # for the standard error of metrics that are not means
_MOST_NATS = 300  # whose exponential, a perplexity, can be squared for that


def evaluate_task(model: LM, name: str, max_items: int | None = None) -> dict[str, Any]:
    """Evaluates a task, or a group of tasks.

    Args:
        model: a `DashLM`, or any other model of the harness.
        name: a file of JSON lines (see `json_lines_task`), a YAML file that describes a task, or
            the name of one of the harness's tasks.
        max_items: number of leading items of each task; None takes all.

    Returns:
        The result of the harness's own `evaluate`: the figures of each task are in `results`,
        without those that are not finite.

    Raises:
        SourceError: there is no such task or file, its data cannot be read or fetched, or it needs
            something that is not supported here.
    """
    path = Path(name)
    if path.suffix in (".json", ".jsonl") or (path.suffix != ".yaml" and path.is_file()):
        loaded = {"tasks": {path.stem: json_lines_task(path, max_items)}}
    else:
        try:
            loaded = TaskManager(include_defaults=path.suffix != ".yaml").load([name])
        except Exception as error:  # tasks bring their own code and data
            reason = str(error.args[0] if error.args else "").partition("\n")[0]
            reason = reason or type(error).__name__
            raise SourceError(f"cannot load task {name!r}: {reason}") from None
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise SourceError(
                f"task {name!r} runs the model's code or needs images, which is not supported"
            )
        task.set_fewshot_seed(_FEWSHOT_SEED)
        if task.OUTPUT_TYPE == "loglikelihood":
            task.process_results = partial(_bounded, task.process_results)
        elif task.OUTPUT_TYPE == "loglikelihood_rolling":
            mean = {name: partial(_finite, total) for name, total in task.aggregation().items()}
            task.aggregation = partial(dict, mean)
        task.build_all_requests = partial(_told, name, task.build_all_requests)
        task.process_results = partial(_told, name, task.process_results)
    found: dict[str, Any] = evaluate(
        model, loaded, limit=max_items, bootstrap_iters=_BOOTSTRAP_ITERS, log_samples=False
    )
    for name, figures in found["results"].items():
        found["results"][name] = {
            key: value
            for key, value in figures.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
    return found


def _told(name: str, part: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Runs a part of a task, which brings its own templates, code and data."""
    try:
        return part(*given, **named)
    except Exception as error:
        told = first_line(error) or type(error).__name__
        raise SourceError(f"task {name!r} fails on its data: {told}") from None


def json_lines_task(path: Path, max_items: int | None = None) -> ConfigurableTask:
    """Makes a task from a file, with the prompts of the harness's task of that form.

    Args:
        path: JSON lines of LAMBADA (`context`, `continuation`, or `text`), HellaSwag (`ctx`,
            `endings`, `label`), ARC (`question`, `choices`, `answerKey`), or free generation with
            exact match (`prompt`, `answer`).
        max_items: number of leading items; None takes all.

    Raises:
        SourceError: a line is not JSON, has none of these forms, or not that of the first line.
    """
    documents: list[dict[str, Any]] = []
    kinds: set[str] = set()
    for where, record in islice(json_lines(path), max_items):
        try:
            kind, document = _document(record)
            documents.append(document)
            (kind,) = kinds = kinds | {kind}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise SourceError(
                f"{where} is not an item of LAMBADA (context, continuation), HellaSwag "
                "(ctx, endings, label), ARC (question, choices, answerKey) or exact match "
                "(prompt, answer), or differs in form from the lines before it"
            ) from None
    if not documents:
        raise SourceError(f"{path} holds no item")
    config = {
        "task": path.stem,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "context",
        "doc_to_target": "answer",
    }
    if kind == "multiple_choice":
        config["doc_to_choice"] = "choices"
    elif kind == "generate_until":
        longest = max(len(document["answer"].encode()) for document in documents)
        config["generation_kwargs"] = {"until": [], "max_gen_toks": longest + 8}
        config["process_results"] = _begins_with_the_answer
    return ConfigurableTask(config=config)


def _document(record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of request for an item, and the item as `context`, `choices`, `answer`."""
    document: dict[str, Any]
    if "endings" in record:
        kind, context = "multiple_choice", record["ctx"]
        if "ctx_a" in record and "ctx_b" in record:
            context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
        context = preprocess(f"{record['activity_label']}: {context}")
        document = {"choices": [preprocess(ending) for ending in record["endings"]]}
        document["answer"] = range(len(document["choices"]))[int(record["label"])]
    elif "answerKey" in record:
        kind, context = "multiple_choice", f"Question: {record['question']}\nAnswer:"
        document = {"choices": [str(text) for text in record["choices"]["text"]]}
        document["answer"] = record["choices"]["label"].index(record["answerKey"])
    elif "continuation" in record:
        kind, context = "loglikelihood", record["context"].rstrip()
        document = {"answer": " " + record["continuation"].strip()}
    elif "answer" in record:
        kind, context = "generate_until", record["prompt"]
        document = {"answer": str(record["answer"])}
    else:
        kind, (context, _, last) = "loglikelihood", record["text"].rstrip().rpartition(" ")
        document = {"answer": " " + last}
    texts = [context, *document.get("choices", [str(document["answer"])])]
    if not all(text.strip().encode("utf-8") for text in texts):  # which refuses lone surrogates
        raise ValueError("nothing to score, or nothing before it")
    return kind, {"context": context, **document}


def _bounded(
    process: Callable[[Any, Any], dict[str, Any]], document: Any, results: Any
) -> dict[str, Any]:
    """A document's figures, where a perplexity that would overflow is infinite."""
    found = process(document, results)
    if found.get("perplexity", 0.0) < -_MOST_NATS:  # still a log-likelihood
        found["perplexity"] = -math.inf
    return found


def _finite(aggregate: Callable[[Any], float], items: Any) -> float:
    """A figure of all documents; infinite where it overflows, as where a text has no spaces."""
    try:
        return aggregate(items)
    except OverflowError:
        return math.inf


def _begins_with_the_answer(document: dict[str, Any], answers: list[str]) -> dict[str, float]:
    wanted, found = document["answer"].strip(), answers[0].strip()
    after = found[len(wanted) : len(wanted) + 1]
    return {"exact_match": float(found.startswith(wanted) and not after.isalnum())}
