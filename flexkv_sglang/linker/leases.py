"""Lookups: which prefixes a request could have restored, and the leases that keep them restorable.

A page that is lost between SGLang's lookup and its load costs the request (it is aborted), not just a hit. So a
lookup counts only pages that this process holds itself and keeps: each is pinned for the request that asked, a
*lease*, until the load is over. SGLang does not say when it gives a request up, so leases end by time, and every
lookup of the request renews its own. Pages that are elsewhere (at a neighbour) are not counted; the first lookup asks
for them to be fetched into the local tier (``promotion``), and later ones count them.

Pools that another rank of this server writes (MLA is alike on all ranks, one writes it) cannot be pinned here. They
count as they are: SGLang restores only what all ranks answered, and the writing rank pinned what it answered.

Threads: SGLang's scheduler asks; the linker's watchdog lets leases end. Memory only, no input or output.
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
"""How long a lease lasts without a lookup of its request, in seconds."""

LOADED_S = 2.0
"""How long it lasts after its load: other ranks may still read what this one has pinned."""

_HELD_PART = 2  # at most one slot of so many is leased
_SPAN = 512
_CHAIN_MAX = 1 << 17  # links
_PROMOTE_MAX = 512  # pages asked for by one lookup

Promote = Callable[[str, list[PageKey], PageKey | None], None]
"""(pool, pages of one chain, the page before them): fetch them into the local tier. Returns at once."""


@dataclass(slots=True)
class _Pinned:
    """What one lease keeps of one pool, in the store it was pinned in."""

    store: Tiers
    held: dict[PageKey, PinnedPage] = field(default_factory=dict)


@dataclass(slots=True)
class _Lease:
    until: float = 0.0
    loading: bool = False
    texts: list[str] = field(default_factory=list)
    keys: list[PageKey] = field(default_factory=list)
    pools: dict[str, _Pinned] = field(default_factory=dict)


class Lookups:
    """Of one linker. ``pools``: of the model, KV first. ``clock``: seconds, monotonic."""

    def __init__(
        self,
        stores: PoolStores,
        pools: Sequence[DevicePool],
        promote: Promote,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stores, self._pools, self._promote, self._clock = stores, pools, promote, clock
        self._lock = threading.Lock()  # guards what follows; held for dict work
        self._leases: dict[str, _Lease] = {}
        self._counts: dict[str, int] = {}  # leased pages per pool
        self._before: dict[str, str] = {}  # page hash -> the one before it; the scheduler's alone

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
            lease = self._leases.setdefault(rid, _Lease())
            self._drop_lost(lease)
            if lease.texts != texts:
                lease.texts, lease.keys = texts, page_keys(texts)
                self._note_chain(texts)
            lease.until = self._clock() + LEASE_S
            run = self._leading(lease, kv, lease.keys)
            found = usable_prefixes(run, self._demands(lease, asked, lease.keys[:run]))
            if not any(pinned.held for pinned in lease.pools.values()) and not lease.loading:
                del self._leases[rid]
        self._fetch_more(kv, lease.keys, run, found.pages)
        return found.lengths

    def page_before(self, text: str) -> PageKey | None:
        """The page before this one, if a request that had both was looked up lately."""
        found = self._before.get(text)
        return None if found is None else page_key(found)

    def loading(self, rid: str) -> None:
        """A load was accepted: the lease lasts until ``loaded`` or ``end``."""
        with self._lock:
            lease = self._leases.get(rid)
            if lease is not None:
                lease.loading = True

    def loaded(self, rid: str) -> None:
        """The load is over, and well."""
        with self._lock:
            lease = self._leases.get(rid)
            if lease is not None:
                lease.loading = False
                lease.until = self._clock() + LOADED_S

    def end(self, rid: str) -> None:
        """Nothing is to be kept for this request."""
        with self._lock:
            lease = self._leases.pop(rid, None)
            if lease is not None:
                self._release(lease)

    def end_all(self) -> None:
        """Nothing is to be kept at all."""
        with self._lock:
            leases, self._leases = self._leases, {}
            for lease in leases.values():
                self._release(lease)

    def expire(self) -> None:
        """End what has not been renewed."""
        with self._lock:
            now = self._clock()
            over = [rid for rid, le in self._leases.items() if le.until < now and not le.loading]
            for rid in over:
                self._release(self._leases.pop(rid))

    def leased_pages(self) -> int:
        """Pages of all pools that are kept now; one kept for two requests counts twice."""
        with self._lock:
            return sum(self._counts.values())

    def _drop_lost(self, lease: _Lease) -> None:
        for name, pinned in lease.pools.items():
            gone = [pinned.held.pop(key) for key in pinned.store.invalidated(pinned.held)]
            if gone:
                pinned.store.unpin(gone)
                self._counts[name] -= len(gone)

    def _note_chain(self, texts: list[str]) -> None:
        if len(self._before) > _CHAIN_MAX:
            self._before = {}
        self._before.update(zip(texts[1:], texts, strict=False))

    def _demands(
        self, lease: _Lease, asked: Mapping[str, Sequence[str]], keys: list[PageKey]
    ) -> Iterator[tuple[PoolRequirement, Sequence[bool]]]:
        """Per pool beside KV what a prefix asks of it, and which of ``keys`` it has."""
        for pool in self._pools:
            if pool.name == KV:
                continue
            requirement = PoolRequirement(pool.name, pool.policy, max(1, len(asked[pool.source])))
            opened = self._stores.get(pool.name)
            if opened is None or not keys:
                yield requirement, []
            elif pool.for_every_page:
                run = self._leading(lease, opened, keys)
                yield requirement, [True] * run
            else:
                yield requirement, self._keep(lease, opened, keys)

    def _leading(self, lease: _Lease, pool: Pool, keys: list[PageKey]) -> int:
        """Leading run of pages that are kept for the lease from now on."""
        run = 0
        while run < len(keys):
            span = keys[run : run + _SPAN]
            flags = self._keep(lease, pool, span, leading=True)
            good = flags.index(False) if False in flags else len(flags)
            run += good
            if good < len(span):
                break
        return run

    def _keep(
        self, lease: _Lease, pool: Pool, keys: list[PageKey], *, leading: bool = False
    ) -> list[bool]:
        """Per key: is it kept? ``leading``: nothing behind the first one that is not."""
        store = pool.store
        if store is None:
            return [False] * len(keys)
        if not pool.spec.writes:
            return store.holds(keys)
        pinned = lease.pools.get(pool.name)
        if pinned is None or pinned.store is not store:  # other files, perhaps of other weights
            if pinned is not None:
                self._unpin(pool.name, pinned)
            pinned = lease.pools[pool.name] = _Pinned(store)
        room = store.slot_count // _HELD_PART - self._counts.get(pool.name, 0)
        missing = [key for key in dict.fromkeys(keys) if key not in pinned.held][: max(0, room)]
        places = store.pin(missing) if missing else []
        if leading and None in places:
            hole = places.index(None)
            store.unpin([place for place in places[hole:] if place is not None])
            places = places[:hole]
        fresh = {k: place for k, place in zip(missing, places, strict=False) if place is not None}
        pinned.held.update(fresh)
        self._counts[pool.name] = self._counts.get(pool.name, 0) + len(fresh)
        return [key in pinned.held for key in keys]

    def _release(self, lease: _Lease) -> None:
        for name, pinned in lease.pools.items():
            self._unpin(name, pinned)
        lease.pools = {}

    def _unpin(self, name: str, pinned: _Pinned) -> None:
        self._counts[name] -= len(pinned.held)
        pinned.store.unpin(list(pinned.held.values()))
        pinned.held = {}

    def _fetch_more(self, kv: Pool, keys: list[PageKey], run: int, usable: int) -> None:
        """Ask for what is elsewhere and would make the prefix longer."""
        more = 0
        if kv.spec.writes and kv.store is not None and run < len(keys):
            wanted = keys[run : run + _PROMOTE_MAX]
            more = kv.store.prefix(wanted, promise=False)
            if more:
                self._promote(KV, wanted[:more], keys[run - 1] if run else None)
        if usable == run + more:
            return
        for pool in self._pools[1:]:
            opened = self._stores.get(pool.name)
            if opened is not None and opened.store is not None and opened.spec.writes:
                reach = keys[max(0, run + more - _PROMOTE_MAX) : run + more]
                places = opened.store.pin(reach)
                opened.store.unpin([place for place in places if place is not None])
                absent = [key for key, place in zip(reach, places, strict=True) if place is None]
                there = opened.store.holds(absent)
                for key, flag in zip(absent, there, strict=True):
                    if flag:
                        self._promote(pool.name, [key], None)
