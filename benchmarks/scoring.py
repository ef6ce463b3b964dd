"""What deciding adds to a token: called by the thread that runs the layers, or by a second one.

    python benchmarks/scoring.py out/

Each token runs on the path that the scorer takes, once given that path and once in each mode, in an
order that changes; the differences are paired. The modes must decide alike.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

import dash_onnx
from dash_onnx.core.policy import ScoredPolicy
from dash_onnx.runtime.dispatch import Lane
from dash_onnx.runtime.scoring import Scoring
from dash_onnx.runtime.sessions import Sessions

PROMPT, WARM_UP = 64, 20


class Threaded(Scoring):
    """Runs the scorer's session on a thread of its own, beside the layer."""

    def __init__(self, sessions: Sessions, lane: Lane):
        """Takes the buffers of the lane."""
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        super().__init__(sessions, lane._single.hidden)

    def begin(self, number: int) -> None:
        """See `Scoring`."""
        self._running = self._pool.submit(super().begin, number)

    def finish(self, number: int) -> None:
        """See `Scoring`."""
        assert self._running is not None
        self._running.result()
        super().finish(number)


def main() -> None:
    """Prints milliseconds of a token, and what the modes add to it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="OUT")
    parser.add_argument("--budget", help="as of dash-run (default: balanced)")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    model = dash_onnx.load(arguments.bundle, threads=arguments.threads)
    policy = model.policy("dash", arguments.budget)
    assert isinstance(policy, ScoredPolicy)
    sessions = model._sessions
    model.preload(policy)
    lane = Lane(sessions)
    ids = [s.token for s in model.generate_step(range(1000, 1000 + PROMPT), policy=policy)]
    full = model.manifest.variants[0]
    layers = model.manifest.model.num_layers
    lane.prefill(np.arange(1000, 1000 + PROMPT), (full,) * layers, model.manifest.heads[full])
    modes = {"call": lane._scorer(), "thread": Threaded(sessions, lane)}
    names = ["given", *modes]
    times: list[list[float]] = []
    for count in tqdm(range(WARM_UP + arguments.tokens), disable=None):
        token, row = ids[count % len(ids)], dict.fromkeys(names, 0.0)
        _, path = lane.decode_scored(token, policy.multiplier, policy.head)
        for name in names[count % len(names) :] + names[: count % len(names)]:
            lane.truncate(lane.length - 1)
            started = time.perf_counter()
            if name == "given":
                lane.decode(token, path, policy.head)
            else:
                lane._scoring = modes[name]
                _, taken = lane.decode_scored(token, policy.multiplier, policy.head)
                assert taken == path, f"{name} decided otherwise"
            row[name] = (time.perf_counter() - started) * 1e3
        times.append(list(row.values()))
    table = np.array(times[WARM_UP:])
    base = float(np.median(table[:, 0]))
    print(
        f"{base:.3f} ms a token on given paths; {_decision_points(modes['call'])} decision points"
    )
    for index, name in enumerate(names[1:], 1):
        added = float(np.median(table[:, index] - table[:, 0]))
        share, each = added / base, added * 1e3 / layers
        print(f"{name:7} {added:+.3f} ms, {share:.1%} of the token, {each:.1f} µs a layer")


def _decision_points(scoring: Scoring) -> int:
    return sum(point is not None for point in scoring.decision_points)


if __name__ == "__main__":
    main()
