"""The fused graph in ONNX Runtime GenAI, which knows nothing of layer skipping.

dash-fuse out/ && python examples/genai.py out/fused "What is the capital of France?" fast
"""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

folder, question = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "Hello!"
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
prompt = tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": question}]))
ids = tokenizer.encode(prompt)
params = og.GeneratorParams(model)
context = params.get_search_options()["max_length"]
params.set_search_options(max_length=min(len(ids) + 256, context))  # of prompt and answer
generator = og.Generator(model, params)
if len(sys.argv) > 3:  # a preset instead of the budget that the graph has
    adapter = Path(folder, f"{sys.argv[3]}.onnx_adapter")
    if not adapter.is_file():
        sys.exit(
            f"{adapter} is missing: without a trained policy there is one path, and no presets"
        )
    adapters = og.Adapters(model)
    adapters.load(str(adapter), sys.argv[3])
    generator.set_active_adapter(adapters, sys.argv[3])
generator.append_tokens(ids)
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
print()
