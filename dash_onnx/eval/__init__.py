"""Quality of a policy: perplexity and KL of a text, and tasks of lm-evaluation-harness.

`text` needs only the runtime. `model` (the bundle as a model of the harness) and `tasks` need the
extra `[eval]`, but nothing from the exporters. Nothing here imports the report or the benchmark.
"""
