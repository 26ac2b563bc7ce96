"""Kimi Delta Attention between its projections: one position of a batch of sequences, a chunk of some sequences."""
