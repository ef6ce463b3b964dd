"""Speed, memory and quality of a bundle compared to other runtimes, for dash-bench.

A contender loads one model and takes two measurements; each runs in its own process and all take
turns. Our own contender is here; the clients of other runtimes are entry points of the group
`dash_onnx.peers`, and those that we provide are in benchmarks/, outside this package. May import
core and runtime.
"""
