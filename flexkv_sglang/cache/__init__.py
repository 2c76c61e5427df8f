"""The engine of a tier, and tiers in order."""
