"""A fused folder in lm-evaluation-harness, on ARC from a local file.

    pip install 'lm-eval[onnxruntime-genai]'
    python benchmarks/lm_eval_fused.py out/fused arc.jsonl --max-items 200
    dash-eval out/ --task arc.jsonl --max-items 200 --policy int8

lm-eval's own backend for ONNX Runtime GenAI runs, unmodified. It scores a choice in one pass, which
the graph takes for a prompt: the precision of prompts is measured, or that of a fixed policy. With
`--per-token` the scored tokens are decoded one by one, as dash-eval does it and as generation
would, so that the scorer decides about them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM, _log_softmax
from lm_eval.tasks import TaskManager

_TASK = {
    "task": "arc_local",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
    "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
}


class PerToken(ONNXRuntimeGenAILM):
    """The context but its last token is a prompt; that one and the choice are decoded."""

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [self._scored(context, choice) for _, context, choice in requests]

    def _scored(self, context: list[int], choice: list[int]) -> tuple[float, bool]:
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=len(context) + len(choice), do_sample=False)
        generator = self.og.Generator(self.model, params)
        generator.append_tokens(np.array(context[:-1], np.int32))
        rows = []
        for token in [context[-1], *choice[:-1]]:
            generator.append_tokens(np.array([token], np.int32))
            rows.append(np.array(generator.get_logits(), np.float32).reshape(-1))
        found = np.stack(rows)
        total = _log_softmax(found)[np.arange(len(choice)), choice].sum()
        return float(total), bool((found.argmax(-1) == choice).all())


def main() -> None:
    """Prints accuracy, and by the length of the choice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what dash-fuse wrote")
    parser.add_argument("task", type=Path, help="JSON lines: question, choices, answerKey")
    parser.add_argument("--max-items", type=int)
    parser.add_argument("--per-token", action="store_true", help="let the policy decide")
    parser.add_argument("--json", action="store_true", help="also the chosen answer of each item")
    arguments = parser.parse_args()
    backend = PerToken if arguments.per_token else ONNXRuntimeGenAILM
    with tempfile.TemporaryDirectory() as folder:
        files = {"validation": str(arguments.task.resolve())}
        task = {**_TASK, "dataset_kwargs": {"data_files": files}}
        (Path(folder) / "arc_local.yaml").write_text(json.dumps(task), "utf-8")  # JSON is YAML
        found = lm_eval.simple_evaluate(
            model=backend(str(arguments.folder)),
            tasks=["arc_local"],
            limit=arguments.max_items,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
        )
    result = found["results"]["arc_local"]
    scores = {name: result[f"{name},none"] for name in ("acc", "acc_norm")}
    samples = sorted(found["samples"]["arc_local"], key=lambda sample: int(sample["doc_id"]))
    chosen = [int(np.argmax([total for total, _ in s["filtered_resps"]])) for s in samples]
    items = len(samples)
    if arguments.json:
        print(json.dumps({**scores, "items": items, "chosen": chosen}))
    else:
        print(f"accuracy {scores['acc']:.2%}, by length {scores['acc_norm']:.2%}, {items} items")


if __name__ == "__main__":
    main()
