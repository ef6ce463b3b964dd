"""The actions: what one layer does for one token."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise, starmap
from typing import Literal, NamedTuple, TypeAlias

from dash_onnx.core.errors import PolicyError

Action: TypeAlias = Literal["skip", "int2", "int4", "int8", "full"]
ActionPath: TypeAlias = tuple[Action, ...]
"""All decisions of one token: one action per layer."""

Form: TypeAlias = Literal["skip", "int2", "int4", "int8", "full", "wide"]
"""What one graph of a layer or LM head computes: an action, or what stands in for several."""

SKIP: Action = "skip"
WIDE: Form = "wide"
"""INT8 with one scale for each output feature of a weight and each row of activations: the fastest
matrix product for many rows. It stands in for a precision where a pass has enough rows."""

PRECISIONS: tuple[Action, ...] = ("full", "int8", "int4", "int2")
"""Actions that run the layer, highest precision first."""

DEFAULT_VARIANTS: tuple[Action, ...] = ("int8", "int4")
"""What is exported by default: `full` takes four times INT8's memory and gains hardly anything."""

DEFAULT_FORMS = ",".join((*DEFAULT_VARIANTS, WIDE))
"""The forms exported by default, as `parse_variants` takes them."""

WIDENED: tuple[Action, ...] = ("int4", "int2")
"""Precisions that the wide form may replace. It loses less; where a GGUF file's own integers are
kept, INT4 may lose even less, but both are then close to the file."""

ACTIONS: tuple[Action, ...] = (*PRECISIONS, SKIP)

LETTERS: dict[Action, str] = {"full": "F", "int8": "8", "int4": "4", "int2": "2", "skip": "."}
"""One character per action, so that a path fits on a line."""

DECIDED = "decided"
"""Key of `Costs.whole`, beside precisions: tokens whose actions the scorer decides."""

LOSSY: tuple[Action, ...] = ("int2", SKIP)
"""Actions whose losses are neither small nor additive, so that they must be measured."""


class LayerGroup(NamedTuple):
    """Consecutive layers that take the same action.

    Attributes:
        start: the first one.
        stop: the one after the last.
    """

    start: int
    stop: int


def groups_of(path: Sequence[Action | None], alone: Collection[int] = ()) -> tuple[LayerGroup, ...]:
    """The longest runs of layers that take the same action.

    Args:
        path: action of each layer; None where it differs between tokens: such layers are alone.
        alone: more layers that are alone.
    """

    def apart(layer: int) -> bool:
        before, own = path[layer - 1], path[layer]
        return own is None or own != before or layer in alone or layer - 1 in alone

    edges = [0, *filter(apart, range(1, len(path))), len(path)]
    return tuple(starmap(LayerGroup, pairwise(edges)))


def each_alone(layers: int) -> tuple[LayerGroup, ...]:
    """A group for each layer."""
    return tuple(LayerGroup(layer, layer + 1) for layer in range(layers))


def parse_variants(text: str | None) -> tuple[tuple[Action, ...], bool]:
    """Parses `int8,int4,wide`: precisions, highest first, each once, and whether `wide` is there.

    None leaves the choice to the model: no precision, and `wide`.

    Raises:
        PolicyError: a name is neither, or there is no precision.
    """
    if text is None:
        return (), True
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*PRECISIONS, WIDE):
            known = ", ".join((*PRECISIONS, WIDE))
            raise PolicyError(f"unknown variant {name!r}; choose from {known}")
    precisions = tuple(action for action in PRECISIONS if action in names)
    if not precisions:
        raise PolicyError(f"no precision given; choose from {', '.join(PRECISIONS)}")
    if WIDE in names and not {*WIDENED}.intersection(precisions):
        raise PolicyError(f"wide is a copy for {' and '.join(WIDENED)}: add one, or leave it out")
    return precisions, WIDE in names


def check_action(name: str, exported: Iterable[str]) -> Action:
    """Returns `name` as an action that the bundle has.

    Raises:
        PolicyError: the bundle was exported without it.
    """
    exported = tuple(exported)
    for action in ACTIONS:
        if action == name and action in exported:
            return action
    raise PolicyError(f"action {name!r} is not in this bundle; it has {', '.join(exported)}")


def path_letters(path: ActionPath) -> str:
    """A path as one character per layer."""
    return "".join(LETTERS[action] for action in path)
