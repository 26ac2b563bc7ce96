"""Packed linear maps and MLPs."""
