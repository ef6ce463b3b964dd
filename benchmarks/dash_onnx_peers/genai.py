"""ONNX Runtime GenAI."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import onnxruntime_genai as og

from dash_onnx_peers import timed


class GenAI:
    """A folder of GenAI's model builder, or of dash-fuse."""

    def __init__(self, target: str, threads: int):
        """Loads the model."""
        config = og.Config(target)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = og.Model(config)

    def _generator(self, total: int) -> og.Generator:
        params = og.GeneratorParams(self._model)
        # Of `min_length` tokens none is EOS.
        params.set_search_options(do_sample=False, min_length=total, max_length=total)
        return og.Generator(self._model, params)

    def decode(self, ids: list[int], new: int) -> list[float]:
        """See `Contender`."""
        generator = self._generator(len(ids) + new)

        def first() -> None:
            generator.append_tokens(np.array(ids, np.int32))
            generator.generate_next_token()

        return timed(first, 1) + timed(generator.generate_next_token, new - 1)

    def logits(self, ids: list[int], prompt_tokens: int) -> npt.NDArray[np.float32]:
        """Appends one token after the other."""
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(np.array(ids[:prompt_tokens], np.int32))
        rows = []
        for token in ids[prompt_tokens:]:
            generator.append_tokens(np.array([token], np.int32))
            rows.append(np.array(generator.get_logits(), np.float32).reshape(-1))
        return np.stack(rows)
