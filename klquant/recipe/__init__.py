"""Recipes and plans: which bits each tensor gets, why, and what that costs. Needs no weights and no torch."""
