"""Several layers as one graph, which saves the overhead of dispatching them one by one."""

from __future__ import annotations

from pathlib import PurePosixPath

import onnx
from onnx import helper
from onnx.external_data_helper import uses_external_data

from dash_onnx.core.actions import Form
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import layer_path


def compose(bundle: Bundle, layers: range, form: Form) -> bytes:
    """A graph of consecutive layers in one form, see `contract.joined_ports`.

    Its weights stay in the files of the layers, named relative to the bundle's folder.

    Raises:
        BundleError: a layer's file is missing or damaged.
    """
    names = bundle.manifest.names_joined(layers)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    found: dict[str, onnx.ValueInfoProto] = {}  # inputs and outputs
    opsets: dict[str, int] = {}
    for layer, own in zip(layers, names, strict=True):
        path = layer_path(layer, form)
        model = onnx.load(bundle.verified(path), load_external_data=False)
        graph, folder = model.graph, PurePosixPath(path).parent
        for tensor in graph.initializer:
            if uses_external_data(tensor):
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = str(folder / entry.value)
        values = {
            **own,
            "hidden_in": f"hidden.{layer}" if layer != layers.start else "hidden_in",
            "hidden_out": f"hidden.{layer + 1}" if layer != layers.stop - 1 else "hidden_out",
        }
        shared = {port.name: port.name for port in graph.input}
        sides = [*graph.input, *graph.output]
        rename(graph, f"{layer}.", {**shared, **values})
        for port in sides:
            port.name = values.get(port.name, port.name)
            found.setdefault(port.name, port)
        for opset in model.opset_import:
            opsets[opset.domain] = max(opset.version, opsets.get(opset.domain, 0))
        nodes += graph.node
        weights += graph.initializer
    ports = bundle.manifest.ports_joined(layers)
    whole = helper.make_graph(
        nodes,
        "layers",
        [found[port.name] for port in ports.inputs if port.name in found],
        [found[port.name] for port in ports.outputs],
        weights,
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = helper.make_model(whole, opset_imports=imports, ir_version=model.ir_version)
    return bytes(model.SerializeToString())


def rename(graph: onnx.GraphProto, prefix: str, names: dict[str, str]) -> None:
    """Renames every value: as in `names`, or with a prefix."""

    def renamed(name: str) -> str:
        return name and names.get(name, prefix + name)

    def rename_in(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.input[:] = [renamed(name) for name in node.input]
            node.output[:] = [renamed(name) for name in node.output]
            node.name = prefix + node.name if node.name else ""
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    rename_in(attribute.g)
                    for value in attribute.g.output:
                        value.name = renamed(value.name)
        for tensor in graph.initializer:
            tensor.name = renamed(tensor.name)

    rename_in(graph)
