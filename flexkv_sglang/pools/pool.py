"""Pool: one host pool as it is stored: its pages, its identity, its claim on the disk, and its open files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from flexkv_sglang.cache.assembly import Quota
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.identity.keys import Identity
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.pools.host_pages import MarkerPages, PoolPages
from flexkv_sglang.prefix import PoolRequirement
from flexkv_sglang.types import SECTOR, round_up

DENSITY_ONE = 1 << 16
"""``SizeClaim.density`` of a pool that has one page per KV page."""


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """The identity of a pool and its writers.

    ``writers``: rank processes of the server that write it; ``writes``: is this process one of them?
    """

    identity: Identity
    writers: int
    writes: bool
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class SizeClaim:
    """What one pool needs of the disk. ``writers``: rank processes of the server that write it.

    ``density``: its pages per KV page, in units of 1 / 65536.
    """

    name: str
    slot_bytes: int
    writers: int
    density: int

    @classmethod
    def of(cls, name: str, payload_bytes: int, writers: int, density: float) -> SizeClaim:
        """``payload_bytes``: of one page; ``density``: pages per KV page."""
        units = max(1, round(density * DENSITY_ONE))
        return cls(name, round_up(payload_bytes, SECTOR), writers, units)

    def fields(self) -> dict[str, object]:
        """For NAMESPACE.json."""
        return asdict(self)

    @property
    def sparse(self) -> bool:
        """Stored less often than KV pages."""
        return self.density < DENSITY_ONE

    @property
    def units(self) -> int:
        """Bytes that one writer needs per KV page, times 65536."""
        return self.slot_bytes * self.density


@dataclass(slots=True)
class Pool:
    """One host pool that can be stored.

    ``requirement``: what SGLang asked of it last, or is expected to ask. ``store``: its open files, or None.
    ``opened_as``: identity of the files that were opened last; it differs from ``spec.identity`` only after a weight
    update. ``quotas``: per tier, what this process may take for it; () before it is opened.
    """

    name: str
    pages: PoolPages
    spec: PoolSpec
    claim: SizeClaim
    requirement: PoolRequirement
    store: Tiers | None = None
    opened_as: Identity | None = None
    quotas: tuple[Quota, ...] = ()

    def close(self) -> None:
        """Close its files. Idempotent."""
        store, self.store = self.store, None
        if store is not None:
            store.close()

    @property
    def ready(self) -> bool:
        """True while its files are open and belong to the current weights."""
        return self.store is not None and self.opened_as == self.spec.identity

    @property
    def is_marker(self) -> bool:
        """True if the pool has no bytes of its own."""
        return isinstance(self.pages, MarkerPages)

    @property
    def slot_payload(self) -> int:
        """Bytes in one slot: a page, or one head group of it."""
        return self.pages.geometry.payload_bytes


Describe = Callable[[str, Any, PoolPages], PoolSpec]
"""(name, host pool, its pages) -> their specification."""
