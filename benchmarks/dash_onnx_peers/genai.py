"""ONNX Runtime GenAI."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime_genai as og

from dash_onnx_peers import timed


class GenAI:
    """A folder of GenAI's model builder, or of dash-fuse."""

    def __init__(self, target: str, threads: int):
        """Loads the model."""
        facts = json.loads((Path(target) / "genai_config.json").read_text("utf-8"))
        self._room: int = facts["model"]["context_length"]
        config = og.Config(target)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = og.Model(config)

    def _generator(self, total: int) -> og.Generator:
        params = og.GeneratorParams(self._model)
        # None of the first `min_length` tokens is EOS.
        params.set_search_options(
            do_sample=False, repetition_penalty=1.0, min_length=total, max_length=total
        )
        return og.Generator(self._model, params)

    def decode(self, ids: list[int], new: int) -> list[float]:
        """See `Contender`."""
        if len(ids) + new > self._room:
            return []
        generator = self._generator(len(ids) + new)

        def first() -> None:
            generator.append_tokens(np.array(ids, np.int32))
            generator.generate_next_token()

        return timed(first, 1) + timed(generator.generate_next_token, new - 1)

    def answer(self, ids: list[int], new: int, drafts: bool) -> tuple[list[int], float]:
        """Decodes greedily until EOS, with or without GenAI's own n-grams.

        Returns:
            Tokens, with EOS as -1, and milliseconds of all tokens but the first.
        """
        params = og.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False, repetition_penalty=1.0, max_length=len(ids) + new
        )
        if drafts:
            params.set_speculative_options(ngram_size=3, max_draft_tokens=8, min_adaptive_k=2)
        generator = og.Generator(self._model, params)
        generator.append_tokens(np.array(ids, np.int32))
        generator.generate_next_token()
        started = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        ms = (time.perf_counter() - started) * 1e3
        tokens = generator.get_sequence(0).tolist()[len(ids) :]
        return tokens + [-1] * (len(tokens) < new), ms  # it took a pass, but is not kept

    def logits(self, ids: list[int], prompt_tokens: int) -> npt.NDArray[np.float32]:
        """Appends the tokens one by one."""
        generator = self._generator(len(ids))
        generator.append_tokens(np.array(ids[:prompt_tokens], np.int32))
        rows = []
        for token in ids[prompt_tokens:]:
            generator.append_tokens(np.array([token], np.int32))
            rows.append(np.array(generator.get_logits(), np.float32).reshape(-1))
        return np.stack(rows)
