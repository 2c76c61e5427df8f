"""Seeded bugs in the sets of other nodes, for ``run.py``."""

from __future__ import annotations

SET, FILES = "backends/fleet/replica/fingerprint_set.py", "backends/fleet/replica/files.py"
WRITER, READER = "backends/fleet/replica/writer.py", "backends/fleet/replica/reader.py"
OF_SET = "tests/backends/fleet/replica/test_fingerprint_set.py"
OF_REPLICA = (
    "tests/backends/fleet/replica/test_replica.py tests/backends/fleet/replica/test_files.py"
)

MUTANTS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "replica: a half written record counts",
        SET,
        "* _STIR & _MASK) >> 34 != word >> 34:",
        "* _STIR & _MASK) >> 34 < 0:",
        OF_SET,
    ),
    (
        "replica: a half written record counts in a search of many",
        SET,
        "(words == low | self._checks(records[:, 0], low)) & (numbers < limits)",
        "(words == words) & (numbers < limits)",
        OF_SET,
    ),
    (
        "replica: equal chains of one append lose a record",
        SET,
        "        earlier[order[again + 1]] = numbers[order[again]]\n",
        "",
        OF_SET,
    ),
    (
        "replica: the first word on a page counts, not the last",
        SET,
        "last[:-1] = fingerprints[order[1:]] != fingerprints[order[:-1]]",
        "last[1:] = fingerprints[order[1:]] != fingerprints[order[:-1]]",
        OF_SET,
    ),
    (
        "replica: a window misses its last page",
        SET,
        "widest = int(np.diff(self.starts).max())",
        "widest = int(np.diff(self.starts).max()) - 1",
        OF_SET,
    ),
    (
        "replica: what was added twice counts twice",
        SET,
        "chosen if len(first) == len(chosen) else chosen[np.sort(first)]",
        "chosen",
        OF_SET,
    ),
    (
        "replica: holes before the end of a run are not looked for",
        READER,
        "        return len(fingerprints) if found.all() else int(found.argmin())\n",
        "        return len(fingerprints)\n",
        OF_REPLICA,
    ),
    (
        "replica: the first peer that holds the first page is taken",
        READER,
        "            if length == len(fingerprints):\n                break",
        "            if length:\n                break",
        OF_REPLICA,
    ),
    (
        "replica: a set of another tenancy is taken",
        FILES,
        "memory[: len(header)] != header or ",
        "",
        OF_REPLICA,
    ),
    (
        "replica: a node gets the set of its slot's former node",
        READER,
        "if known is not None and known[0].tenancy == entry.tenancy:",
        "if known is not None:",
        OF_REPLICA,
    ),
    (
        "replica: a torn entry is believed",
        FILES,
        "        if crc != zlib.crc32(data[4:]):\n            return None\n",
        "",
        OF_REPLICA,
    ),
    (
        "replica: a silent agent is believed",
        READER,
        "return -_AHEAD_NS <= age <= self._ttl_ns",
        "return -_AHEAD_NS <= age",
        OF_REPLICA,
    ),
    (
        "replica: a heartbeat of another boot is believed",
        READER,
        "return -_AHEAD_NS <= age <= self._ttl_ns",
        "return age <= self._ttl_ns",
        OF_REPLICA,
    ),
    (
        "replica: the old table does not say that it is retired",
        FILES,
        "            old._words[_RETIRED] = 1\n",
        "            pass\n",
        OF_REPLICA,
    ),
    (
        "replica: a frozen set is never written",
        WRITER,
        "            space.sets[slot].rebase()\n",
        "            return True\n",
        OF_REPLICA,
    ),
    (
        "replica: a full disk keeps pages that were cleared",
        WRITER,
        "            space.hide(entry.peer.slot)  # also when the disk is too full for the empty set\n",
        "",
        OF_REPLICA,
    ),
    (
        "replica: replaced files stay",
        WRITER,
        "            path.unlink(missing_ok=True)\n        self._unused.clear()",
        "            path.stat()\n        self._unused.clear()",
        OF_REPLICA,
    ),
    (
        "replica: a set is known before it is in place",
        FILES,
        "    with _new_file(place.path, end) as memory:\n",
        "    with _new_file(place.path.with_suffix('.no'), end) as memory:\n",
        OF_REPLICA,
    ),
)
"""(name, file, old, new, tests); ``old`` occurs exactly once."""
