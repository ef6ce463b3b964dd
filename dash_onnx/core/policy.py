"""Policies: which action each layer takes for each token.

Decisions are data: a policy yields one path per decoded token and the runtime executes it, or
the trained scorer decides inside the runtime and the path is what it decided. The first layer
always runs, because nothing precedes it that a decision could be based on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

from dash_onnx.core.actions import (
    LOSSY,
    PRECISIONS,
    SKIP,
    Action,
    ActionPath,
    LayerGroup,
    check_action,
    each_alone,
    groups_of,
    path_letters,
)
from dash_onnx.core.budget import (
    DEFAULT_PRESET,
    Budget,
    decided_groups,
    fixed_at,
    kl_at,
    multiplier_of,
    reference_ms,
    resolve,
    scorer_facts,
    shown,
    used_actions,
)
from dash_onnx.core.controller import Controller
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.facts import Costs
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import least_budget, plan_below, preset_plans

_MAX_CHARACTERS = 1 << 20  # of a path file


class Policy:
    """Chooses the path of each decoded token.

    Attributes:
        name: what the trace and summaries call it.
        head: precision of the LM head it uses.
        scored: whether the scorer decides, which has a cost of its own.
        budget: mean cost of a token as a fraction of the reference's; None where none was given.
        kl: what it loses on held-out text, in nats; None where that is not known.
    """

    name: str
    head: Action
    scored = False
    budget: float | None = None
    kl: float | None = None

    def cost_ms(self, path: ActionPath, costs: Costs) -> float:
        """Profiled milliseconds of a token on a path that this policy chose."""
        graphs = len(self.groups(len(path)))
        return costs.token_ms(path, self.head, self.scored, graphs=graphs)

    @property
    def uniform(self) -> ActionPath | None:
        """The path that every token takes, or None when paths differ between tokens."""
        return None

    @property
    def cache_key(self) -> str:
        """What policies share if one may read the K/V that the other wrote."""
        return self.name if self.uniform is None else path_letters(self.uniform)

    def used(self, layers: int, actions: tuple[Action, ...]) -> list[set[Action]]:
        """Per layer the actions that may be taken, of those that the bundle has."""
        if self.uniform is not None:
            return [{action} for action in self.uniform]
        return [set(actions)] * layers

    def groups(self, layers: int) -> tuple[LayerGroup, ...]:
        """The layers, in runs whose actions are always the same."""
        return each_alone(layers) if self.uniform is None else groups_of(self.uniform)

    def paths(self) -> Iterator[ActionPath]:
        """A fresh, endless series of paths, one per token, if they do not depend on the token."""
        assert self.uniform is not None, "a policy without one path overrides this"
        return repeat(self.uniform)


class ScoredPolicy(Policy):
    """The trained scorer decides for every token and layer, within a budget.

    Attributes:
        budget: see `Policy`; there is always one.
        multiplier: nats per `Costs.unit_ms` that the table gives for it.
        uses: actions that it takes at this budget, highest precision first.
        fixed: by layer, the action that all tokens take; None where the scorer decides.
    """

    scored = True
    budget: float

    def __init__(self, manifest: Manifest, budget: Budget | None = None):
        """Looks up the budget.

        Raises:
            PolicyError: the bundle has no scorer, or the budget is outside its table.
        """
        facts = scorer_facts(manifest)
        points = facts.points
        self.name = "dash" if budget is None else f"dash:{budget}"
        self.budget = resolve(budget, manifest)
        self.multiplier, self.head = multiplier_of(self.budget, points)
        self.uses = used_actions(self.budget, points)
        self.fixed = fixed_at(self.budget, manifest)
        self._groups = decided_groups(self.fixed, facts.decision_points)
        self.kl = kl_at(self.budget, points)
        self._manifest = manifest

    @property
    def cache_key(self) -> str:
        """See `Policy`."""
        return f"dash {self.budget:g}"

    def used(self, layers: int, actions: tuple[Action, ...]) -> list[set[Action]]:
        """See `Policy`; those of the table: the controller takes no others."""
        return [set(self.uses) if action is None else {action} for action in self.fixed]

    def groups(self, layers: int) -> tuple[LayerGroup, ...]:
        """See `Policy`."""
        return self._groups

    def controller(self) -> Controller:
        """The controller that keeps one generation at the budget."""
        graphs = len(self._groups)
        return Controller(self._manifest, self.budget, self.multiplier, self.head, graphs)


class StaticPolicy(Policy):
    """The same path for every token."""

    def __init__(
        self,
        path: ActionPath,
        manifest: Manifest,
        name: str = "static",
        head: Action | None = None,
        budget: float | None = None,
        kl: float | None = None,
    ):
        """Checks the path against the bundle; the LM head is the manifest's unless given.

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
        self.name, self.budget, self.kl = name, budget, kl
        self._path = path
        kinds = set(path)
        self.head = head or manifest.heads[path[0] if len(kinds) == 1 else SKIP]

    @property
    def uniform(self) -> ActionPath:
        """See `Policy`."""
        return self._path


