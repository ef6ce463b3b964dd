"""Speed and quality of a bundle and of its peers, side by side."""

PEERS = {
    "genai": "onnxruntime-genai",
    "llama.cpp": "xllamacpp",
    "transformers": "transformers torch",
    "openvino": "openvino-genai",
}
"""By kind of peer, the packages that it needs."""
