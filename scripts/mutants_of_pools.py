"""Seeded bugs in what hybrid models need, for ``mutants.py``: (name, file, old line, new line, tests)."""

from __future__ import annotations

FOLD = "flexkv_sglang/prefix.py"
FOLD_TESTS = "tests/test_prefix.py"

MUTANTS = (
    (
        "a missing sidecar page does not end the prefix",
        FOLD,
        "lengths = [length for length in lengths if length <= boundary]",
        "pass",
        FOLD_TESTS,
    ),
    (
        "a window is not cut at the start",
        FOLD,
        "if run >= min(max(1, demand.window), length):",
        "if run >= max(1, demand.window):",
        FOLD_TESTS,
    ),
    (
        "a window is one page short",
        FOLD,
        "if run >= min(max(1, demand.window), length):",
        "if run >= min(max(1, demand.window - 1), length):",
        FOLD_TESTS,
    ),
    (
        "a hole does not end a window",
        FOLD,
        "run = run + 1 if flag else 0",
        "run = run + 1 if flag else run",
        FOLD_TESTS,
    ),
    (
        "the last trailing pool decides alone",
        FOLD,
        "lengths = [length for length in lengths if length in allowed]",
        "lengths = legal",
        FOLD_TESTS,
    ),
    (
        "shorter lengths than a restorable one are taken for restorable",
        FOLD,
        "return Usable(lengths, boundaries)",
        "return Usable(list(range(1, lengths[-1] + 1)) if lengths else [], boundaries)",
        FOLD_TESTS,
    ),
    (
        "block groups gate",
        FOLD,
        "boundary = _covered_by_groups(demand, held, kv_pages)",
        "boundary = _covered_by_groups(demand, held, kv_pages)\n            lengths = lengths[:boundary]",
        FOLD_TESTS,
    ),
)
