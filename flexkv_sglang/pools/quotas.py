"""Quotas: the configured size is divided among the pools of a model, and the division is remembered.

It is noted beside the KV pages (NAMESPACE.json), so that the next start divides before the other pools are known.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from flexkv_sglang.backends.io.probe import IoMode
from flexkv_sglang.cache.assembly import Quota, remember, remembered
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.pools.pool import Pool, SizeClaim
from flexkv_sglang.pools.pool_rules import KV
from flexkv_sglang.types import SECTOR, round_up

logger = logging.getLogger(__name__)

TRAILING_SLOTS_MIN = 64
"""Slots a pool of trailing state gets at least, as long as all of them take no more than a quarter of ``size``."""


class Quotas:
    """Divides the sizes of the tiers. ``claims``: of the pools among which they are divided now.

    Called by one thread at a time, while no call runs.
    """

    def __init__(self, config: FlexKVConfig, prepared: Sequence[Mapping[str, IoMode]]) -> None:
        self._config = config
        self._prepared = prepared
        self._to_note = False
        self.claims: list[SizeClaim] = []

    def recall(self, kv: Pool) -> bool:
        """Divide as at the last start, if its KV pool was the same. True if further pools are expected."""
        namespace = kv.spec.identity.namespace
        before = claims_from(remembered(self._prepared, namespace, "pools"))
        self.claims = before if kv.claim in before else [kv.claim]
        return len(self.claims) > 1 or bool(remembered(self._prepared, namespace, "unstored"))

    def divide(self, pools: Sequence[Pool]) -> dict[str, tuple[Quota, ...]]:
        """Divide among these pools. Per pool: its quotas, which stay as they are while the pools are the same."""
        claims = sorted((pool.claim for pool in pools), key=lambda claim: claim.name)
        changed = claims != self.claims
        quotas = {
            pool.name: self.of(pool, claims) if changed or not pool.quotas else pool.quotas
            for pool in pools
        }
        self._to_note = changed or len(claims) > 1
        self.claims = claims
        return quotas

    def of(self, pool: Pool, claims: Sequence[SizeClaim]) -> tuple[Quota, ...]:
        """Per tier, what this process may take for a pool when these claims share the disk."""
        if not pool.spec.writes:
            return tuple(Quota(0) for _ in self._config.tiers)
        quotas = []
        for level, tier in enumerate(self._config.tiers):
            if tier.size is not None:
                quotas.append(Quota(divide(tier.size, claims)[pool.name]))
                continue
            part = part_of(pool.name, claims)
            before = part_of(pool.name, self.claims)
            if pool.name == KV and pool.store is not None and part < before:
                slot_bytes = round_up(pool.slot_payload, SECTOR)
                have = pool.store.tiers[level].slot_count * slot_bytes
                quotas.append(Quota(int(have * part / before)))  # make room for the others
            else:
                quotas.append(Quota(None, part))
        return tuple(quotas)

    def log(self, pool: Pool) -> None:
        """Say how many bytes a pool that was opened got, where a configured size is divided."""
        sizes = [tier.size for tier in self._config.tiers if tier.size is not None]
        if pool.spec.writes and sizes and (pool.spec.writers > 1 or len(self.claims) > 1):
            logger.info(
                "flexkv: size=%s is divided among %d rank processes and %d host pools: %s bytes each for %s",
                "+".join(map(str, sizes)),
                pool.spec.writers,
                len(self.claims),
                "+".join(
                    str(quota.byte_count) for quota in pool.quotas if quota.byte_count is not None
                ),
                pool.name,
            )

    def remember(self, kv: Pool, unstored: Mapping[str, str]) -> None:
        """Note the division for the next start, and for people which pools are not stored and why."""
        facts: dict[str, object] = {"unstored": unstored}
        if self._to_note:
            facts["pools"] = [claim.fields() for claim in self.claims]
        if kv.store is not None:
            remember(self._prepared, kv.spec.identity.namespace, facts)


def divide(size: int, claims: Sequence[SizeClaim]) -> dict[str, int]:
    """Bytes of each pool for one writing process, out of ``size`` bytes for the whole server.

    They are in proportion to the bytes that a KV page brings along, so that all pools are full at the same time.
    Pools of trailing state get a few slots at least.
    """
    sparse = [claim for claim in claims if claim.sparse]
    floors: dict[str, int] = {}
    even = _proportional(size, claims)
    for claim in sparse if len(sparse) < len(claims) else []:
        most = size // 4 // len(sparse) // claim.writers
        floor = min(TRAILING_SLOTS_MIN * claim.slot_bytes, most)
        if even[claim.name] < floor:
            floors[claim.name] = floor
    if not floors:
        return even
    rest = size - sum(
        floors[claim.name] * claim.writers for claim in claims if claim.name in floors
    )
    return floors | _proportional(rest, [claim for claim in claims if claim.name not in floors])


def _proportional(size: int, claims: Sequence[SizeClaim]) -> dict[str, int]:
    total = sum(claim.units * claim.writers for claim in claims)
    return {claim.name: size * claim.units // total for claim in claims}


def part_of(name: str, claims: Sequence[SizeClaim]) -> float:
    """The fraction of one process's bytes that a pool gets; ``claims``: of the pools that this process writes."""
    total = sum(claim.units for claim in claims)
    return next((claim.units / total for claim in claims if claim.name == name), 1.0)


def claims_from(fields: object) -> list[SizeClaim]:
    """Claims that were noted in NAMESPACE.json; [] for anything else."""
    if not isinstance(fields, list):
        return []
    try:
        return [SizeClaim(**item) for item in fields if isinstance(item, Mapping)]
    except TypeError:
        return []
