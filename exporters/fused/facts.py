"""What a fused folder says about itself, for hosts that know of the budget, and for `renew`."""

from __future__ import annotations

from dataclasses import dataclass

from dash_onnx.actions import Action
from dash_onnx.manifest import Manifest
from dash_onnx.policy import Policy, ScoredPolicy


@dataclass(frozen=True)
class FuseOptions:
    """What the user chose.

    Attributes:
        client: key of `CLIENTS`.
        policy: see `make_policy`; it must be `dash` or have one path for every token.
        budget: the default of the graph's own, as given.
    """

    client: str = "genai"
    policy: str = ""
    budget: str | None = None


@dataclass(frozen=True)
class Budgets:
    """Budgets of a scorer-driven graph, as fractions of the full time per token.

    Attributes:
        default: what the graph takes unless told.
        least: the least that the policy table has; less is taken as this.
        most: likewise.
        presets: by name.
    """

    default: float
    least: float
    most: float
    presets: dict[str, float]


@dataclass(frozen=True)
class FusedFacts:
    """The content of `dash_fused.json`.

    Attributes:
        options: how the folder was asked for.
        model: name of the source model.
        context: most tokens of prompt and answer.
        actions: what the indices in `dash_path` mean.
        runs: those that the graph can run, from dear to cheap. The highest precision has no
            branch where INT8 stands for it: it would double the file for the dearest budgets.
        path: of every token where the policy is fixed; such a graph has no `dash_path`.
        budgets: where the scorer decides; None where the policy is fixed.
    """

    options: FuseOptions
    model: str
    context: int
    actions: tuple[Action, ...]
    runs: tuple[Action, ...]
    path: tuple[Action, ...] | None
    budgets: Budgets | None

    @classmethod
    def of(cls, options: FuseOptions, policy: Policy, manifest: Manifest) -> FusedFacts:
        """The facts of a policy in a bundle."""
        scorer = manifest.scorer
        model = manifest.model.name, manifest.model.max_length
        if not isinstance(policy, ScoredPolicy):
            path = policy.uniform or ()
            runs = tuple(action for action in manifest.actions if action in path)
            return cls(options, *model, manifest.actions, runs, path, None)
        assert scorer is not None
        ends = scorer.points[0].budget, scorer.points[-1].budget
        budgets = Budgets(policy.budget, *ends, scorer.presets)
        runs = scorer.actions[scorer.actions[:2] == ("full", "int8") :]
        return cls(options, *model, scorer.actions, runs, None, budgets)
