"""A model's host pools: where their pages lie in memory, and one store for each."""
