"""The calibration tokens, and what the layers of a model do with them.

`tokens` chooses them: from the user's text, or what the model writes itself (`self_written`).
`texts` says where text comes from: files and pipes, or `hub` for datasets; each gives an `excerpt`,
its `records` as text. `draw` takes token sequences from that, for training too. `runner` runs each
freshly written graph on the tokens, `hidden_states` keeps what it gives, `statistics` what that
shows of a layer; `reference` is the source model in transformers, to compare with. Another choice
of tokens changes every bundle; sums over tokens may be computed otherwise, not be other sums.
"""
