"""Training of the policy: a bundle in, the same bundle with a scorer and its tables out.

`train.py` is the pipeline: text, value regression (`regress.py`), on-policy improvement
(`improve.py`), scorer graph and tables (`finish.py`). `options.py` holds every quantity that may be
varied. `dequantized.py` must compute what the bundle's graphs compute, up to rounding; `scorer.py`
must conform to `core.contract.scorer_ports`. Everything else may change freely.
"""
