"""Text from a DASH bundle on ONNX Runtime. Needs only numpy, tokenizers, jinja2 and ORT."""
