"""What a long context adds to a decoded token, here and in ONNX Runtime GenAI.

python benchmarks/context.py out/ --peer build/peers/int4 --length 4096
"""

from __future__ import annotations

import argparse
import os
import statistics

import numpy as np
from tqdm import tqdm

from dash_onnx.bench.measure import rounds
from dash_onnx.bench.worker import Worker

SHORT = 128


def main() -> None:
    """Prints milliseconds of a token after a short and a long prompt, and what they grew by."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="OUT")
    parser.add_argument("--peer", required=True, metavar="DIR", help="a folder for GenAI")
    parser.add_argument("--policy", default="int4")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    threads = arguments.threads
    workers = [
        Worker("dash-onnx", "dash", arguments.bundle, arguments.policy, threads),
        Worker("ORT GenAI", "genai", arguments.peer, "", threads),
    ]
    ids = np.random.default_rng(0).integers(1000, 20000, arguments.length).tolist()
    turns = 2 * len(workers) * (arguments.rounds + 1)
    with tqdm(total=turns, disable=None) as bar:
        short, long = (
            rounds(workers, [prompt], arguments.rounds, arguments.new_tokens, bar.update)
            for prompt in (ids[:SHORT], ids)
        )
    print(f"           {SHORT:6} {arguments.length:6}   grew by (ms a token, median of rounds)")
    for few, many in zip(short, long, strict=True):
        a, b = statistics.median(few.decode_ms), statistics.median(many.decode_ms)
        print(f"{few.name:10} {a:6.2f} {b:6.2f}   {b - a:.2f}")


if __name__ == "__main__":
    main()
