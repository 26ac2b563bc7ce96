"""RMSNorm of a residual stream with the sum before it, and KDA's gated norm of heads."""
