"""Hugging Face transformers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from dash_onnx_peers import timed


class Transformers:
    """A model folder in PyTorch, FP32."""

    def __init__(self, target: str, threads: int):
        """Loads the model."""
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()

    def decode(self, ids: list[int], new: int) -> list[float]:
        """With its K/V cache."""
        cache, given = None, torch.tensor([ids])

        def step() -> None:
            nonlocal cache, given
            with torch.inference_mode():
                out = self._model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)

        return timed(step, new)

    def logits(self, ids: list[int], prompt_tokens: int) -> npt.NDArray[np.float32]:
        """The whole text in one batch."""
        with torch.inference_mode():
            found = self._model(torch.tensor([ids])).logits[0, prompt_tokens:]
        result: npt.NDArray[np.float32] = found.float().numpy()
        return result
