"""How far a checkpoint is from its reference: divergence, agreement, perplexity, where it hurts, and its size."""
