"""Seeded bugs in the health of directories, of their files, and at the boundary; see ``run.py``."""

from __future__ import annotations

BREAKER = "backends/slots/breaker.py"
HEALTH_TESTS = "tests/cache/test_read_write_health.py tests/backends/slots/test_breaker.py"
INDEX_TESTS = "tests/pools/test_page_indices.py"
PAGES = "flexkv_sglang/pools/host_pages.py"
IN_PLACE = "flexkv_sglang/cache/health/in_place.py"
IN_PLACE_TESTS = "tests/cache/test_in_place.py"
FORK_TESTS = "tests/integration/test_fork.py"

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
        "count = self._failed[writing] = 0 if succeeded else self._failed[writing] + 1",
        "count = self._failed[True] = 0 if succeeded else self._failed[True] + 1",
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
    (
        "indices behind the pool are believed",
        PAGES,
        "not pages.token_count or rows.max() < pages.token_count",
        "True",
        INDEX_TESTS,
    ),
    (
        "indices before the pool are believed",
        PAGES,
        "starts.min() >= 0 and ",
        "",
        INDEX_TESTS,
    ),
    (
        "indices across two pages are believed",
        PAGES,
        "(starts % size).any() or ",
        "",
        INDEX_TESTS,
    ),
    (
        "two keys are read into one page",
        PAGES,
        "return not distinct or len(np.unique(starts)) == count",
        "return True",
        INDEX_TESTS,
    ),
    (
        "a rank that does not write says that its pages are lost",
        "flexkv_sglang/pools/transfers.py",
        "    if not pool.spec.writes:\n        return [True] * len(keys)",
        "    if not pool.spec.writes:\n        return [False] * len(keys)",
        INDEX_TESTS,
    ),
    (
        "keys that differ in case are one key",
        "flexkv_sglang/identity/keys.py",
        "if key.hex() == text:",
        "if key:",
        INDEX_TESTS,
    ),
    (
        "the answer of a miss is made outside the boundary",
        "flexkv_sglang/integration/boundary.py",
        "            try:\n                return miss(*args, **kwargs)\n",
        "            return miss(*args, **kwargs)\n            try:\n                pass\n",
        "tests/integration/test_abuse.py",
    ),
    (
        "a lock file that was cleaned away stays away",
        IN_PLACE,
        "if store.lock.file.in_place:\n            return True",
        "if True:\n            return True",
        IN_PLACE_TESTS,
    ),
    (
        "a journal that was cut goes on",
        "backends/slots/journal.py",
        "return is_at(self.path, self._fd) and os.fstat(self._fd).st_size == self._size",
        "return is_at(self.path, self._fd)",
        IN_PLACE_TESTS,
    ),
    (
        "a slot file that is gone is written on",
        IN_PLACE,
        "return is_at(slots.path, slots.fd) and os.fstat(slots.fd).st_size >= size",
        "return True",
        IN_PLACE_TESTS,
    ),
    (
        "files are made on the disk below a mount that is gone",
        IN_PLACE,
        "if there.stat().st_dev != self._devices.get(directory):",
        "if False:",
        IN_PLACE_TESTS,
    ),
    (
        "a file that is made again beside the old one takes the disk twice",
        IN_PLACE,
        "        store.slots.close()\n",
        "",
        IN_PLACE_TESTS,
    ),
    (
        "a restored journal of another generation stays",
        IN_PLACE,
        "        self._remove_rest(store)\n",
        "",
        IN_PLACE_TESTS,
    ),
    (
        "a forked process appends to its parent's journal",
        "backends/slots/journal.py",
        "if os.getpid() != self._process:",
        "if False:",
        FORK_TESTS,
    ),
    (
        "a forked process writes its parent's slots",
        "backends/io/mover.py",
        "if os.getpid() != self._process:  # a",
        "if False:  # a",
        FORK_TESTS,
    ),
    (
        "a forked process keeps its parent's locks",
        "backends/file_lock.py",
        "os.register_at_fork(after_in_child=_leave_to_parent)",
        "",
        FORK_TESTS,
    ),
    (
        "a forked server uses the store of its parent",
        "flexkv_sglang/integration/boundary.py",
        "if self._stores.process != os.getpid():",
        "if False:",
        FORK_TESTS,
    ),
    (
        "the first get makes the memory that pages are copied through",
        "backends/io/direction.py",
        "                self.slab().touch()",
        "                pass",
        "tests/backends/io/test_mover.py",
    ),
    (
        "a call pins the memory that it is the first to use",
        "backends/io/ring.py",
        "                self._pinning.put(piece)",
        "                self._regions.pin(self._fd, piece)",
        "tests/backends/io/test_io_engines.py",
    ),
    (
        "threads that cannot be started are found out in the middle of a transfer",
        "backends/io/posix_io.py",
        "for started in [pool.submit(all_there.wait, _START_S) for _ in range(workers)]:",
        "for started in []:",
        "tests/cache/test_out_of_resources.py",
    ),
    (
        "a page that is late is counted by each tier",
        "flexkv_sglang/cache/tiers.py",
        "if done < stop and time.monotonic() >= deadline:",
        "if False:",
        "tests/cache/test_tiers.py",
    ),
    (
        "linker: device indices across two pages are believed",
        "flexkv_sglang/linker/device_pages.py",
        " | (rows != starts[:, None] + offsets).any()",
        "",
        "tests/linker/test_device_indices.py",
    ),
)
