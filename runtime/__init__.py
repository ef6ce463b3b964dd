"""Text from a DASH bundle on ONNX Runtime. Needs only numpy, tokenizers, jinja2 and ORT."""

if __name__ != "dash_onnx.runtime":
    raise ImportError("import it as dash_onnx.runtime: a second copy would not share its classes")
