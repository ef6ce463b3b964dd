"""What a prompt's precision costs: KL of the first token of answers to chats.

    dash-export MODEL out/
    dash-export MODEL reference/ --variants full --effort none
    python benchmarks/first_token.py out/ reference/ --prompts chats.jsonl

Prints, for each precision, the mean over chats of KL(full || precision) in nats, its standard
error, the largest, and how many first tokens are another one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import dash_onnx
from dash_onnx.bench.prompts import read_prompts
from dash_onnx.core.statistics import kl_divergence, log_softmax, standard_error


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("reference", type=Path, help="a bundle of the same model that has `full`")
    parser.add_argument("--prompts", type=Path, required=True, help="as of dash-bench")
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    arguments = parser.parse_args()
    prompts = read_prompts(arguments.prompts)[: arguments.chats]
    ours, reference = dash_onnx.load(arguments.bundle), dash_onnx.load(arguments.reference)
    chats = [ours.text.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    wanted = [log_softmax(reference.logits(ids, policy="full")[-1:]) for ids in chats]
    rows = []
    for precision in ours.manifest.variants:
        found = [log_softmax(ours.logits(ids, policy=precision)[-1:]) for ids in chats]
        kl = np.concatenate([kl_divergence(*pair) for pair in zip(wanted, found, strict=True)])
        others = sum(int(p.argmax() != q.argmax()) for p, q in zip(wanted, found, strict=True))
        facts = {
            "precision": precision,
            "chats": len(chats),
            "kl": round(float(kl.mean()), 5),
            "kl_stderr": round(standard_error(kl.tolist()), 5),
            "kl_max": round(float(kl.max()), 5),
            "other_first_token": others,
        }
        rows.append(facts)
        if not arguments.json:
            print(json.dumps(facts))
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
