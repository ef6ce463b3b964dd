"""Decisions are data: which action each layer took for each generated token.

python examples/trace.py out/
"""

import sys

import dash_onnx

model = dash_onnx.load(sys.argv[1])
policy = "dash" if model.manifest.scorer else "random:7"  # untrained: nothing decides
marks = {"full": "F", "int8": "8", "int4": "4", "int2": "2", "skip": "."}
for chunk in model.stream("The lighthouse keeper", policy=policy, max_new_tokens=16):
    path = "".join(marks[action] for action in chunk.path)
    print(f"{path}  {chunk.ms:7.2f} ms  {model.text.token(chunk.token)!r}")
