"""A model for sglite that takes pictures, and its processor."""
