"""`PrunedCache`, and what transformers sees of it."""
