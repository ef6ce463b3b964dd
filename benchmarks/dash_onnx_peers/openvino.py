"""OpenVINO GenAI."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino
import openvino_genai


class OpenVINO:
    """A GGUF file or a folder of OpenVINO models, in the precision that OpenVINO chooses."""

    def __init__(self, target: str, threads: int, **properties: str):
        """Loads the model; `properties` are OpenVINO's."""
        self._properties = {"INFERENCE_NUM_THREADS": threads, **properties}
        self._model = Path(target) / "openvino_model.xml"
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # else a repeated prompt costs nothing
        scheduler.max_num_batched_tokens = sys.maxsize  # a whole prompt, as without a scheduler
        self._pipe = openvino_genai.LLMPipeline(
            target, "CPU", scheduler_config=scheduler, **self._properties
        )

    def decode(self, ids: list[int], new: int) -> list[float]:
        """The pipeline reports the time of each token."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        result = self._pipe.generate(openvino.Tensor(np.array([ids], np.int64)), config)
        raw = result.perf_metrics.raw_metrics
        times = [float(value) / 1e3 for value in raw.m_durations]  # microseconds
        return [float(raw.m_times_to_first_token[0]) / 1e3, *times[-(new - 1) :]]

    def logits(self, ids: list[int], prompt_tokens: int) -> npt.NDArray[np.float32] | None:
        """Feeds the text token by token; only for a folder.

        The pipeline does not expose its logits, so this compiles its model once more.
        """
        if not self._model.is_file():
            return None
        compiled = openvino.Core().compile_model(self._model, "CPU", self._properties)
        request = compiled.create_infer_request()
        rows = []
        for start, stop in itertools.pairwise((0, *range(prompt_tokens, len(ids) + 1))):
            given = {
                "input_ids": np.array([ids[start:stop]], np.int64),
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            rows.append(request.infer(given)["logits"][0, -1].astype(np.float32))
        return np.stack(rows[1:])


class OpenVINOF32(OpenVINO):
    """The same, computing in FP32."""

    def __init__(self, target: str, threads: int):
        """Loads the model."""
        super().__init__(target, threads, INFERENCE_PRECISION_HINT="f32")
