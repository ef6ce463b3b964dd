"""A contender in a process of its own, so that none inherits another's threads or memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dash_onnx.bench.contenders import Logits, load
from dash_onnx.core.errors import DashError
from dash_onnx.runtime.machine import peak_rss_bytes


class Worker:
    """A running contender.

    Attributes:
        name: in tables.
        load_s: seconds that loading the model took, the import of its packages included.
    """

    def __init__(self, name: str, kind: str, target: str, variant: str, threads: int):
        """Starts it and waits until its model is loaded.

        Raises:
            DashError: it cannot load.
        """
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="dash-bench-")
        # What the peer's libraries print goes to a file: it would garble the table.
        self._log = (Path(self._folder.name) / "log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, kind, target, variant, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.load_s: float = self._answer()["load_s"]

    def decode(self, ids: list[int], new: int) -> list[float]:
        """See `contenders`."""
        times: list[float] = self._ask(do="decode", ids=ids, new=new)["times"]
        return times

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits | None:
        """See `contenders`."""
        path = Path(self._folder.name) / "logits.npy"
        answer = self._ask(do="logits", ids=ids, prompt_tokens=prompt_tokens, file=str(path))
        return np.load(path) if answer["found"] else None

    def peak_rss_bytes(self) -> int:
        """Highest resident memory of its process so far."""
        peak: int = self._ask(do="memory")["peak_rss_bytes"]
        return peak

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; what it said is told below
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = self._log.read().decode("utf-8", "replace").strip().splitlines()
            raise DashError(f"{self.name} stopped: {said[-1] if said else 'it says nothing'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DashError(f"{self.name}: {answer['error']}")
        return answer


def main(kind: str, target: str, variant: str, threads: str) -> None:
    """The process: JSON requests on stdin, JSON answers on stdout."""
    # Libraries that print to stdout would break the answers: they get stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    started = time.perf_counter()
    try:
        contender = load(kind, target, variant, int(threads))
    except DashError as error:
        answer(error=str(error))
        return
    answer(load_s=time.perf_counter() - started)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "decode":
            answer(times=contender.decode(request["ids"], request["new"]))
        elif request["do"] == "logits":
            logits = contender.logits(request["ids"], request["prompt_tokens"])
            if logits is not None:
                np.save(request["file"], logits)
            answer(found=logits is not None)
        else:
            answer(peak_rss_bytes=peak_rss_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
