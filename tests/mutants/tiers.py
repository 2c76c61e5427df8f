"""Seeded bugs in ``Tiers``, and in the example tier, which the conformance suite must notice."""

from __future__ import annotations

TIERS, EXAMPLE = "flexkv_sglang/cache/tiers.py", "flexkv_sglang/testing/example_tier.py"
TESTS, SUITE = "tests/cache/test_tiers.py", "tests/cache/test_tier_suite.py::TestMemoryTier"
LOCAL = "got = self._get_local(keys[done:split], targets.take(slice(done, split)), deadline)"

MUTANTS = [
    (
        "tier: a read is not awaited when another tier raises",
        TIERS,
        f"            try:\n                {LOCAL}\n            finally:\n",
        f"            if True:\n                {LOCAL}\n            if True:\n",
        TESTS,
    ),
    (
        "tier: pages of other machines are not stored here",
        TIERS,
        "if self._remote[number].traits.backfills:",
        "if False:",
        TESTS,
    ),
    (
        "tier: a tier that is not written is written",
        TIERS,
        "tuple(tier for tier in tiers if tier.traits.written)",
        "tuple(tiers)",
        TESTS,
    ),
    (
        "tier: every tier promotes",
        TIERS,
        "if level and tier.traits.promotes:",
        "if level:",
        TESTS,
    ),
    (
        "tier: no second tier is asked when the first delivers nothing",
        TIERS,
        "elif number + 1 < len(self._remote):",
        "elif False:",
        TESTS,
    ),
    (
        "suite: a tier answers True after a failure",
        EXAMPLE,
        "return [True] * done + [False] * (len(keys) - done)",
        "return self.holds(keys)",
        SUITE,
    ),
    (
        "suite: a damaged page is delivered",
        EXAMPLE,
        "if zlib.crc32(page) != checksum:",
        "if False:",
        SUITE,
    ),
    (
        "suite: a pinned page is evicted",
        EXAMPLE,
        "if slot not in self._pins and key not in keys:",
        "if key not in keys:",
        SUITE,
    ),
]
