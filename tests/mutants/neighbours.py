"""Seeded bugs in the neighbour protocol, which the stress run must notice. ``scripts/mutants`` applies them."""

from __future__ import annotations

STRESS = "tests/crash/test_campaign.py::test_processes_that_are_killed_read_only_right_pages_of_each_other"
ENGINE, NEIGHBOURS = "flexkv_sglang/cache/engine.py", "backends/slots/neighbours.py"
TOMBSTONE = """\
            buried, left = self._pages.bury(victims, slots, deadline)  # before slots are rewritten
"""
NO_TOMBSTONE = "            buried = [True] * len(slots)\n"
MOVE = """\
            writable = self._tier.writable(slots)
            rows = [i for i in range(len(slots)) if buried[i] and writable[i]]
            targets = [slots[row] for row in rows]
            breakers = self._tier.breakers(targets)
            if rows:
                extents, part = self._tier.extents(targets), sources.take(rows)
                transfer = PageTransfer(*extents, part, deadline, verify, writing=True)
                outcomes = [Outcome.FAILED] * len(rows)
                try:
                    with self._watch.call(transfer, breakers):
                        outcomes = self._mover.move(transfer)
                finally:
                    left |= self._left(transfer, rows, slots, breakers)
                    self._report_health(breakers, outcomes, "write")
                for row, outcome in zip(rows, outcomes, strict=True):
                    done[row] = outcome is Outcome.DONE
"""

MUTANTS: tuple[tuple[str, str, str, str, str], ...] = (
    ("no tombstone before a rewrite", ENGINE, TOMBSTONE, NO_TOMBSTONE, STRESS),
    (
        "tombstone after the rewrite",
        ENGINE,
        TOMBSTONE + MOVE,
        NO_TOMBSTONE + MOVE + TOMBSTONE,
        STRESS,
    ),
    (
        "under stress: no second look at a neighbour",
        ENGINE,
        "            valid = same and claim.journal.directory in seen\n",
        "            valid = True\n",
        STRESS,
    ),
    (
        "the second look does not read the journal",
        ENGINE,
        "partial(self._neighbours.poll_directory, d.path), end - time.monotonic()",
        "bool, end - time.monotonic()",
        STRESS,
    ),
    (
        "what neighbours hold is written again",
        ENGINE,
        "claimed = [] if own else self._neighbours.holds(keys)",
        "claimed: list[bool] = []",
        STRESS,
    ),
    (
        "under stress: an owner's lock is not taken",
        "backends/file_lock.py",
        "                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n                except",
        "                    pass\n                except",
        STRESS,
    ),
)
"""(name, file, old, new, tests); ``old`` occurs exactly once."""
