"""The contenders: each loads a model in its own way and takes the same two measurements.

Every peer runs with its own defaults except the number of threads. Imports are local: a contender
runs in its own process, and only the requested peers need to be installed.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dash_onnx.core.arrays import Logits
from dash_onnx.core.errors import DeviceError
from dash_onnx.runtime.options import GREEDY

if TYPE_CHECKING:
    from dash_onnx.core.policy import Policy
    from dash_onnx.runtime.model import Model
    from dash_onnx.runtime.sessions import Memory

_DRAFTS = "+drafts"  # suffix of a variant that makes drafts


class Contender(Protocol):
    """Something that can be measured. For a peer it is created by `client(path, threads)`."""

    def decode(self, ids: list[int], new: int) -> list[float]:
        """Decodes greedily, past EOS.

        Returns:
            Milliseconds of each of `new` tokens; the first includes the prompt. Empty if they do
            not fit in its context.
        """

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits | None:
        """Teacher-forced logits.

        Returns:
            `[S - prompt_tokens, V]`: one row after each token that is not in the prompt; V may be
            padded. None if the runtime does not expose logits.
        """


class Dash:
    """Our runtime; `variant` is a policy or `policy@budget`, and `+drafts` adds drafting."""

    def __init__(
        self,
        bundle: str,
        threads: int,
        variant: str = "",
        memory: Memory = "high",
        cuda_graphs: bool = False,
    ):
        """Loads every graph that the policy uses."""
        import dash_onnx

        self._model = dash_onnx.load(
            bundle, threads=threads, memory=memory, cuda_graphs=cuda_graphs
        )
        self._policy, self._speculate = policy_of(self._model, variant), drafts(variant)
        self._model.preload(self._policy, batches=bool(self._speculate))

    def decode(self, ids: list[int], new: int) -> list[float]:
        """See `Contender`."""
        if len(ids) + new > self._model.manifest.model.max_length:
            return []
        tokens = self._model.generate_step(
            ids,
            options=GREEDY,
            policy=self._policy,
            max_new_tokens=new,
            ignore_eos=True,
            speculate=self._speculate,
        )
        first, *times = [token.ms for token in tokens]
        if self._speculate:  # a pass yields one or more tokens: the mean counts
            times = [sum(times) / len(times)] * len(times)
        return [first, *times]

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits:
        """Decodes token by token, on the paths that the policy decides."""
        scored = self._model.score(ids, prompt_tokens=prompt_tokens, policy=self._policy)
        return np.stack([token.logits.astype(np.float32) for token in scored])


def policy_of(model: Model, variant: str) -> Policy:
    """The policy that a variant names.

    Raises:
        PolicyError: the bundle has no such policy.
    """
    variant = variant.removesuffix(_DRAFTS)
    if variant.startswith("static:"):  # here `@` is part of a file name
        return model.policy(variant)
    policy, _, budget = variant.partition("@")
    return model.policy(policy, budget or None)


def drafts(variant: str) -> bool:
    """Whether a variant drafts."""
    return variant.endswith(_DRAFTS)


def peers() -> dict[str, EntryPoint]:
    """The installed clients of other runtimes, by the kind given to `--peer`."""
    return {found.name: found for found in entry_points(group="dash_onnx.peers")}


def load(kind: str, target: str, threads: int, *ours: Any) -> Contender:
    """Loads a contender.

    Args:
        kind: `dash`, or one of `peers()`.
        target: path of the bundle, or of the peer's model.
        threads: threads on the CPU.
        ours: further arguments of `Dash`.

    Raises:
        DashError: a package is not installed, or the bundle does not support the request.
    """
    if kind == "dash":
        return Dash(target, threads, *ours)
    try:
        client = peers()[kind].load()
    except ImportError as error:
        extra = kind.replace(".", "-")
        raise DeviceError(
            f"peer {kind} is not installed ({error}): `pip install './benchmarks[{extra}]'`"
        ) from None
    return client(target, threads)
