"""Backfill for a linker: pages that are elsewhere are read and stored in the own files, in the background.

A linker can lease only pages of its own (``leases``). A page that a neighbour or another node has is read into
staging and put into the own files although the neighbour holds it; a later lookup finds and pins it. ``Tiers``
decides where "elsewhere" is: every page that its ``prefix`` counts and its ``get`` reads can be stored.

``sharing.backfill`` differs: there the bytes were read already, for SGLang, and only wait to be stored (decision 021).

Threads: ``request`` from SGLang's scheduler, returns at once; one thread does the work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flexkv_sglang.linker.staging import StagingRows, chunks
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.pools.transfers import fetch, store_own
from flexkv_sglang.threads import JobThread
from flexkv_sglang.types import PageKey

logger = logging.getLogger(__name__)

CHUNK_S = 8.0
"""Time limit for a read or a write of one chunk."""

AGAIN_S = 30.0
"""A page that was read, and perhaps declined by the local tier, is not read again within this time."""

_WAITING_MAX = 8192  # pages that may wait


@dataclass(frozen=True, slots=True)
class _ReadJob:
    pool: str
    keys: list[PageKey]
    parent: PageKey | None


class LinkerBackfill:
    """``staging``: of each pool; backfill uses the rows of that name."""

    def __init__(self, stores: PoolStores, staging: Mapping[str, StagingRows]) -> None:
        self._stores, self._staging = stores, staging
        self._wanted: set[tuple[str, PageKey]] = set()  # each operation on these is atomic
        self._tried: dict[tuple[str, PageKey], float] = {}  # first pages of chains, until when
        self._worker = JobThread[_ReadJob]("flexkv-linker-backfill", self._run, self._failed)

    def request(self, pool: str, keys: list[PageKey], parent: PageKey | None) -> None:
        """Read and store ``keys``, a chain after ``parent``, unless that is under way. A full queue ignores them."""
        first, now = (pool, keys[0]), time.monotonic()
        full = len(self._wanted) + len(keys) > _WAITING_MAX
        if full or first in self._wanted or self._tried.get(first, 0.0) > now:
            return
        if len(self._tried) > _WAITING_MAX:
            self._tried = {name: until for name, until in self._tried.items() if until > now}
        self._tried[first] = now + AGAIN_S
        fresh = [key for key in keys if (pool, key) not in self._wanted]
        self._wanted.update((pool, key) for key in fresh)
        if not self._worker.put(_ReadJob(pool, fresh, parent)):
            self._wanted.clear()

    def stop(self, seconds: float) -> bool:
        """Begin no further job; False if one still runs after ``seconds``."""
        return self._worker.stop(seconds)

    def _run(self, job: _ReadJob) -> None:
        staging = self._staging[job.pool]
        parent = job.parent
        try:
            with self._stores.in_use():
                pool = self._stores.get(job.pool)
                if pool is None:
                    return
                for part, rows, _ in chunks(len(job.keys), staging.halves("backfill")):
                    keys = job.keys[part]
                    batch = pool.pages.incoming(staging.tokens(rows), keys)
                    if batch is None:
                        return
                    got = sum(fetch(pool, keys, batch, time.monotonic() + CHUNK_S))
                    if got:
                        sources = pool.pages.outgoing(staging.tokens(rows[:got]), keys[:got])
                        assert sources is not None
                        end = time.monotonic() + CHUNK_S
                        stored = store_own(pool, keys[:got], sources, parent, end)
                        pool.spec.metrics.count("linker_promoted_pages", sum(stored))
                    if got < len(keys):
                        return
                    parent = keys[-1]
        finally:
            self._wanted.difference_update((job.pool, key) for key in job.keys)

    def _failed(self, job: _ReadJob, error: Exception) -> None:
        logger.warning("flexkv: %d pages of neighbours are not stored: %s", len(job.keys), error)
