"""llama.cpp."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import numpy as np
import numpy.typing as npt
import xllamacpp


class LlamaCpp:
    """A GGUF file in llama.cpp's server, from its prebuilt wheels."""

    def __init__(self, target: str, threads: int):
        """Starts the server on a free port of this machine."""
        params = xllamacpp.CommonParams()
        params.model.path = target
        params.n_ctx = 4096
        params.n_parallel = 1
        params.port = 0
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(params)

    def _complete(self, ids: list[int], new: int, **options: Any) -> Any:
        body = {"prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True, **options}
        request = urllib.request.Request(
            self._server.listening_address + "/completion", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def decode(self, ids: list[int], new: int) -> list[float]:
        """The server tells the time of the prompt and the mean of all other tokens."""
        times = self._complete(ids, new, cache_prompt=False)["timings"]
        assert times["predicted_n"] == new and times["prompt_n"] == len(ids)
        # Its first token comes out of the prompt; the time of the others is not split further.
        return [times["prompt_ms"], *[times["predicted_ms"] / (new - 1)] * (new - 1)]

    def logits(self, ids: list[int], prompt_tokens: int) -> npt.NDArray[np.float32]:
        """Log-probabilities of the whole vocabulary, one token of the text after the other."""
        # What it samples does not matter here, but it lists nothing for a part of a character.
        options = {"cache_prompt": True, "n_probs": 1 << 20, "logit_bias": [["a", 1000]]}
        rows = []
        for stop in range(prompt_tokens + 1, len(ids) + 1):
            (token,) = self._complete(ids[:stop], 1, **options)["completion_probabilities"]
            ranked = token["top_logprobs"]
            row = np.empty(len(ranked), np.float32)
            row[[entry["id"] for entry in ranked]] = [entry["logprob"] for entry in ranked]
            rows.append(row)
        return np.stack(rows)
