"""Routed experts, their router, and the shared expert."""
