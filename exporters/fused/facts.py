"""The content of a fused folder, and its description for hosts that set the budget."""

from __future__ import annotations

from dataclasses import dataclass

from dash_onnx.core.actions import WIDE, WIDENED, Action, Form, check_action
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import Policy, ScoredPolicy

MODEL = "model.onnx"
DATA = "model.onnx.data"
FACTS = "dash_fused.json"
BUDGET = "dash_budget"
"""Graph input, float `[1]`: fraction of the reference's time per token."""

PATH = "dash_path"
"""Graph output, int64 `[L]`: index of each layer's action in `actions` of `dash_fused.json`."""


def adapter(preset: str) -> str:
    """File of the adapter that sets a preset's budget."""
    return f"{preset}.onnx_adapter"


@dataclass(frozen=True)
class FuseOptions:
    """The options of a fused graph.

    Attributes:
        client: key of `CLIENTS`.
        policy: see `make_policy`; it must be `dash` or have one path for every token.
        budget: the graph's default budget, as given.
        prefill: with `dash`, the precision of prompts; None takes the highest that it decides
            between. A fixed policy runs prompts on its path; `wide` runs them in the wide form,
            if the path has INT4 or INT2 layers.
    """

    client: str = "genai"
    policy: str = ""
    budget: str | None = None
    prefill: Form | None = None


@dataclass(frozen=True)
class Budgets:
    """Budgets of a scorer-driven graph, as fractions of the reference's time per token.

    Attributes:
        default: budget used when none is given.
        least: lowest in the policy table; lower budgets are raised to it.
        most: highest in the policy table; higher budgets are lowered to it.
        presets: budgets by preset name.
    """

    default: float
    least: float
    most: float
    presets: dict[str, float]


@dataclass(frozen=True)
class FusedFacts:
    """The content of `dash_fused.json`.

    Attributes:
        options: the options it was made with.
        model: name of the source model.
        context: maximum number of tokens of prompt and answer.
        actions: what the indices in `dash_path` mean.
        runs: the actions that the graph decides between, most expensive first. The highest
            precision is left out if INT8 can replace it: it would double the file for the sake of
            the highest budgets.
        prompt: precision of a prompt if the scorer decides; `wide` or None if it does not.
        path: path of every token if the policy is fixed; such a graph has no `dash_path`.
        budgets: budgets if the scorer decides; None if the policy is fixed.
    """

    options: FuseOptions
    model: str
    context: int
    actions: tuple[Action, ...]
    runs: tuple[Action, ...]
    prompt: Form | None
    path: tuple[Action, ...] | None
    budgets: Budgets | None

    @classmethod
    def of(cls, options: FuseOptions, policy: Policy, manifest: Manifest) -> FusedFacts:
        """The facts of a policy in a bundle.

        Raises:
            PolicyError: the bundle lacks the precision of prompts, or the policy takes none.
        """
        scorer = manifest.scorer
        model = manifest.model.name, manifest.model.max_length
        if not isinstance(policy, ScoredPolicy):
            path, prompt = policy.uniform or (), options.prefill
            if prompt not in (None, WIDE) or (prompt == WIDE and {*WIDENED}.isdisjoint(path)):
                raise PolicyError(
                    f"policy {policy.name!r} has one path: it takes no prefill except `wide`, "
                    "and that only with int4 or int2 layers"
                )
            if prompt == WIDE and manifest.wide is None:
                raise PolicyError("this bundle has no wide form: export again with it")
            runs = tuple(action for action in manifest.actions if action in path)
            return cls(options, *model, manifest.actions, runs, prompt, path, None)
        if options.prefill == WIDE:
            raise PolicyError("prefill wide needs a policy with one path, such as int4")
        assert scorer is not None
        runs = scorer.actions[scorer.actions[:2] == ("full", "int8") :]
        prompt = check_action(options.prefill or runs[0], manifest.variants)
        ends = scorer.points[0].budget, scorer.points[-1].budget
        budgets = Budgets(policy.budget, *ends, scorer.presets)
        return cls(options, *model, scorer.actions, runs, prompt, None, budgets)
