"""Thousands of generations in one process: no memory is lost, no generation disturbs another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

GENERATIONS, WARM_UP, SAMPLE = 2000, 800, 50
POLICIES = ("full", "int8", "int4", "random:3", "static:full,skip,int4,int8", "dash")
LENGTHS = (1, 7, 33, 120)
SPECULATE = (False, True)  # in turns, for `full`: there the text is the same

# Both programs take a bundle; a job is a policy, a length of prompt and one of the answer. Whether
# tokens are drafted is none of it: the answer must not depend on that.
_JOBS = f"""
import json, sys, dash_onnx
from itertools import cycle, product

bundle = sys.argv[1]
jobs = list(product({POLICIES}, {LENGTHS}, {LENGTHS}))
jobs = [job for job in jobs if job[1] + job[2] < 160]
who = cycle({SPECULATE})

def answer(model, policy, prompt, new, speculate=False):
    steps = model.generate_step(
        range(100, 100 + prompt), policy=policy, max_new_tokens=new, ignore_eos=True,
        budget=0.5 if policy == "dash" else None, temperature=0.8, seed=prompt * new,
        speculate=speculate,
    )
    return [step.token for step in steps]
"""

_SOAK = f"""
import os, random, threading

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

model = dash_onnx.load(bundle)
model.preload()
order = (jobs * -(-{GENERATIONS} // len(jobs)))[:{GENERATIONS}]
random.Random(0).shuffle(order)
turn, lock = iter(order), threading.Lock()
done, answers, memory = 0, {{}}, []

def work():
    global done
    while True:
        with lock:
            job = next(turn, None)
        if job is None:
            return
        tokens = answer(model, *job, next(who) if job[0] == "full" else False)
        with lock:
            answers.setdefault(json.dumps(job), set()).add(tuple(tokens))
            done += 1
            if done % {SAMPLE} == 0:
                memory.append(resident())

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([done, {{job: sorted(found) for job, found in answers.items()}}, memory]))
"""

_FRESH = """
model = dash_onnx.load(bundle)
print(json.dumps({json.dumps(job): answer(model, *job) for job in jobs if job[0] == sys.argv[2]}))
"""


def program(body: str, *arguments: object) -> object:
    command = [sys.executable, "-c", _JOBS + body, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.usefixtures("every_core")
def test_two_thousand_generations_lose_nothing(scored_folder: Path) -> None:
    done, answers, memory = program(_SOAK, scored_folder)  # type: ignore[misc]
    assert done == GENERATIONS
    fresh: dict[str, list[int]] = {}
    for policy in POLICIES:
        fresh |= program(_FRESH, scored_folder, policy)  # type: ignore[operator]
    assert answers == {job: [tokens] for job, tokens in fresh.items()}
    assert len({tuple(tokens) for tokens in fresh.values()}) > len(fresh) // 2
    warm = memory[WARM_UP // SAMPLE :]
    assert max(warm) / min(warm) < 1.02, [round(size / 1e6, 1) for size in memory]
