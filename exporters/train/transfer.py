"""The scorer of another bundle as a starting point: a sibling model, or the bundle itself."""

from __future__ import annotations

import onnx
import torch
from onnx import numpy_helper

from dash_onnx.core.actions import Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import DashError
from dash_onnx.core.facts import ScorerFacts
from dash_onnx.exporters.train.scorer import Scorer


def scorer_to_start_from(bundle: Bundle) -> ScorerFacts:
    """The facts of the scorer in a bundle.

    Raises:
        DashError: the bundle has no scorer.
    """
    facts = bundle.manifest.scorer
    if facts is None:
        raise DashError(f"{bundle.folder} has no policy to start from: train one with dash-train")
    return facts


def load_scorer(scorer: Scorer, actions: tuple[Action, ...], bundle: Bundle) -> None:
    """Loads the weights of the scorer in a bundle, which was trained for the same decisions.

    Args:
        scorer: scorer to fill, with the decision points of the other one.
        actions: actions that it decides between, most expensive first.
        bundle: bundle of the other one.

    Raises:
        DashError: the other one decides between other actions or for another number of layers, or
            reads hidden states of another width.
    """
    facts = scorer_to_start_from(bundle)
    layers, _, width = scorer.expand.shape
    model = bundle.manifest.model
    known = facts.actions[-len(actions) :] == actions
    size = scorer.reduce.in_features
    if not known or (model.num_layers, model.hidden_size) != (layers, size):
        raise DashError(
            f"the policy of {bundle.folder} cannot start this one: it decides for "
            f"{model.num_layers} layers of width {model.hidden_size} between "
            f"{', '.join(facts.actions)}; this one for {layers} of {size} between "
            f"{', '.join(actions)}"
        )
    graph = onnx.load(bundle.verified(facts.file)).graph
    tensors = {
        tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer
    }
    normalise = next(node for node in graph.node if node.op_type == "LayerNormalization")
    reduce, expand = [node for node in graph.node if node.op_type == "Gemm"][:2]
    increments = tensors[expand.input[1]].T.reshape(layers, -1, width)
    with torch.no_grad():
        scorer.normalise.weight.copy_(tensors[normalise.input[1]])
        scorer.reduce.weight.copy_(tensors[reduce.input[1]].T)
        scorer.reduce.bias.copy_(tensors[reduce.input[2]])
        scorer.expand.copy_(increments[:, 1 - len(actions) :])
        scorer.bias.copy_(tensors[expand.input[2]].reshape(layers, -1)[:, 1 - len(actions) :])
