"""Checkpoints on disk: hub names, lazy reading, atomic writing, the compressed-tensors layout."""
