"""From a Hugging Face causal LM to a DASH bundle. Needs the `[export]` extra."""

if __name__ != "dash_onnx.exporters":
    raise ImportError("import it as dash_onnx.exporters: a second copy would not share its classes")
