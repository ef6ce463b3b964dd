"""The command of lm-evaluation-harness, with `--model dash` among its models."""

import sys

from lm_eval.__main__ import cli_evaluate

import dash_onnx.eval.model  # noqa: F401  (registers the model)
from dash_onnx.core.errors import DashError

if __name__ == "__main__":
    try:
        cli_evaluate()
    except DashError as error:
        print(f"lm_eval: error: {error}", file=sys.stderr)
        sys.exit(2)
