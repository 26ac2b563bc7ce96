"""The engine: packed weights on their devices, and what runs them."""
