"""``flexkv doctor``: why nothing is stored or found. Judges; never repairs."""
