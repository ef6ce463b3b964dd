"""Budgets: from the share of the reference's time that a user allows to a price of milliseconds."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TypeAlias

from dash_onnx.actions import SKIP, Action, Path
from dash_onnx.errors import PolicyError
from dash_onnx.manifest import BudgetPoint, Manifest, ScorerFacts

Budget: TypeAlias = float | str
"""A fraction of the reference's time per token, or the name of a preset."""

DEFAULT_PRESET = "balanced"

_GAIN = 0.1  # of the log price per token and unit of relative overspending: settles in ~30 tokens
_REACH = 1.5  # how far beyond the table the controller may push the log price


def reference_ms(manifest: Manifest) -> float:
    """Profiled milliseconds of a token with every layer at the highest exported precision."""
    best = manifest.variants[0]
    return manifest.costs.token_ms((best,) * manifest.model.num_layers, manifest.heads[best])


def scorer_facts(manifest: Manifest) -> ScorerFacts:
    """The facts of the trained scorer.

    Raises:
        PolicyError: the bundle has none.
    """
    if manifest.scorer is None:
        raise PolicyError("this bundle has no trained scorer; train one with `dash-train OUT`")
    return manifest.scorer


def resolve(budget: Budget | None, manifest: Manifest) -> float:
    """A budget as a fraction.

    Args:
        budget: a number, a preset's name, or None for the default preset.
        manifest: of a bundle; presets need a trained scorer.

    Raises:
        PolicyError: neither a number nor a preset, or outside what the bundle can do.
    """
    presets = manifest.scorer.presets if manifest.scorer else {}
    if budget is None or (isinstance(budget, str) and budget in presets):
        name = DEFAULT_PRESET if budget is None else budget
        return scorer_facts(manifest).presets[str(name)]
    try:
        value = float(budget)
    except ValueError:
        known = ", ".join(presets) or "none: this bundle has no trained scorer"
        raise PolicyError(f"budget {budget!r} is neither a number nor a preset ({known})") from None
    if not math.isfinite(value) or not 0 < value <= 1:
        raise PolicyError(f"budget {value:g} is outside 0..1 (a fraction of the full time)")
    return value


def price_of(budget: float, points: tuple[BudgetPoint, ...]) -> tuple[float, Action]:
    """Interpolates the policy table.

    Args:
        budget: a fraction.
        points: by ascending budget.

    Returns:
        Nats per millisecond, and the precision of the LM head.

    Raises:
        PolicyError: the budget is outside the table.
    """
    low, high = points[0].budget, points[-1].budget
    if not low <= budget <= high:
        raise PolicyError(
            f"budget {budget:g} is outside what this bundle can do: {low:.3f} to {high:.3f} of the "
            "full time"
        )
    if len(points) == 1:
        return points[0].price, points[0].head
    right = max(bisect_left([point.budget for point in points], budget), 1)
    a, b = points[right - 1], points[right]
    share = (budget - a.budget) / (b.budget - a.budget)
    price = math.exp((1 - share) * math.log(a.price) + share * math.log(b.price))
    return price, (a if share < 0.5 else b).head


class Controller:
    """Keeps the mean cost of one generation at its budget by steering the price.

    Works on profiled milliseconds, so a generation does not depend on how busy the machine is.

    Attributes:
        price: nats per millisecond, for the next token.
    """

    def __init__(self, manifest: Manifest, budget: float, price: float, head: Action):
        """Starts at the table's price."""
        self.price = price
        self._costs = manifest.costs
        self._head = head
        self._target_ms = budget * reference_ms(manifest)
        points = scorer_facts(manifest).points
        prices = [math.log(point.price) for point in points]
        self._log_price = math.log(price)
        self._low, self._high = min(prices) - _REACH, max(prices) + _REACH

    def spent(self, path: Path) -> None:
        """Notes what a token cost."""
        ms = self._costs.token_ms(path, self._head, scored=True)
        self._log_price += _GAIN * (ms / self._target_ms - 1)
        self._log_price = min(max(self._log_price, self._low), self._high)
        self.price = math.exp(self._log_price)


def evenly_skipped(manifest: Manifest, count: int) -> list[int]:
    """`count` layers, evenly spaced between the first and the last, which always run."""
    inner = manifest.model.num_layers - 2
    return [1 + int((index + 0.5) * inner / count) for index in range(count)]


def similar_skipped(manifest: Manifest, count: int) -> list[int]:
    """The `count` inner layers whose output is most similar to their input (ShortGPT)."""
    inner = range(1, manifest.model.num_layers - 1)
    return sorted(inner, key=lambda layer: -manifest.layers[layer].cosine)[:count]


def skipping_path(
    manifest: Manifest, budget: float, order: str, base: Action | None = None
) -> Path:
    """Runs every layer at one precision and skips as few as the budget asks for.

    Args:
        manifest: of the bundle.
        budget: a fraction.
        order: `even` or `cosine`.
        base: the precision; None takes the cheapest that costs at least the budget.

    Raises:
        PolicyError: not even skipping every inner layer is cheap enough.
    """
    choose = evenly_skipped if order == "even" else similar_skipped
    layers = manifest.model.num_layers
    limit = budget * reference_ms(manifest)
    base = base or base_precision(manifest, budget)
    for count in range(layers - 1):
        skipped = set(choose(manifest, count))
        path = tuple(SKIP if layer in skipped else base for layer in range(layers))
        if manifest.costs.token_ms(path, manifest.heads[SKIP]) <= limit * (1 + 1e-9):
            return path
    raise PolicyError(f"budget {budget:g} is less than skipping every inner layer costs")


def base_precision(manifest: Manifest, budget: float) -> Action:
    """The cheapest precision whose uniform path costs at least the budget."""
    limit = budget * reference_ms(manifest)
    for precision in reversed(manifest.variants):
        path = (precision,) * manifest.model.num_layers
        if manifest.costs.token_ms(path, manifest.heads[SKIP]) >= limit:
            return precision
    return manifest.variants[0]
