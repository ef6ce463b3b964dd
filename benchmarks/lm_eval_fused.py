"""A fused folder in lm-evaluation-harness, on a task that dash-eval takes.

    pip install 'dash-onnx[cpu,eval]' 'lm-eval[onnxruntime-genai]'
    python benchmarks/lm_eval_fused.py out/fused arc.jsonl --max-items 200
    dash-eval out/ --task arc.jsonl --max-items 200 --policy int8

The harness's own backend for ONNX Runtime GenAI runs, unmodified. It scores a choice in one pass,
which the graph takes for a prompt: the precision of prompts is measured, or that of a fixed policy.
With `--per-token` the scored tokens are decoded one by one, as dash-eval does it and as generation
would, so that the scorer decides about them.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM
from lm_eval.utils import make_table

from dash_onnx.core.statistics import log_softmax
from dash_onnx.eval.tasks import evaluate_task


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
        total = log_softmax(found)[np.arange(len(choice)), choice].sum()
        return float(total), bool((found.argmax(-1) == choice).all())


def main() -> None:
    """Prints the scores as the harness does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what dash-fuse wrote")
    parser.add_argument("task", help="JSON lines, or a task of the harness by its name")
    parser.add_argument("--max-items", type=int)
    parser.add_argument("--per-token", action="store_true", help="let the policy decide")
    arguments = parser.parse_args()
    backend = PerToken if arguments.per_token else ONNXRuntimeGenAILM
    print(make_table(evaluate_task(backend(arguments.folder), arguments.task, arguments.max_items)))


if __name__ == "__main__":
    main()
