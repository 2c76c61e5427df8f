"""Seeded bugs in the linker, for ``run.py``: (name, file, old line, new line, tests)."""

from __future__ import annotations

LOAD = "flexkv_sglang/linker/load.py"
OFFLOAD = "flexkv_sglang/linker/offload.py"
LEASES = "flexkv_sglang/linker/leases.py"
LINKER = "flexkv_sglang/linker/linker.py"
MODELS = "flexkv_sglang/linker/device_models.py"
LOAD_TESTS = "tests/linker/test_load_failures.py"
OFFLOAD_TESTS = "tests/linker/test_offload_failures.py"
LEASE_TESTS = "tests/linker/test_leases.py"
WEIGHT_TESTS = "tests/linker/test_weights.py"
ROUND_TRIP = "tests/linker/test_round_trip.py"
SHARING = "tests/linker/test_sharing.py"
LAUNCH = "tests/linker/test_launch.py"

MUTANTS = (
    (
        "linker: a page that is not right is scattered",
        LOAD,
        "if flags is None or not all(flags):",
        "if flags is None:",
        LOAD_TESTS,
    ),
    (
        "linker: a failed batch goes on writing slots",
        LOAD,
        "            if self.failed:\n",
        "            if False:\n",
        LOAD_TESTS,
    ),
    (
        "linker: deadlines are not watched",
        LINKER,
        "self._loader.fail_overdue()",
        "pass",
        LOAD_TESTS,
    ),
    (
        "linker: a failed load has landed",
        LOAD,
        "loaded = self._counter.finish(index) and loaded",
        "loaded = self._counter.finish(index) or True",
        LOAD_TESTS,
    ),
    (
        "linker: every layer gets the bytes of the first",
        LOAD,
        "pool.scatter(ids, blocks, pool.layers[layer])",
        "pool.scatter(ids, blocks, 0)",
        ROUND_TRIP,
    ),
    (
        "linker: a cancelled load is started",
        LOAD,
        "self._queued.pop(rid, None) is not None",
        "rid in self._queued",
        LOAD_TESTS,
    ),
    (
        "linker: offloads are reported as they end",
        OFFLOAD,
        "                break\n            count += 1",
        "                continue\n            count += 1",
        OFFLOAD_TESTS,
    ),
    (
        "linker: pages of an offload that was given up are read",
        OFFLOAD,
        "                if job.result is not None:\n                    return False",
        "                if False:\n                    return False",
        OFFLOAD_TESTS,
    ),
    (
        "linker: an overdue offload keeps its pages",
        OFFLOAD,
        "(job.deadline > now or not self._give_up(job))",
        "True",
        OFFLOAD_TESTS,
    ),
    (
        "linker: results outlive a reset",
        OFFLOAD,
        "        self._accepted = deque()\n",
        "",
        OFFLOAD_TESTS,
    ),
    (
        "linker: a failed write is a stored one",
        OFFLOAD,
        "self._settle(job, all(stored))",
        "self._settle(job, True)",
        OFFLOAD_TESTS,
    ),
    (
        "linker: a rank that does not write has failed",
        OFFLOAD,
        "if not opened.spec.writes:",
        "if False:",
        LEASE_TESTS,
    ),
    (
        "linker: leased pages are not pinned",
        "flexkv_sglang/cache/local_pages.py",
        "                self.index.pin([slot for slot in found if slot is not None])\n",
        "",
        LEASE_TESTS,
    ),
    (
        "linker: a lease is not renewed",
        LEASES,
        "lease.until = self._clock() + LEASE_S",
        "lease.until = lease.until or self._clock() + LEASE_S",
        LEASE_TESTS,
    ),
    (
        "linker: a lease never ends",
        LEASES,
        "if lease.until < now and not lease.loading:",
        "if False:",
        LEASE_TESTS,
    ),
    (
        "linker: a lease ends while its load runs",
        LEASES,
        "if lease.until < now and not lease.loading:",
        "if lease.until < now:",
        LEASE_TESTS,
    ),
    (
        "linker: all slots can be leased",
        LEASES,
        "store.slot_count // _SLOTS_PER_LEASED",
        "store.slot_count",
        LEASE_TESTS,
    ),
    (
        "linker: a page found to be bad stays leased",
        LEASES,
        "            self._drop_invalid(lease)\n",
        "",
        LOAD_TESTS,
    ),
    (
        "linker: neighbours' pages are counted at once",
        LEASES,
        "if not pool.spec.writes:\n            return store.holds(keys)",
        "if True:\n            return store.holds(keys)",
        SHARING,
    ),
    (
        "linker: nothing is stored because a neighbour has it",
        "flexkv_sglang/cache/engine.py",
        "claimed = [] if own else self._neighbours.holds(keys)",
        "claimed = self._neighbours.holds(keys)",
        SHARING,
    ),
    (
        "linker: offloads of old weights are stored under the new name",
        LINKER,
        "        self._epoch += 1\n",
        "",
        WEIGHT_TESTS,
    ),
    (
        "linker: a flush goes unnoticed",
        LINKER,
        "            WEIGHTS.flushed()\n",
        "            pass\n",
        WEIGHT_TESTS,
    ),
    (
        "linker: weight updates go unnoticed",
        LINKER,
        "        WEIGHTS.attach(self)\n",
        "",
        WEIGHT_TESTS,
    ),
    (
        "linker: pages have an identity of their own",
        "flexkv_sglang/pools/pool_rules.py",
        'str(getattr(pool, "stands_for", None) or type(pool).__name__)',
        "type(pool).__name__",
        SHARING,
    ),
    (
        "linker: V comes before K",
        MODELS,
        "tables_of([pool.k_buffer, pool.v_buffer]",
        "tables_of([pool.v_buffer, pool.k_buffer]",
        SHARING,
    ),
    (
        "linker: other byte orders are taken for plain ones",
        MODELS,
        'None if order == "nhd" else order',
        "None",
        LAUNCH,
    ),
    (
        "linker: scales are left behind",
        MODELS,
        "pool.store_dtype if any(scaled) else None",
        "None",
        LAUNCH,
    ),
)
