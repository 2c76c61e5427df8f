"""Seeded bugs in how space is taken, made and given back; see ``run.py``."""

from __future__ import annotations

OWNERS = "flexkv_sglang/backends/slots/space/owners.py"
ROOM = "flexkv_sglang/backends/slots/space/room.py"
FLOOR = "flexkv_sglang/cache/health/free_space.py"
SPACE_TESTS = "tests/backends/slots/test_space.py"
FLOOR_TESTS = "tests/cache/test_free_space.py"

MUTANTS = (
    (
        "the newest dead owner makes room first",
        OWNERS,
        "key=lambda holding: holding.touched)",
        "key=lambda holding: -holding.touched)",
        SPACE_TESTS,
    ),
    (
        "dead owners of another user or of this server make room",
        OWNERS,
        "return self.ours and not (self.related or self.alive)",
        "return not self.alive",
        SPACE_TESTS,
    ),
    (
        "files of an unknown format make room",
        OWNERS,
        "if not _is_known(holding):",
        "if False:",
        SPACE_TESTS,
    ),
    (
        "a running server beside this one refuses the start",
        ROOM,
        "if spare + lent < needed:",
        "if spare < needed:",
        SPACE_TESTS,
    ),
    (
        "a memory limit does not count",
        ROOM,
        "if limit is not None and needed > limit.left - limit.reserve:",
        "if False:",
        SPACE_TESTS,
    ),
    (
        "only the own cgroup's limit counts",
        "flexkv_sglang/backends/slots/space/memory_limit.py",
        "return [folder, *(p for p in folder.parents if p == mount.point or mount.point in p.parents)]",
        "return [folder]",
        SPACE_TESTS,
    ),
    (
        "space is given back again before it can show",
        FLOOR,
        "return missing - (effort.given - shown)",
        "return missing",
        FLOOR_TESTS,
    ),
    (
        "space is given back for ever, whether that frees any or not",
        FLOOR,
        "_ROUNDS_MAX = 2",
        "_ROUNDS_MAX = 1000",
        FLOOR_TESTS,
    ),
    (
        "a directory whose journal found no space keeps its space",
        FLOOR,
        "if store.failed:  # nothing",
        "if False:  # nothing",
        FLOOR_TESTS,
    ),
    (
        "a tier that started short stays short",
        FLOOR,
        "self.may_grow = room >= max(short.slot_bytes, short.byte_count // 8)",
        "self.may_grow = False",
        "tests/pools/test_stores.py",
    ),
)
