"""Kimi-Linear as pure functions over weights: one model for calibration, evaluation and the engine."""
