"""A causal LM, one layer at a time."""
