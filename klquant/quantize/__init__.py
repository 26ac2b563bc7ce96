"""Quantization algorithms: tensors in, tensors out. No modules, no files, no model."""
