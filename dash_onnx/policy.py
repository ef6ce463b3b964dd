"""Policies: which action each layer takes for each token.

Decisions are data: a policy yields one path per decoded token, the runtime executes it.
The first layer always runs, because nothing precedes it that a decision could be based on.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path as FilePath

from dash_onnx.actions import PRECISIONS, SKIP, Action, Path, check_action
from dash_onnx.errors import PolicyError
from dash_onnx.manifest import Manifest


class Policy(ABC):
    """Chooses the path of each decoded token.

    Attributes:
        name: what the trace and summaries call it.
        head: precision of the LM head it uses.
    """

    name: str
    head: Action

    @property
    def uniform(self) -> Path | None:
        """The path that every token takes, or None when paths differ between tokens."""
        return None

    @abstractmethod
    def paths(self) -> Iterator[Path]:
        """A fresh, endless sequence of paths: one per decoded token of one generation."""


class StaticPolicy(Policy):
    """The same path for every token."""

    def __init__(self, path: Path, manifest: Manifest, name: str = "static"):
        """Checks the path against the bundle.

        Raises:
            PolicyError: wrong length, an action that was not exported, or a skipped first layer.
        """
        layers = manifest.model.num_layers
        if len(path) != layers:
            raise PolicyError(f"the path has {len(path)} actions, the model has {layers} layers")
        for action in path:
            check_action(action, manifest.actions)
        if path[0] == SKIP:
            raise PolicyError("the first layer must run: its action cannot be 'skip'")
        self.name = name
        self._path = path
        kinds = set(path)
        self.head = manifest.heads[path[0] if len(kinds) == 1 else SKIP]

    @property
    def uniform(self) -> Path:
        """See `Policy`."""
        return self._path

    def paths(self) -> Iterator[Path]:
        """See `Policy`."""
        return repeat(self._path)


class RandomPolicy(Policy):
    """An independent uniform draw per token and layer; first and last layer always run.

    Every generation repeats the same sequence of paths: it depends on the seed alone.
    """

    def __init__(self, manifest: Manifest, seed: int = 0):
        """Draws from every action of the bundle."""
        self.name = f"random:{seed}"
        self.head = manifest.heads[SKIP]
        self._seed = seed
        self._layers = manifest.model.num_layers
        self._actions = manifest.actions

    def paths(self) -> Iterator[Path]:
        """See `Policy`."""
        rng = random.Random(self._seed)
        running = tuple(action for action in self._actions if action != SKIP)
        ends = {0, self._layers - 1}
        while True:
            yield tuple(
                rng.choice(running if layer in ends else self._actions)
                for layer in range(self._layers)
            )


def make_policy(policy: str | Policy, manifest: Manifest) -> Policy:
    """Resolves a policy given by name.

    Args:
        policy: a `Policy`, or one of
            `full`, `int8`, `int4`: every layer of every token in that precision;
            `static:LIST`: one path for all tokens, such as `static:full,int4*28,int8`;
            `static:@FILE`: the same list read from a file;
            `random` or `random:SEED`: a random path per token.
        manifest: of the bundle it will run on.

    Raises:
        PolicyError: unknown, or the bundle lacks an action it needs.
    """
    if isinstance(policy, Policy):
        return policy
    kind, _, argument = policy.partition(":")
    if kind in PRECISIONS and not argument:
        action = check_action(kind, manifest.actions)
        return StaticPolicy((action,) * manifest.model.num_layers, manifest, name=kind)
    if kind == "static" and argument:
        return StaticPolicy(_parse_path(argument, manifest), manifest)
    if kind == "random":
        try:
            return RandomPolicy(manifest, int(argument or 0))
        except ValueError:
            raise PolicyError(f"random:{argument}: the seed must be an integer") from None
    raise PolicyError(
        f"unknown policy {policy!r}; choose full, int8, int4, random[:SEED], "
        "static:ACTION[*N],... or static:@FILE"
    )


def _parse_path(text: str, manifest: Manifest) -> Path:
    if text.startswith("@"):
        try:
            text = FilePath(text[1:]).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise PolicyError(f"cannot read the path file {text[1:]}: {error}") from None
    limit = manifest.model.num_layers
    path: list[Action] = []
    for item in text.replace("\n", ",").split(","):
        if not item.strip():
            continue
        name, star, count = item.strip().partition("*")
        if star and not count.isdecimal():
            raise PolicyError(f"{item.strip()!r}: expected ACTION*COUNT, such as int4*3")
        action = check_action(name.strip(), manifest.actions)
        path += [action] * (min(int(count), limit + 1) if star else 1)
    return tuple(path)
