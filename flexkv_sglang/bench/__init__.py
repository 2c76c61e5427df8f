"""``flexkv bench``: measures this package beside other tools on the user's own disk. Nothing else imports it.

Measurements for the repository's own tables are in ``benchmarks/``.
"""
