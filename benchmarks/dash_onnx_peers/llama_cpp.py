"""llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import cast

import llama_cpp
import numpy as np
import numpy.typing as npt

from dash_onnx_peers import timed

_CONTEXT = 4096  # tokens, for which the K/V cache is allocated


class LlamaCpp:
    """A GGUF file in llama.cpp's library, with its defaults for a context."""

    def __init__(self, target: str, threads: int):
        """Loads the model."""
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            target.encode(), llama_cpp.llama_model_default_params()
        )
        assert model is not None, f"llama.cpp cannot load {target}"
        params = llama_cpp.llama_context_default_params()
        self._room = min(_CONTEXT, llama_cpp.llama_model_n_ctx_train(model))
        params.n_ctx = params.n_batch = self._room
        params.n_threads = params.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, params)
        assert context is not None, f"llama.cpp makes no context for {target}"
        self._context = context
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _next(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits after the last of further tokens, `[V]`, until the next call."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: {code}")
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        found = np.ctypeslib.as_array(
            cast("ctypes._Pointer[ctypes.c_float]", pointer), (self._vocab_size,)
        )
        return cast("npt.NDArray[np.float32]", found)

    def decode(self, ids: list[int], new: int) -> list[float]:
        """See `Contender`."""
        if len(ids) + new > self._room:
            return []
        self._clear()
        given = ids

        def step() -> None:
            nonlocal given
            given = [int(self._next(given).argmax())]

        return timed(step, new)

    def logits(self, ids: list[int], prompt_tokens: int) -> npt.NDArray[np.float32]:
        """One token of the text after the other."""
        self._clear()
        self._next(ids[:prompt_tokens])
        return np.stack([self._next([token]).copy() for token in ids[prompt_tokens:]])
