"""From a Hugging Face causal LM to a DASH bundle. Needs the `[export]` extra.

The packages from the bottom up, which is also the order in which they may import each other:
`quantize` (weights as integers), `sources` (files of a model), `architectures` (its layers),
`graphs` (layers as ONNX), `calibration` (what layers do with text). Three build on these and are
independent of each other: `export` (a bundle), `train` (its policy) and `fused` (one graph for
other programs).
"""
