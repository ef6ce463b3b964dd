"""From a bundle to text, on ONNX Runtime and numpy alone; never imports torch.

The path of a token: `model.py` is the public interface, `requests.py` resolves the options,
`scheduler.py` runs requests step by step, `generate.py` is one generation between its passes, and
`rows.py` runs a pass over sequences of `sequence.py`: for each layer it asks a decider of
`deciders.py` for the action and runs the graph that is bound for it. `backend.py` is the CPU
backend, `cuda/` the other one.
"""
