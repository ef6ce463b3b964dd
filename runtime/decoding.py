"""One decoded token after the other, whatever chooses its path."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from dash_onnx.core.actions import Path
from dash_onnx.core.policy import PathPolicy, Policy, ScoredPolicy
from dash_onnx.runtime.dispatch import Lane, Logits

Decode: TypeAlias = Callable[[int], tuple[Logits, Path]]
"""Token id -> logits `[V]` of the next token (overwritten by the next call) and the path taken."""


def decoding(lane: Lane, policy: Policy) -> Decode:
    """Prepares one generation under a policy."""
    if isinstance(policy, ScoredPolicy):
        controller = policy.controller()

        def scored(token: int) -> tuple[Logits, Path]:
            logits, path = lane.decode_scored(token, controller.multiplier, policy.head)
            controller.spent(path)
            return logits, path

        return scored
    assert isinstance(policy, PathPolicy)
    paths = policy.paths()

    def given(token: int) -> tuple[Logits, Path]:
        path = next(paths)
        return lane.decode(token, path, policy.head), path

    return given
