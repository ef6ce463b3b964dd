"""The contenders: each loads a model its own way and answers the same two questions.

`decode(ids, new)`: milliseconds of each of `new` greedy tokens, the first with the prompt.
`logits(ids, prompt_tokens)`: `[S - prompt_tokens, V]` float32 logits after each later token.

Every peer runs with its own defaults but for the number of threads. Imports are local: a
contender lives in a process of its own, and only the peers that are asked for need be installed.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dash_onnx.bench import PEERS
from dash_onnx.core.errors import DeviceError

if TYPE_CHECKING:
    from dash_onnx.core.policy import Policy
    from dash_onnx.runtime.engine import Model
    from dash_onnx.runtime.sessions import Memory

Logits = npt.NDArray[np.float32]


class Contender(Protocol):
    """What can be measured."""

    def decode(self, ids: list[int], new: int) -> list[float]:
        """Milliseconds of every new token; the first includes the prompt."""

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits | None:
        """Teacher-forced logits after every token but the prompt's; None where it has none."""


class Dash:
    """Our runtime; `target` is the bundle, `variant` a policy, or `policy@budget`."""

    memory: Memory = "high"

    def __init__(self, target: str, variant: str, threads: int):
        """Loads every graph that the policy uses."""
        import dash_onnx

        self._model = dash_onnx.load(target, threads=threads, memory=self.memory)
        self._policy = policy_of(self._model, variant)
        self._model.preload(self._policy)

    def decode(self, ids: list[int], new: int) -> list[float]:
        """See `Contender`."""
        tokens = self._model.generate_step(
            ids, policy=self._policy, max_new_tokens=new, ignore_eos=True
        )
        return [token.ms for token in tokens]

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits:
        """Decoded token by token, as the policy decides."""
        scored = self._model.score(ids, prompt_tokens=prompt_tokens, policy=self._policy)
        return np.stack([token.logits.astype(np.float32) for token in scored])


class DashLow(Dash):
    """Likewise, loading nothing but what the policy uses."""

    memory = "low"


def policy_of(model: Model, variant: str) -> Policy:
    """The policy that a variant names.

    Raises:
        PolicyError: the bundle has no such policy.
    """
    if variant.startswith("static:"):  # whose `@` names a file
        return model.policy(variant)
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
    """llama.cpp's server, from its prebuilt wheels; `target` is a GGUF file."""

    def __init__(self, target: str, _: str, threads: int):
        """Starts the server on a free port of this machine."""
        import xllamacpp

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

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits:
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
    "dash-low": DashLow,
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
