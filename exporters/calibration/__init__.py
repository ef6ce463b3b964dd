"""The calibration tokens, and what the layers of a model do with them.

`tokens` chooses them: the user's text (`texts`), or what the model writes itself (`self_written`).
`runner` runs each freshly written graph on them, `hidden_states` keeps what it gives, `statistics`
what that shows of a layer; `reference` is the source model in transformers, to compare with.
Another choice of tokens changes every bundle; sums over tokens may be computed otherwise, not be
other sums.
"""
