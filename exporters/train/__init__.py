"""Training of the scorer: a Markov decision process over the frozen model of a bundle."""
