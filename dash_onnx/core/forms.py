"""Which graph runs an action in a pass: the cheapest that is good enough."""

from __future__ import annotations

from dash_onnx.core.actions import WIDE, WIDENED, Action, Form
from dash_onnx.core.facts import PassCosts
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.plans import margin_of
from dash_onnx.core.policy import Policy

PROMISE = 10.0
"""How many times the wide form's KL a policy must lose before its prompts may run wide: what the
form adds is then negligible beside that."""


def form_of(
    passes: PassCosts | None, action: Action, rows: int, context: int, widened: frozenset[Action]
) -> Form:
    """The form of a layer in a pass.

    Args:
        passes: what each form costs; None if there is only one.
        action: the one that the policy takes.
        rows: tokens of all sequences. One row runs as the policy says, because its losses were
            measured that way.
        context: tokens in the K/V cache before the pass. Beyond the last measured one the forms
            compare as there: their attention is the same, so more context adds as much to both
            times, and the slopes differ only by noise.
        widened: actions that the wide form is good enough for.
    """
    if passes is None or rows == 1 or action not in widened:
        return action
    context = min(context, passes.contexts[-1])
    forms: tuple[Form, Form] = (action, WIDE)
    return min(forms, key=lambda form: passes.layer_ms(form, rows, context))


def head_form_of(
    passes: PassCosts | None, head: Action, rows: int, widened: frozenset[Action]
) -> Form:
    """The form of the LM head on all rows of a pass; see `form_of`."""
    if passes is None or rows == 1 or head not in widened:
        return head
    forms: tuple[Form, Form] = (head, WIDE)
    return min(forms, key=lambda form: passes.head_ms(form, rows))


def head_widens(passes: PassCosts | None, head: Action, widened: frozenset[Action]) -> bool:
    """Whether the LM head runs wide in passes of some number of rows; see `form_of`."""
    if passes is None:
        return False
    # Times are linear between these: a form that is faster anywhere is faster at one of them.
    rows = (2, *passes.head_rows, passes.rows[-1])
    return any(head_form_of(passes, head, count, widened) == WIDE for count in rows)


def widened_by(manifest: Manifest) -> frozenset[Action]:
    """Actions that the wide form may replace in any pass of any policy."""
    return frozenset(WIDENED if manifest.wide is not None else ())


def widened_in_prompts(manifest: Manifest, policy: Policy) -> frozenset[Action]:
    """Actions that the wide form is good enough for while a prompt of this policy runs.

    A policy that uses an action of few bits loses so much later that its whole prompt may run wide,
    unless the scorer promises less than `PROMISE` times what the wide form loses, or one path loses
    less than that form, or nobody measured what a path loses that has other actions, too.
    """
    few = widened_by(manifest)
    layers = policy.used(manifest.model.num_layers, manifest.actions)
    used = {action for actions in layers for action in actions}
    if manifest.wide is None or not used & few:
        return few
    if policy.kl is None:
        negligible = not used - few
    else:
        fixed = policy.uniform is not None  # whose prompts would lose as much as its tokens
        lost = policy.kl if fixed else policy.kl * margin_of(manifest) / PROMISE
        negligible = lost >= manifest.wide.kl
    return few | frozenset(manifest.variants) if negligible else few
