"""Lookups, reads and writes of one call of SGLang's storage interface.

A hybrid lookup asks each pool which pages it has, folds the answers (``prefix``), and then protects the pages of the
announced prefix in each pool, and no others. Reads and writes use one pool at a time.

Threads: any; nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flexkv_sglang.identity.keys import page_keys
from flexkv_sglang.pools.host_pages import Batch, whole_pages
from flexkv_sglang.pools.pool import Pool
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.prefix import (
    ALL_PAGES,
    BLOCK_GROUPS,
    PoolRequirement,
    RestorablePrefixes,
    usable_prefixes,
)
from flexkv_sglang.types import PageKey

EXISTS_SPAN = 512
"""Keys converted and looked up at a time."""


def leading_pages(kv: Pool, texts: Sequence[str], *, promise: bool) -> list[PageKey]:
    """Keys of the leading run of stored KV pages. Most runs are short: keys are converted in parts."""
    found: list[PageKey] = []
    for start in range(0, len(texts), EXISTS_SPAN):
        span = page_keys(texts[start : start + EXISTS_SPAN])
        count = stored_run(kv, span, promise=promise)
        found += span[:count]
        if count < len(span):
            break
    return found


def usable(
    stores: PoolStores, kv: Pool, texts: Sequence[str], requirements: Sequence[PoolRequirement]
) -> RestorablePrefixes:
    """Prefixes that can be restored from all pools. The pages of the longest are protected in each pool."""
    keys = leading_pages(kv, texts, promise=not requirements)
    result = usable_prefixes(len(keys), _held(stores, keys, requirements))
    if requirements and result.pages:
        stored_run(kv, keys[: result.pages], promise=True)
        for requirement in requirements:
            pool = stores.get(requirement.pool)
            if pool is not None and requirement.policy != BLOCK_GROUPS:
                whole = requirement.policy == ALL_PAGES
                first = 0 if whole else max(0, result.pages - max(1, requirement.window))
                stored_run(pool, keys[first : result.pages], promise=True)
    return result


def _held(
    stores: PoolStores, keys: Sequence[PageKey], requirements: Sequence[PoolRequirement]
) -> Iterator[tuple[PoolRequirement, Sequence[bool]]]:
    for requirement in requirements:
        pool = stores.get(requirement.pool)
        opened = pool.store if pool is not None else None
        flags: Sequence[bool] = []
        if pool is not None and opened is not None:
            if requirement.policy == ALL_PAGES:
                flags = [True] * stored_run(pool, keys, promise=False)
            else:
                groups = pool.pages.groups
                flags = groups.whole(opened.holds(groups.keys(keys)))
            pool.spec.metrics.count("asked_pages", len(keys))
            pool.spec.metrics.count("found_pages", sum(flags))
        yield requirement, flags


def stored_run(pool: Pool, keys: Sequence[PageKey], *, promise: bool) -> int:
    """The number of leading pages that are there with all their head groups."""
    opened, groups = pool.store, pool.pages.groups
    return (
        0 if opened is None else opened.prefix(groups.keys(keys), promise=promise) // groups.count
    )


def read(
    pool: Pool | None, keys: Sequence[PageKey], host_indices: Any, deadline: float
) -> list[bool] | None:
    """Read pages into the host pool. One bool per key, False from the first missing page on.

    None: ``host_indices`` (int64) are not as many whole pages of the pool as there are keys; nothing is touched.
    """
    if pool is None or not keys:
        return [False] * len(keys)
    if not whole_pages(pool.pages, host_indices, len(keys), distinct=True):
        return None
    opened, groups = pool.store, pool.pages.groups
    results: list[bool] = []
    while len(results) < len(keys) and opened is not None and all(results):
        part = slice(len(results), len(results) + pool.pages.span)
        batch = pool.pages.incoming(_indices(pool, host_indices, part), keys[part])
        if batch is None:
            return None
        with pool.spec.metrics.timed("get"):
            flags = opened.get(groups.keys(keys[part]), batch.buffers, deadline)
            results += batch.landed(groups.whole(flags))
    return results + [False] * (len(keys) - len(results))


def fetch(pool: Pool, keys: Sequence[PageKey], batch: Batch, deadline: float) -> list[bool]:
    """Read one batch whose memory the caller chose."""
    opened = pool.store
    if opened is None:
        return [False] * len(keys)
    with pool.spec.metrics.timed("get"):
        groups = pool.pages.groups
        flags = opened.get(groups.keys(keys), batch.buffers, deadline)
        return batch.landed(groups.whole(flags))


def write(
    pool: Pool | None,
    keys: Sequence[PageKey],
    host_indices: Any,
    parent: PageKey | None,
    deadline: float,
) -> list[bool] | None:
    """Write pages of the host pool. One bool per key: True if it is stored now. None: as ``read``."""
    if pool is None or not keys:
        return [False] * len(keys)
    if not whole_pages(pool.pages, host_indices, len(keys), distinct=False):
        return None
    results: list[bool] = []
    while len(results) < len(keys):
        part = slice(len(results), len(results) + pool.pages.span)
        batch = pool.pages.outgoing(_indices(pool, host_indices, part), keys[part])
        if batch is None:
            return None
        before = keys[part.start - 1] if results else parent
        results += store(pool, keys[part], batch, before, deadline)
    return results


def store(
    pool: Pool, keys: Sequence[PageKey], batch: Batch, parent: PageKey | None, deadline: float
) -> list[bool]:
    """Write one batch. True for a rank that writes no pages of this pool: another rank writes the same bytes."""
    opened = pool.store
    if opened is None:
        return [False] * len(keys)
    if not pool.spec.writes:
        return [True] * len(keys)
    with pool.spec.metrics.timed("put"):
        groups = pool.pages.groups
        stored = groups.keys(keys)
        return groups.whole(opened.put(stored, batch.buffers, groups.last_key(parent), deadline))


def store_own(
    pool: Pool, keys: Sequence[PageKey], batch: Batch, parent: PageKey | None, deadline: float
) -> list[bool]:
    """As ``store``, also for pages that a neighbour has."""
    opened = pool.store
    if opened is None:
        return [False] * len(keys)
    return opened.put(keys, batch.buffers, parent, deadline, own=True)


def _indices(pool: Pool, host_indices: Any, part: slice) -> Any:
    tokens = pool.pages.tokens_per_page
    return host_indices[part.start * tokens : part.stop * tokens]


class PoolAnswer:
    """Per pool, one bool per key. For a pool that is named twice in one call: the flags of the last transfer, or all
    False if a transfer before it failed."""

    def __init__(self) -> None:
        self.results: dict[str, list[bool]] = {}

    def add(self, name: str, flags: list[bool]) -> None:
        """The outcome of one transfer."""
        good = all(self.results.get(name, ()))
        self.results[name] = flags if good else [False] * len(flags)
