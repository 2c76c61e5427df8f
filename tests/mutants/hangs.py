"""Seeded bugs where a disk hangs, and in the threads that care for it. (name, file, old, new, tests)."""

from __future__ import annotations

THREADS = "flexkv_sglang/threads.py"
DISKS = "tests/integration/test_hanging_disks.py"
UNITS = "tests/test_threads.py"

MUTANTS = (
    (
        "a report that raises ends a periodic thread",
        THREADS,
        "        except Exception as second:  # noqa: BLE001 - of a log handler or of ``failed``; as above",
        "        except ZeroDivisionError as second:",
        UNITS,
    ),
    (
        "a report that raises ends a job thread",
        THREADS,
        "        except Exception as second:  # noqa: BLE001 - as above",
        "        except ZeroDivisionError as second:",
        UNITS,
    ),
    (
        "a thread that refuses takes jobs",
        THREADS,
        "not self._refused and len",
        "len",
        UNITS,
    ),
    (
        "a job that hangs is not noticed",
        THREADS,
        "return job is not None and now > job.begun_at + job.limit_s + OVERDUE_S",
        "return False",
        UNITS,
    ),
    (
        "an idle store does not notice that its disk hangs",
        "flexkv_sglang/cache/upkeep.py",
        "            if directory.hangs(time.monotonic()):",
        "            if False:",
        DISKS,
    ),
    (
        "a write that hangs is not left",
        "backends/io/ring.py",
        "if in_flight == 0 or (transfer.writing and left < -OVERDUE_S):",
        "if in_flight == 0:",
        DISKS,
    ),
    (
        "the healthy directory is bypassed, too",
        "flexkv_sglang/cache/engine.py",
        "        for breaker in {breakers[position] for position in flying}:",
        "        for breaker in set(breakers):",
        DISKS,
    ),
    (
        "the watch blames every directory of a call",
        "flexkv_sglang/cache/disks/call_watch.py",
        "    if len(used) == 1:",
        "    if used:",
        DISKS,
    ),
    (
        "a CLEAR is not owed",
        "flexkv_sglang/cache/local_pages.py",
        "debt.clears, debt.tombstones = debt.clears + 1, []",
        "debt.tombstones = []",
        DISKS,
    ),
    (
        "close takes a directory that hangs for closed",
        "flexkv_sglang/cache/local_pages.py",
        "            if not hung and directory.breaker not in held:",
        "            if False:",
        DISKS,
    ),
)
