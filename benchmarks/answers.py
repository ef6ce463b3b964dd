"""Length and repetition of greedy answers at each preset, beside the highest precision's.

    python benchmarks/answers.py out/ --prompts chats.jsonl --max-prompts 100

Repeated 4-grams: the share of an answer's runs of four tokens that it has had before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

import dash_onnx
from dash_onnx.bench.prompts import read_prompts


def repeated(tokens: list[int], size: int = 4) -> float:
    """Share of the n-grams of an answer that are not new; 0 where it is too short."""
    grams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def main() -> None:
    """Prints a row per policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="OUT")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--max-prompts", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="answers to print")
    arguments = parser.parse_args()
    model = dash_onnx.load(arguments.bundle)
    scorer = model.manifest.scorer
    assert scorer is not None, "train a policy first: dash-train OUT"
    policies: list[tuple[str, str | None]] = [(model.manifest.variants[0], None)]
    policies += [("dash", preset) for preset in scorer.presets]
    # Every so many, so that all groups of a file that is sorted by group have their share.
    texts = read_prompts(arguments.prompts)
    texts = texts[:: max(1, len(texts) // arguments.max_prompts)][: arguments.max_prompts]
    print("policy    length (stderr)  ended  repeated 4-grams (stderr)")
    for policy, budget in policies:
        answers: list[list[int]] = []
        ended = 0
        name = budget or policy
        for number, text in enumerate(tqdm(texts, desc=name, disable=None)):
            message = {"role": "user", "content": text}
            answer = list(
                model.stream(
                    [message], policy=policy, budget=budget, max_new_tokens=arguments.new_tokens
                )
            )
            answers.append([chunk.token for chunk in answer])
            ended += answer[-1].finish_reason == "stop"
            if number < arguments.show:
                print(f"--- {text!r}\n{''.join(chunk.text for chunk in answer)}")
        shares = np.array([repeated(answer) for answer in answers])
        lengths = np.array([len(answer) for answer in answers])
        root = len(answers) ** 0.5
        print(
            f"{name:8}  {lengths.mean():6.1f} ({lengths.std() / root:.1f})     "
            f"{ended / len(answers):4.0%}   {shares.mean():.1%} ({shares.std() / root:.1%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
