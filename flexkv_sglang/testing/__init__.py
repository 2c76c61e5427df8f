"""For authors of tiers: the conformance suite (it needs pytest), page memory for it, and an example tier.

Nothing else in the package imports it, and it holds no test of the package itself.
"""