class RandomPolicy(Policy):
    """An independent draw per token and layer; first and last layer always run.

    Every generation repeats the same sequence of paths: it depends on the seed alone.
    """

    @property
    def cache_key(self) -> str:
        """See `Policy`."""
        return f"{self.name} {self.budget}"

    def __init__(self, manifest: Manifest, seed: int = 0, budget: float | None = None):
        """Draws from all actions with equal probability, or skips as often as a budget requires.

        Args:
            manifest: manifest of the bundle.
            seed: seed of the draws.
            budget: a fraction: layers run at one precision or are skipped.

        Raises:
            PolicyError: not even skipping every inner layer is cheap enough.
        """
        self.name, self.budget = f"random:{seed}", budget
        self.head = manifest.heads[SKIP]
        self._seed = seed
        self._layers = manifest.model.num_layers
        self._actions = manifest.actions
        self._weights = [1.0] * len(self._actions)
        if budget is not None:
            base = base_precision(manifest, budget)
            costs = manifest.costs
            run = costs.token_ms((base,) * self._layers, self.head, graphs=self._layers)
            inner = costs.layers_ms[1:-1]
            saved = sum(layer[base] - layer[SKIP] for layer in inner)
            excess = run - budget * reference_ms(manifest)
            if excess > max(saved, 0.0) + 1e-9:
                raise below_every_skip(budget)
            share = max(excess / saved, 0.0) if saved > 0 else 0.0
            self._actions, self._weights = (base, SKIP), [1 - share, share]

    def paths(self) -> Iterator[ActionPath]:
        """See `Policy`."""
        rng = random.Random(self._seed)
        running = tuple(action for action in self._actions if action != SKIP)
        ends = {0, self._layers - 1}
        while True:
            yield tuple(
                rng.choice(running)
                if layer in ends
                else rng.choices(self._actions, self._weights)[0]
                for layer in range(self._layers)
            )


def below_every_skip(budget: float) -> PolicyError:
    """The error for a budget that no amount of skipping meets."""
    return PolicyError(f"budget {budget:g} is less than skipping every inner layer costs")


def base_precision(manifest: Manifest, budget: float) -> Action:
    """The cheapest precision, of those that lose little, whose path costs at least the budget."""
    limit = budget * reference_ms(manifest)
    for precision in (p for p in reversed(manifest.variants) if p not in LOSSY):
        path = (precision,) * manifest.model.num_layers
        if manifest.costs.token_ms(path, manifest.heads[SKIP]) >= limit:
            return precision
    return manifest.variants[0]


