"""A conversation in your own app: streamed text, and the K/V of earlier turns reused.

python examples/chat.py out/
"""

import sys

import dash_onnx

model = dash_onnx.load(sys.argv[1])
cache = model.new_cache()
messages: list[dict[str, str]] = []
for question in ("What is the capital of France?", "And of Italy?"):
    messages.append({"role": "user", "content": question})
    answer = ""
    for chunk in model.stream(messages, cache=cache, max_new_tokens=64):
        answer += chunk.text
        print(chunk.text, end="", flush=True)
    print()
    messages.append({"role": "assistant", "content": answer})
