"""The calibration tokens, and what the layers of a model do with them.

`tokens` chooses them: from the user's text, or what the model writes itself (`self_written`).
`texts` defines the sources of text: files and pipes, or `hub` for datasets; each gives an
`excerpt`, its `records` as text. `draw` takes token sequences from that, for training too. `runner`
runs each freshly written graph on the tokens, `hidden_states` stores its outputs, and `statistics`
derives the figures of a layer; `reference` is the source model in transformers, for comparison.
Changing which tokens are chosen changes every bundle; how sums over tokens are computed may change,
the sums themselves may not.
"""
