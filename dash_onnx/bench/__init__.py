"""Speed, memory and quality of a bundle beside other runtimes, for dash-bench.

A contender loads one model and answers two questions; each lives in a process of its own and all
take turns. Ours is here; the clients of other runtimes are entry points of the group
`dash_onnx.peers`, and those that we ship lie in benchmarks/, outside this package. May import core
and runtime.
"""
