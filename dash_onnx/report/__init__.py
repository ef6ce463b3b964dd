"""The report on a bundle: what its policy does, what that costs, and how well it predicts."""
