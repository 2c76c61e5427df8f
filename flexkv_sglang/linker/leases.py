"""Leases: which prefixes a request can restore, and the pins that keep them restorable.

A page that is lost between SGLang's lookup and its load costs the request (it is aborted), not just a hit. So a
lookup counts only pages in this process's own files, and pins each for the request that asked, as a *lease*, until
the load is over. SGLang does not report that it gives a request up, so leases end by time, and each lookup of the
request renews its own. Pages that are elsewhere (at a neighbour) are not counted; the first lookup requests their
backfill (``backfill``), and later lookups count them.

Pools that another rank of this server writes (MLA is alike on all ranks, one writes it) cannot be pinned here. They
count without a pin. SGLang restores a page only if all ranks report it, and the rank that writes it has pinned it.

Threads: SGLang's scheduler asks; the linker's watchdog ends leases. Memory only, no input or output.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flexkv_sglang.cache.tiers import PinnedPage, Tiers
from flexkv_sglang.identity.keys import page_key, page_keys
from flexkv_sglang.linker.device_pages import DevicePool
from flexkv_sglang.pools.pool import Pool
from flexkv_sglang.pools.pool_rules import KV
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.prefix import PoolRequirement, usable_prefixes
from flexkv_sglang.types import PageKey

logger = logging.getLogger(__name__)

LEASE_S = 60.0
"""Seconds that a lease lasts without a lookup of its request."""

LOADED_S = 2.0
"""Seconds that it lasts after its load: other ranks may still read pages that this one has pinned."""

_SLOTS_PER_LEASED = 2  # at most one slot of two is leased
_SPAN = 512
_CHAIN_MAX = 1 << 17  # links
_BACKFILL_MAX = 512  # pages that one lookup requests

Request = Callable[[str, list[PageKey], PageKey | None], None]
"""(pool, pages of one chain, the page before them): store them in the own files. Returns at once."""


@dataclass(slots=True)
class PinSet:
    """The pages of one pool that one lease has pinned, and the store where they are pinned."""

    store: Tiers
    pages: dict[PageKey, PinnedPage] = field(default_factory=dict)


@dataclass(slots=True)
class _Lease:
    until: float = 0.0
    loading: bool = False
    texts: list[str] = field(default_factory=list)
    keys: list[PageKey] = field(default_factory=list)
    pools: dict[str, PinSet] = field(default_factory=dict)


class Leases:
    """The leases of one linker. ``pools``: of the model, KV first. ``clock``: seconds, monotonic."""

    def __init__(
        self,
        stores: PoolStores,
        pools: Sequence[DevicePool],
        backfill: Request,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stores, self._pools, self._backfill, self._clock = stores, pools, backfill, clock
        self._lock = threading.Lock()  # guards what follows; held for dict work
        self._by_request: dict[str, _Lease] = {}
        self._counts: dict[str, int] = {}  # leased pages per pool
        self._before: dict[
            str, str
        ] = {}  # page hash -> the one before it; only the scheduler uses it

    def answer(self, rid: str, asked: Mapping[str, Sequence[str]]) -> list[int]:
        """Every prefix length, in pages, that can be restored from all pools.

        ``asked``: pool -> page hashes; of KV all pages, of windows and Mamba state the last ones.
        """
        kv = self._stores.get(KV)
        texts = list(asked.get(KV, ()))
        if kv is None or not texts or not {pool.source for pool in self._pools} <= asked.keys():
            self.end(rid)
            return []
        with self._lock:
            lease = self._by_request.setdefault(rid, _Lease())
            self._drop_invalid(lease)
            if lease.texts != texts:
                lease.texts, lease.keys = texts, page_keys(texts)
                self._note_chain(texts)
            lease.until = self._clock() + LEASE_S
            run = self._leading(lease, kv, lease.keys)
            found = usable_prefixes(run, self._requirements(lease, asked, lease.keys[:run]))
            if not any(pinned.pages for pinned in lease.pools.values()) and not lease.loading:
                del self._by_request[rid]
        self._request_more(kv, lease.keys, run, found.pages)
        return found.lengths

    def page_before(self, text: str) -> PageKey | None:
        """The page before this one, if a recent lookup had both."""
        found = self._before.get(text)
        return None if found is None else page_key(found)

    def loading(self, rid: str) -> None:
        """A load was accepted: the lease lasts until ``loaded`` or ``end``."""
        with self._lock:
            lease = self._by_request.get(rid)
            if lease is not None:
                lease.loading = True

    def loaded(self, rid: str) -> None:
        """The load has succeeded."""
        with self._lock:
            lease = self._by_request.get(rid)
            if lease is not None:
                lease.loading = False
                lease.until = self._clock() + LOADED_S

    def end(self, rid: str) -> None:
        """End the lease of this request, if it has one."""
        with self._lock:
            lease = self._by_request.pop(rid, None)
            if lease is not None:
                self._release(lease)

    def end_all(self) -> None:
        """End all leases."""
        with self._lock:
            leases, self._by_request = self._by_request, {}
            for lease in leases.values():
                self._release(lease)

    def expire(self) -> None:
        """End the leases that no lookup has renewed in time."""
        with self._lock:
            now = self._clock()
            for rid, lease in list(self._by_request.items()):
                if lease.until < now and not lease.loading:
                    self._release(self._by_request.pop(rid))

    def leased_pages(self) -> int:
        """Leased pages of all pools; a page of two leases counts twice."""
        with self._lock:
            return sum(self._counts.values())

    def _drop_invalid(self, lease: _Lease) -> None:
        for name, pinned in lease.pools.items():
            invalid = [pinned.pages.pop(key) for key in pinned.store.invalidated(pinned.pages)]
            if invalid:
                pinned.store.unpin(invalid)
                self._counts[name] -= len(invalid)

    def _note_chain(self, texts: list[str]) -> None:
        if len(self._before) > _CHAIN_MAX:
            self._before = {}
        self._before.update(zip(texts[1:], texts, strict=False))

    def _requirements(
        self, lease: _Lease, asked: Mapping[str, Sequence[str]], keys: list[PageKey]
    ) -> Iterator[tuple[PoolRequirement, Sequence[bool]]]:
        """Per pool beside KV: the pages that a prefix needs of it, and which of ``keys`` it has."""
        for pool in self._pools:
            if pool.name == KV:
                continue
            needed = PoolRequirement(pool.name, pool.policy, max(1, len(asked[pool.source])))
            opened = self._stores.get(pool.name)
            if opened is None or not keys:
                yield needed, []
            elif pool.for_every_page:
                yield needed, [True] * self._leading(lease, opened, keys)
            else:
                yield needed, self._pin(lease, opened, keys)

    def _leading(self, lease: _Lease, pool: Pool, keys: list[PageKey]) -> int:
        """Pin the leading run of pages for the lease; its length."""
        run = 0
        while run < len(keys):
            span = keys[run : run + _SPAN]
            flags = self._pin(lease, pool, span, leading=True)
            good = flags.index(False) if False in flags else len(flags)
            run += good
            if good < len(span):
                break
        return run

    def _pin(
        self, lease: _Lease, pool: Pool, keys: list[PageKey], *, leading: bool = False
    ) -> list[bool]:
        """Pin pages for the lease; per key, whether it is pinned. ``leading``: stop at the first one that is not."""
        store = pool.store
        if store is None:
            return [False] * len(keys)
        if not pool.spec.writes:
            return store.holds(keys)
        pinned = lease.pools.get(pool.name)
        if pinned is None or pinned.store is not store:  # other files, perhaps of other weights
            if pinned is not None:
                self._unpin(pool.name, pinned)
            pinned = lease.pools[pool.name] = PinSet(store)
        room = store.slot_count // _SLOTS_PER_LEASED - self._counts.get(pool.name, 0)
        missing = [key for key in dict.fromkeys(keys) if key not in pinned.pages][: max(0, room)]
        places = store.pin(missing) if missing else []
        if leading and None in places:
            hole = places.index(None)
            store.unpin([place for place in places[hole:] if place is not None])
            places = places[:hole]
        fresh = {k: place for k, place in zip(missing, places, strict=False) if place is not None}
        pinned.pages.update(fresh)
        self._counts[pool.name] = self._counts.get(pool.name, 0) + len(fresh)
        return [key in pinned.pages for key in keys]

    def _release(self, lease: _Lease) -> None:
        for name, pinned in lease.pools.items():
            self._unpin(name, pinned)
        lease.pools = {}

    def _unpin(self, name: str, pinned: PinSet) -> None:
        self._counts[name] -= len(pinned.pages)
        pinned.store.unpin(list(pinned.pages.values()))
        pinned.pages = {}

    def _request_more(self, kv: Pool, keys: list[PageKey], run: int, usable: int) -> None:
        """Request pages that are elsewhere and would make the prefix longer."""
        more = 0
        if kv.spec.writes and kv.store is not None and run < len(keys):
            wanted = keys[run : run + _BACKFILL_MAX]
            more = kv.store.prefix(wanted, promise=False)
            if more:
                self._backfill(KV, wanted[:more], keys[run - 1] if run else None)
        if usable == run + more:
            return
        for pool in self._pools[1:]:
            opened = self._stores.get(pool.name)
            if opened is not None and opened.store is not None and opened.spec.writes:
                reach = keys[max(0, run + more - _BACKFILL_MAX) : run + more]
                places = opened.store.pin(reach)
                opened.store.unpin([place for place in places if place is not None])
                absent = [key for key, place in zip(reach, places, strict=True) if place is None]
                there = opened.store.holds(absent)
                for key, flag in zip(absent, there, strict=True):
                    if flag:
                        self._backfill(pool.name, [key], None)