def make_policy(policy: str | Policy, manifest: Manifest, budget: Budget | None = None) -> Policy:
    """Resolves a policy given by name.

    Args:
        policy: a `Policy`, or one of
            `dash`: the trained scorer decides per token and layer (budget: a preset or fraction);
            `full`, `int8`, `int4`, `int2`: every layer of every token in that precision;
            `static`: the best static assignment that training found for the budget;
            `static:LIST`: one path for all tokens, such as `static:int8,int4*28,int8`;
            `static:@FILE`: the same list read from a file;
            `random` or `random:SEED`: a random path per token, within the budget if one is given;
            the empty string: what was measured to be best for the budget, the scorer's decisions
            or one path for all tokens, see `plans`; the highest exported precision if nothing was
            measured.
        manifest: manifest of the bundle it will run on.
        budget: fraction of the reference's time per token, or the name of a preset.

    Raises:
        PolicyError: unknown, the bundle lacks what it needs, or the budget cannot be met.
    """
    if isinstance(policy, Policy):
        _no_budget(policy.name, budget)
        path, layers = policy.uniform, manifest.model.num_layers
        if path is not None and len(path) != layers:
            raise PolicyError(f"policy {policy.name!r} has {len(path)} layers, the model {layers}")
        for action in path or ():
            check_action(action, manifest.actions)
        return policy
    kind, _, argument = policy.partition(":")
    if not policy:
        return _planned(manifest, budget)
    if policy == "dash":
        return ScoredPolicy(manifest, budget)
    if policy == "static":
        if budget is None:
            raise PolicyError("policy 'static' needs a budget, such as 0.8")
        return _best_static(manifest, resolve(budget, manifest))
    if kind == "random":
        try:
            seed = int(argument or 0)
        except ValueError:
            raise PolicyError(f"random:{argument}: the seed must be an integer") from None
        return RandomPolicy(manifest, seed, None if budget is None else resolve(budget, manifest))
    _no_budget(policy, budget)
    if kind in PRECISIONS and not argument:
        action = check_action(kind, manifest.actions)
        return StaticPolicy((action,) * manifest.model.num_layers, manifest, name=kind)
    if kind == "static" and argument:
        return StaticPolicy(_parse_path(argument, manifest), manifest)
    raise PolicyError(
        f"unknown policy {policy!r}; choose dash, full, int8, int4, int2, static, random[:SEED], "
        "static:ACTION[*N],... or static:@FILE"
    )


def _planned(manifest: Manifest, budget: Budget | None) -> Policy:
    """The policy that was measured to be best for a budget."""
    plans = preset_plans(manifest)
    if not plans:
        return make_policy(manifest.variants[0] if budget is None else "dash", manifest, budget)
    name = DEFAULT_PRESET if budget is None else budget
    plan = plans.get(name) if isinstance(name, str) else None
    if plan is None:
        value = resolve(name, manifest)
        plan = plan_below(value, manifest)
        if plan is None:
            raise PolicyError(
                f"budget {value:g} is outside what this bundle can do: from "
                f"{shown(least_budget(manifest))} of the time at the highest exported precision"
            )
    if plan.path is None:
        return ScoredPolicy(manifest, budget if name in plans else plan.budget)
    return StaticPolicy(plan.path, manifest, str(name), plan.head, plan.budget, plan.kl)


def _no_budget(policy: str, budget: Budget | None) -> None:
    if budget is not None:
        raise PolicyError(
            f"policy {policy!r} takes no budget: leave one of them out; dash, static and random "
            "take one"
        )


def _best_static(manifest: Manifest, budget: float) -> StaticPolicy:
    points = scorer_facts(manifest).static
    fitting = [point for point in points if point.budget <= budget + 1e-9]
    if not fitting:
        least = f"the cheapest costs {shown(points[0].budget)}" if points else "none was searched"
        raise PolicyError(f"no static assignment within budget {budget:g}; {least}")
    best = min(fitting, key=lambda point: point.kl)
    return StaticPolicy(best.path, manifest, head=best.head, budget=budget, kl=best.kl)


def _parse_path(text: str, manifest: Manifest) -> ActionPath:
    if text.startswith("@"):
        try:
            with Path(text[1:]).open(encoding="utf-8-sig") as file:
                content = file.read(_MAX_CHARACTERS + 1)
        except (OSError, ValueError) as error:
            raise PolicyError(f"cannot read the path file {text[1:]}: {error}") from None
        if len(content) > _MAX_CHARACTERS:
            raise PolicyError(f"{text[1:]} is not a path file: it is longer than any path")
        text = content
    limit = manifest.model.num_layers
    path: list[Action] = []
    length = 0
    for item in text.replace("\n", ",").split(","):
        if not item.strip():
            continue
        name, star, count = item.strip().partition("*")
        if star and not count.isdecimal():
            raise PolicyError(f"{item.strip()!r}: expected ACTION*COUNT, such as int4*3")
        action = check_action(name.strip(), manifest.actions)
        times = int(count[:9]) if star else 1  # more digits are too many anyway
        length += times
        path += [action] * min(times, limit)
    if length != limit:
        raise PolicyError(f"the path has {length} actions, the model has {limit} layers")
    return tuple(path)
