"""OpenVINO GenAI."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai


class OpenVINO:
    """A GGUF file or a folder of OpenVINO models."""

    def __init__(self, target: str, threads: int):
        """Loads the model."""
        self._pipe = openvino_genai.LLMPipeline(target, "CPU", INFERENCE_NUM_THREADS=threads)

    def decode(self, ids: list[int], new: int) -> list[float]:
        """The pipeline tells the time of each token."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        result = self._pipe.generate(openvino.Tensor(np.array([ids], np.int64)), config)
        raw = result.perf_metrics.raw_metrics
        times = [float(value) / 1e3 for value in raw.m_durations]  # microseconds
        return [float(raw.m_times_to_first_token[0]) / 1e3, *times[-(new - 1) :]]

    def logits(self, ids: list[int], prompt_tokens: int) -> None:
        """The pipeline does not show its logits."""
        return None
