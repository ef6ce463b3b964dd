"""INT8, INT4 and INT2 weights in the layout of ONNX Runtime's MatMulNBits.

`blockwise` holds the layout and rounds each block to the nearest levels; `gptq` rounds to INT4 or
INT2 with error feedback. Tensors in, integers out: nothing here depends on models, files or graphs.
The layout is defined by the operator and fixed; how the levels are chosen may change.
"""
