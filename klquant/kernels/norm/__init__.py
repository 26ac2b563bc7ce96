"""RMSNorm of a residual stream."""
