"""Model families, how they are found, and how checkpoints are read."""
