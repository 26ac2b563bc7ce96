"""Draws from a softmax: temperature and noise that make the largest logit one; what top-k, top-p and min-p leave."""
