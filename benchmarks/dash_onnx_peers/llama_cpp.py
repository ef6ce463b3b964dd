"""llama.cpp."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Sequence
from typing import cast

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from dash_onnx_peers import timed

_CONTEXT = 4096  # tokens for which the K/V cache is allocated
_DRAFTS = 2  # drafted tokens per pass, as llama-cpp-python advises for CPUs


class LlamaCpp:
    """A GGUF file in the llama.cpp library, with its default context parameters."""

    def __init__(self, target: str, threads: int):
        """Loads the model."""
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # else it prints every tensor
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
        self._vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._lookup = LlamaPromptLookupDecoding(num_pred_tokens=_DRAFTS)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _next(self, ids: Sequence[int], rows: int = 1) -> npt.NDArray[np.float32]:
        """Logits after the last `rows` tokens, 1 or all: `[rows, V]`, valid until the next call."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        if rows > 1:
            batch.logits = (ctypes.c_int8 * rows)(*[1] * rows)
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: {code}")
        pointer = llama_cpp.llama_get_logits_ith(self._context, -rows)
        found = np.ctypeslib.as_array(
            cast("ctypes._Pointer[ctypes.c_float]", pointer), (rows, self._vocab_size)
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
            given = [int(self._next(given)[0].argmax())]

        return timed(step, new)

    def logits(self, ids: list[int], prompt_tokens: int) -> npt.NDArray[np.float32]:
        """Feeds the text token by token."""
        self._clear()
        self._next(ids[:prompt_tokens])
        return np.concatenate([self._next([token]).copy() for token in ids[prompt_tokens:]])

    def answer(self, ids: list[int], new: int, drafts: bool) -> tuple[list[int], float]:
        """Decodes greedily until the end, with or without llama-cpp-python's prompt lookup.

        Returns:
            Tokens, including the one that ends the text, and milliseconds of all but the first.
        """
        assert len(ids) + new <= self._room, f"llama.cpp has a context of {self._room} tokens here"
        self._clear()
        memory, text = llama_cpp.llama_get_memory(self._context), [*ids]
        drawn = self._next(ids).argmax(1).tolist()
        started = time.perf_counter()
        while True:
            for token in drawn:
                text.append(token)
                ended = llama_cpp.llama_vocab_is_eog(self._vocabulary, token)
                if ended or len(text) == len(ids) + new:
                    return text[len(ids) :], (time.perf_counter() - started) * 1e3
            some = self._lookup(np.array(text, np.intc)).tolist() if drafts else []
            some = some[: len(ids) + new - len(text) - 1]
            drawn = self._next([text[-1], *some], 1 + len(some)).argmax(1).tolist()
            right = next((n for n, draft in enumerate(some) if draft != drawn[n]), len(some))
            drawn = drawn[: right + 1]
            if right < len(some):
                forgets = llama_cpp.llama_memory_seq_rm(memory, 0, len(text) + right, -1)
                assert forgets, "llama.cpp cannot forget rejected tokens of this model"
