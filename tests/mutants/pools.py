"""Seeded bugs in the code for hybrid models; see ``run.py``."""

from __future__ import annotations

FOLD = "flexkv_sglang/prefix.py"
FOLD_TESTS = "tests/test_prefix.py"
GROUP_TESTS = "tests/pools/test_head_groups.py"
POOLS = "flexkv_sglang/pools/stores.py"
POOL_TESTS = (
    "tests/pools/test_stores.py tests/pools/test_pools_in_trouble.py tests/pools/test_transfers.py"
)

MUTANTS = (
    (
        "a clear that finds files closed is lost",
        POOLS,
        "any(pool.store is None for pool in pools)\n            self._clear_open()",
        "any(pool.store is None for pool in pools)",
        POOL_TESTS,
    ),
    (
        "a call opens files itself, however long that takes",
        POOLS,
        "self._opener.run(_OPEN_S)",
        "self.open_pending()",
        POOL_TESTS,
    ),
    (
        "files that are opened during a detach stay open",
        POOLS,
        "if self._state.now is State.CLOSED or self._pools.get(pool.name) is not pool:",
        "if self._pools.get(pool.name) is not pool:",
        POOL_TESTS,
    ),
    (
        "a pool that was replaced while its files were opened keeps them",
        POOLS,
        "if self._state.now is State.CLOSED or self._pools.get(pool.name) is not pool:",
        "if self._state.now is State.CLOSED:",
        POOL_TESTS,
    ),
    (
        "a pool that cannot be stored leaves no trace",
        POOLS,
        'self._unstored[name] = "it could not be looked at, see the log"',
        "pass",
        POOL_TESTS,
    ),
    (
        "transfers begin after close",
        "backends/io/direction.py",
        "            if self._closed:  # the numbers of closed files may be others' by now",
        "            if False:",
        "tests/backends/io/test_mover.py",
    ),
    (
        "files are closed under a record",
        "flexkv_sglang/cache/local_pages.py",
        "                jobs[directory] = directory.journal.post(work, limit)  # behind the records",
        "                jobs[directory] = directory.upkeep.post(work, limit)",
        "tests/integration/test_failures.py",
    ),
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
        "if run >= min(max(1, requirement.window), length):",
        "if run >= max(1, requirement.window):",
        FOLD_TESTS,
    ),
    (
        "a window is one page short",
        FOLD,
        "if run >= min(max(1, requirement.window), length):",
        "if run >= min(max(1, requirement.window - 1), length):",
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
        "return RestorablePrefixes(lengths, boundaries)",
        "return RestorablePrefixes(list(range(1, lengths[-1] + 1)) if lengths else [], boundaries)",
        FOLD_TESTS,
    ),
    (
        "block groups gate",
        FOLD,
        "boundary = _covered_by_groups(requirement, held, kv_pages)",
        "boundary = _covered_by_groups(requirement, held, kv_pages)\n            lengths = lengths[:boundary]",
        FOLD_TESTS,
    ),
    (
        "pools share a namespace",
        "flexkv_sglang/integration/pool_identity.py",
        "pool=name,\n            pool_class=",
        'pool="kv",\n            pool_class=',
        POOL_TESTS,
    ),
    (
        "the call for KV alone forgets the sidecars",
        "flexkv_sglang/integration/storage.py",
        "return self._usable(keys, self._stores.sidecars()).pages",
        "return self._usable(keys, []).pages",
        POOL_TESTS,
    ),
    (
        "a pool named twice answers for its last part",
        "flexkv_sglang/pools/transfers.py",
        "flags if good else [False] * len(flags)",
        "flags",
        POOL_TESTS,
    ),
    (
        "hybrid hits are not protected",
        "flexkv_sglang/pools/transfers.py",
        "stored_run(pool, keys[first : result.pages], promise=True)",
        "pass",
        POOL_TESTS,
    ),
    (
        "more is protected than the fold announces",
        "flexkv_sglang/pools/transfers.py",
        "promise=not requirements)",
        "promise=True)",
        POOL_TESTS,
    ),
    (
        "Mamba state is taken for replicated",
        "flexkv_sglang/pools/pool_rules.py",
        "if not mla or name == MAMBA:\n        return False",
        "if not mla:\n        return False\n    if name == MAMBA:\n        return True",
        POOL_TESTS,
    ),
    (
        "heads of another rank are taken for one's own",
        "flexkv_sglang/pools/pool_rules.py",
        'if hasattr(pool, "head_num") and',
        "if False and",
        POOL_TESTS,
    ),
    (
        "a marker is there without a record",
        "flexkv_sglang/pools/transfers.py",
        "results += batch.landed(groups.whole(flags))",
        "results += batch.landed([True] * len(keys[part]))",
        POOL_TESTS,
    ),
    (
        "pools beside KV come on top of the size",
        POOLS,
        "if pool.quotas != quotas[pool.name] or (",
        "if (",
        POOL_TESTS,
    ),
    (
        "a page is there with one of its head groups",
        "flexkv_sglang/pools/head_groups.py",
        "all(flags[i : i + self.count])",
        "any(flags[i : i + self.count])",
        GROUP_TESTS,
    ),
    (
        "the chain of head groups breaks between calls",
        "flexkv_sglang/pools/transfers.py",
        "groups.last_key(parent)",
        "parent",
        GROUP_TESTS,
    ),
    (
        "every rank takes its head groups for the first ones",
        "flexkv_sglang/pools/head_groups.py",
        "int(config.tp_rank) * count",
        "0",
        GROUP_TESTS,
    ),
    (
        "windows by groups are taken for windows by pages",
        "flexkv_sglang/pools/transfers.py",
        "groups.whole(opened.holds(groups.keys(keys)))",
        "opened.holds(groups.keys(keys))",
        GROUP_TESTS,
    ),
)
