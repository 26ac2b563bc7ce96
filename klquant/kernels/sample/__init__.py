"""Noise that turns the largest logit into a draw."""
