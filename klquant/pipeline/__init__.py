"""From a checkpoint and a plan to a quantized checkpoint: one unit after the other, resumable, whole or not at all."""
