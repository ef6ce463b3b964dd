"""Speed and quality of a bundle and of its peers, side by side."""
