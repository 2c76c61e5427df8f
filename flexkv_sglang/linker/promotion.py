"""Promotion: pages that are elsewhere are fetched into the local tier, in the background.

A linker can promise only pages of its own (``lookups``). What a neighbour has is read into staging and put into the
own files although the neighbour holds it, so that a later lookup finds and pins it. ``Tiers`` answers for where
"elsewhere" is: whatever its ``prefix`` counts and ``get`` reads can be promoted.

Threads: ``ask`` from SGLang's scheduler, returns at once; the work is done by one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flexkv_sglang.linker.staging import StagingPool, chunks
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.pools.transfers import fetch, store_own
from flexkv_sglang.threads import JobThread
from flexkv_sglang.types import PageKey

logger = logging.getLogger(__name__)

PROMOTE_S = 8.0
"""A fetch or a write of one chunk is given this long."""

AGAIN_S = 30.0
"""A page that was fetched, and perhaps declined by the local tier, is not fetched again for so long."""

_WAITING_MAX = 8192  # pages that may wait


@dataclass(frozen=True, slots=True)
class _PromotionJob:
    pool: str
    keys: list[PageKey]
    parent: PageKey | None


class Promoter:
    """``staging``: of each pool; it uses their lane "promote"."""

    def __init__(self, stores: PoolStores, staging: Mapping[str, StagingPool]) -> None:
        self._stores, self._staging = stores, staging
        self._wanted: set[tuple[str, PageKey]] = set()  # each operation on these is atomic
        self._tried: dict[tuple[str, PageKey], float] = {}  # first pages of chains, until when
        self._worker = JobThread[_PromotionJob]("flexkv-promote", self._run, self._failed)

    def ask(self, pool: str, keys: list[PageKey], parent: PageKey | None) -> None:
        """Fetch ``keys``, a chain after ``parent``, unless that is under way. Beyond a bound nothing happens."""
        first, now = (pool, keys[0]), time.monotonic()
        if first in self._wanted or len(self._wanted) + len(keys) > _WAITING_MAX:
            return
        if self._tried.get(first, 0.0) > now:
            return
        if len(self._tried) > _WAITING_MAX:
            self._tried = {name: until for name, until in self._tried.items() if until > now}
        self._tried[first] = now + AGAIN_S
        fresh = [key for key in keys if (pool, key) not in self._wanted]
        self._wanted.update((pool, key) for key in fresh)
        if not self._worker.put(_PromotionJob(pool, fresh, parent)):
            self._wanted.clear()

    def wait_idle(self, seconds: float) -> bool:
        """Until nothing is under way; for tests."""
        return self._worker.wait_idle(seconds)

    def stop(self, seconds: float) -> bool:
        """Begin nothing more; False if a job still runs after ``seconds``."""
        return self._worker.stop(seconds)

    def _run(self, job: _PromotionJob) -> None:
        staging = self._staging[job.pool]
        parent = job.parent
        try:
            with self._stores.in_use():
                pool = self._stores.get(job.pool)
                for part, rows, _ in chunks(len(job.keys), staging.halves("promote")):
                    keys = job.keys[part]
                    batch = (
                        None if pool is None else pool.pages.incoming(staging.tokens(rows), keys)
                    )
                    if pool is None or batch is None:
                        return
                    got = sum(fetch(pool, keys, batch, time.monotonic() + PROMOTE_S))
                    if got:
                        part_of = pool.pages.outgoing(staging.tokens(rows[:got]), keys[:got])
                        assert part_of is not None
                        end = time.monotonic() + PROMOTE_S
                        stored = store_own(pool, keys[:got], part_of, parent, end)
                        pool.spec.metrics.count("linker_promoted_pages", sum(stored))
                    if got < len(keys):
                        return
                    parent = keys[-1]
        finally:
            self._wanted.difference_update((job.pool, key) for key in job.keys)

    def _failed(self, job: _PromotionJob, error: Exception) -> None:
        logger.warning("flexkv: %d pages are not promoted: %s", len(job.keys), error)
