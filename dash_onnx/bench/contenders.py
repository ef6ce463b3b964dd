"""The contenders: each loads a model its own way and answers the same two questions.

`decode(ids, new)`: milliseconds of each of `new` greedy tokens, the first with the prompt.
`logits(ids, prompt_tokens)`: `[S - prompt_tokens, V]` float32 logits after each later token.

Every peer runs with its own defaults but for the number of threads. Imports are local: a
contender lives in a process of its own, and only the peers that are asked for need be installed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dash_onnx.bench import PEERS
from dash_onnx.errors import DeviceError

if TYPE_CHECKING:
    from dash_onnx.policy import Policy
    from dash_onnx.runtime.engine import Model

Logits = npt.NDArray[np.float32]


class Contender(Protocol):
    """What can be measured."""

    def decode(self, ids: list[int], new: int) -> list[float]:
        """Milliseconds of every new token; the first includes the prompt."""

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits | None:
        """Teacher-forced logits after every token but the prompt's; None where it has none."""


class Dash:
    """Our runtime; `target` is the bundle, `variant` a policy, or `policy@budget`."""

    def __init__(self, target: str, variant: str, threads: int):
        """Loads every graph that the policy uses."""
        import dash_onnx

        self._model = dash_onnx.load(target, threads=threads)
        self._policy = policy_of(self._model, variant)
        self._model.preload(self._policy)

    def decode(self, ids: list[int], new: int) -> list[float]:
        """See `Contender`."""
        options: dict[str, Any] = {"max_new_tokens": new, "ignore_eos": True}
        return [step.ms for step in self._model.generate_step(ids, policy=self._policy, **options)]

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits:
        """Decoded token by token, as the policy decides."""
        steps = self._model.teacher_forced(ids, self._policy, prompt_tokens)
        return np.stack([logits.astype(np.float32) for logits, _ in steps])


def policy_of(model: Model, variant: str) -> Policy:
    """The policy that a variant names.

    Raises:
        PolicyError: the bundle has no such policy.
    """
    policy, _, budget = variant.partition("@")
    return model.policy(policy, budget or None)


class GenAI:
    """ONNX Runtime GenAI; `target` is a folder of its model builder."""

    def __init__(self, target: str, _: str, threads: int):
        """Loads the model."""
        import onnxruntime_genai as og

        self._og = og
        config = og.Config(target)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = og.Model(config)

    def _generator(self, total: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, min_length=total, max_length=total)
        return self._og.Generator(self._model, params)

    def decode(self, ids: list[int], new: int) -> list[float]:
        """EOS is masked by `min_length`."""
        generator = self._generator(len(ids) + new)

        def step(index: int) -> None:
            if index == 0:
                generator.append_tokens(np.array(ids, np.int32))
            generator.generate_next_token()

        return _timed(step, new)

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits:
        """One token appended after the other."""
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(np.array(ids[:prompt_tokens], np.int32))
        rows = []
        for token in ids[prompt_tokens:]:
            generator.append_tokens(np.array([token], np.int32))
            rows.append(np.array(generator.get_logits(), np.float32).reshape(-1))
        return np.stack(rows)


class LlamaCpp:
    """llama.cpp; `target` is a GGUF file."""

    def __init__(self, target: str, _: str, threads: int):
        """Loads the model; `logits_all` keeps the logits of every token."""
        from llama_cpp import Llama

        self._model = Llama(
            target,
            n_ctx=4096,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            verbose=False,
        )

    def decode(self, ids: list[int], new: int) -> list[float]:
        """See `Contender`."""
        self._model.reset()
        token = 0

        def step(index: int) -> None:
            nonlocal token
            self._model.eval(ids if index == 0 else [token])
            token = int(self._model.scores[self._model.n_tokens - 1].argmax())

        return _timed(step, new)

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits:
        """The whole text in one batch."""
        self._model.reset()
        self._model.eval(ids)
        return np.array(self._model.scores[prompt_tokens : len(ids)], np.float32)


class Transformers:
    """Hugging Face transformers in PyTorch, FP32; `target` is a model folder."""

    def __init__(self, target: str, _: str, threads: int):
        """Loads the model."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()

    def decode(self, ids: list[int], new: int) -> list[float]:
        """With its K/V cache."""
        torch, cache, given = self._torch, None, self._torch.tensor([ids])

        def step(_: int) -> None:
            nonlocal cache, given
            with torch.inference_mode():
                out = self._model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)

        return _timed(step, new)

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits:
        """The whole text in one batch."""
        with self._torch.inference_mode():
            found = self._model(self._torch.tensor([ids])).logits[0, prompt_tokens:]
        result: Logits = found.float().numpy()
        return result


class OpenVINO:
    """OpenVINO GenAI; `target` is a GGUF file or a folder of OpenVINO models."""

    def __init__(self, target: str, _: str, threads: int):
        """Loads the model."""
        import openvino_genai

        self._genai = openvino_genai
        self._pipe = openvino_genai.LLMPipeline(target, "CPU", INFERENCE_NUM_THREADS=threads)

    def decode(self, ids: list[int], new: int) -> list[float]:
        """Its pipeline tells the time of each token through a streamer."""
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        result = self._pipe.generate(openvino.Tensor(np.array([ids], np.int64)), config)
        raw = result.perf_metrics.raw_metrics
        times = [float(value) / 1e3 for value in raw.m_durations]  # microseconds
        return [float(raw.m_times_to_first_token[0]) / 1e3, *times[-(new - 1) :]]

    def logits(self, ids: list[int], prompt_tokens: int) -> None:
        """The pipeline does not show its logits."""
        return None


KINDS: dict[str, Callable[[str, str, int], Contender]] = {
    "dash": Dash,
    "genai": GenAI,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "openvino": OpenVINO,
}


def load(kind: str, target: str, variant: str, threads: int) -> Contender:
    """Loads a contender.

    Raises:
        DeviceError: its package is not installed, or it cannot load the model.
    """
    try:
        return KINDS[kind](target, variant, threads)
    except ImportError as error:
        raise DeviceError(
            f"peer {kind} is not installed ({error}): `pip install {PEERS[kind]}`"
        ) from None


def _timed(step: Callable[[int], None], count: int) -> list[float]:
    times = []
    for index in range(count):
        started = time.perf_counter()
        step(index)
        times.append((time.perf_counter() - started) * 1e3)
    return times
