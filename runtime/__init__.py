"""From a bundle to text, on ONNX Runtime and numpy alone; never imports torch.

A token's way: `generate.py` asks `sequence.py` for a forward pass, whose loop asks a decider of
`deciders.py` for each layer's action and runs the graph that is bound for it. `backend.py` is the
CPU, `cuda/` the other device. `engine.py` is the public face: change nothing there lightly.
"""
