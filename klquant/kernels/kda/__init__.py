"""One position of Kimi Delta Attention for a batch of sequences."""
