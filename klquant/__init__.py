"""klquant: quantize Kimi-Linear checkpoints to INT8, INT4 or INT3, and say what it cost."""

__version__ = "0.1.0"
