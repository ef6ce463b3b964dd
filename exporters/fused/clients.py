"""Differences between the programs that run a fused folder; each fact was found by running them.

No operator of the graph is missing in any of them (onnxruntime-web and onnxruntime-node 1.30,
onnxruntime 1.32). But MatMulNBits has no fast kernel in onnxruntime-web: see `widen`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Client:
    """One kind of program.

    Attributes:
        position_ids: lists it as an input. It is not read: positions follow from the mask.
        feeds_budget: lists every input and feeds it, so the budget has no default in the graph.
            The others list required inputs only, and take the default or an adapter's budget.
        genai_files: reads GenAI's configuration, and adapters that set a budget; past and present
            are one buffer, elsewhere they grow by concatenation.
        data_in_branches: finds external data of tensors inside a branch of an `If`.
        multiplies_blocks: has a fast kernel for MatMulNBits; see `widen`.
    """

    position_ids: bool = False
    feeds_budget: bool = False
    genai_files: bool = False
    data_in_branches: bool = True
    multiplies_blocks: bool = True


CLIENTS = {
    # ONNX Runtime GenAI in any language, lm-eval
    "genai": Client(genai_files=True),
    # optimum's ORTModelForCausalLM
    "optimum": Client(position_ids=True),
    # onnxruntime-web
    "web": Client(feeds_budget=True, data_in_branches=False, multiplies_blocks=False),
    # onnxruntime-node
    "node": Client(feeds_budget=True),
}
