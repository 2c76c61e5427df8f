"""Seeded bugs in the health of directories, of their files, and at the boundary; see ``run.py``."""

from __future__ import annotations

BREAKER = "backends/slots/breaker.py"
HEALTH_TESTS = "tests/cache/test_read_write_health.py tests/backends/slots/test_breaker.py"

MUTANTS = (
    (
        "failed writes condemn reads",
        BREAKER,
        "return count >= _FAILURES and self._trip(reason, readable=writing)",
        "return count >= _FAILURES and self._trip(reason)",
        HEALTH_TESTS,
    ),
    (
        "a read that works hides writes that fail",
        BREAKER,
        "count = self._failed_reads = 0 if succeeded else self._failed_reads + 1",
        "count = self._failed_reads = self._failed_writes = 0 if succeeded else self._failed_reads + 1",
        HEALTH_TESTS,
    ),
    (
        "a directory that hung is not read until it can be written",
        BREAKER,
        "if readable and not self._readable:",
        "if False:",
        HEALTH_TESTS,
    ),
    (
        "pages of a directory that can be read again stay hidden",
        "flexkv_sglang/cache/index/index.py",
        "            self._find_again(region)\n            return 0",
        "            return 0",
        HEALTH_TESTS,
    ),
)
