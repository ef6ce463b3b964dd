"""From a bundle to text, on ONNX Runtime and numpy alone; never imports torch.

A token's way: `model.py` is the public face, `requests.py` resolves the options, `scheduler.py`
runs what is asked for step by step, `generate.py` is one generation between its passes, and
`rows.py` runs a pass over sequences of `sequence.py`: for each layer it asks a decider of
`deciders.py` for the action and runs the graph that is bound for it. `backend.py` is the CPU,
`cuda/` the other device.
"""
