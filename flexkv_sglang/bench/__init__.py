"""``flexkv bench``: measures this package beside other tools on the user's own disk. In the package
only ``cli/bench.py`` imports it, when it runs.

Measurements for the repository's own tables are in ``benchmarks/``.
"""
