"""Puts the parts of one namespace together: directories, slot files, neighbours, engines, hierarchy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexkv_sglang.backends.checksum import ACCEPTED_KINDS
from flexkv_sglang.backends.local_tier import open_places, open_tier, prepare_directory
from flexkv_sglang.backends.neighbours import NeighbourStore
from flexkv_sglang.backends.probe import IoMode
from flexkv_sglang.backends.retired import remove_folder, remove_unshared
from flexkv_sglang.config import FlexKVConfig, TierConfig
from flexkv_sglang.engine import CacheEngine
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.hierarchy import Hierarchy
from flexkv_sglang.keys import Identity
from flexkv_sglang.metrics import Metrics
from flexkv_sglang.transfer import PageMover

logger = logging.getLogger(__name__)


def prepare_tiers(config: FlexKVConfig) -> list[dict[str, IoMode]]:
    """Per tier: its directories and how I/O works there, proven by real I/O.

    Raises ``ConfigError``. Of several directories of a tier, those that fail are left out, as long as
    one works: a lost disk does not keep a server from starting.
    """
    prepared = []
    for tier in config.tiers:
        modes: dict[str, IoMode] = {}
        problems: list[ConfigError] = []
        for path in tier.path:
            try:
                modes[path] = prepare_directory(path, config.io_engine)
            except ConfigError as exc:
                problems.append(exc)
        if not modes:
            raise problems[0]
        for problem in problems:
            logger.error("flexkv: a directory is left out: %s", problem)
        prepared.append(modes)
    return prepared


def open_hierarchy(
    config: FlexKVConfig,
    prepared: Sequence[Mapping[str, IoMode]],
    namespace: str,
    fields: Mapping[str, object],
    payload_bytes: int,
    writers: int,
    metrics: Metrics,
) -> Hierarchy:
    """Open ``namespace`` in every tier and recover what is there.

    ``fields``: what the namespace stands for, for people. ``writers``: rank processes that share the
    configured size; 0: this one never writes. Raises ``ConfigError``.
    """
    engines: list[CacheEngine] = []
    for path in {path for modes in prepared for path in modes}:
        remove_unshared(Path(path).expanduser(), keep=namespace)
    try:
        for number, (tier, modes) in enumerate(zip(config.tiers, prepared, strict=True)):
            engines.append(
                _open_engine(
                    config, number, tier, modes, namespace, fields, payload_bytes, writers, metrics
                )
            )
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return Hierarchy(engines, metrics)


def make_room(
    left: Hierarchy | None, prepared: Sequence[Mapping[str, IoMode]], old: Identity, new: Identity
) -> bool:
    """Before ``new`` is opened: delete what the closed store ``left`` kept in ``old``, if that is another namespace.

    False if a transfer still runs there: its files stay ours, and those of ``new`` would come on top of them.
    Raises ``OSError``.
    """
    if left is None:
        return True
    if not left.released():
        return False
    if old.namespace != new.namespace:
        left.discard()
        for path in {path for modes in prepared for path in modes} if old.epoch else ():
            remove_folder(Path(path).expanduser() / old.namespace)
    return True


def _open_engine(  # noqa: PLR0913 - one call, spelled out
    config: FlexKVConfig,
    number: int,
    tier: TierConfig,
    modes: Mapping[str, IoMode],
    namespace: str,
    fields: Mapping[str, object],
    payload_bytes: int,
    writers: int,
    metrics: Metrics,
) -> CacheEngine:
    share = _share(tier.size, writers)
    accepted = ACCEPTED_KINDS[config.verify]
    durable = config.durability == "journal"
    places = open_places(modes, namespace, fields, min_free=config.min_free, durable=durable)
    name = "size" if len(config.tiers) == 1 else f"tiers[{number}].size"
    slots, recovered = open_tier(
        places, namespace, payload_bytes, share, accepted=accepted, key_name=name
    )
    neighbours = NeighbourStore(
        [(place.directory, place.mode) for place in places],
        namespace,
        payload_bytes,
        [store.lock.owner for store in slots.stores],
        accepted,
    )
    engine = CacheEngine(
        slots,
        recovered,
        neighbours,
        PageMover(payload_bytes, metrics),
        metrics,
        config.verify,
        min_free=config.min_free,
        level=number,
    )
    logger.info(
        "flexkv: tier ready: namespace=%s io_engine=%s o_direct=%s pages=%d slots=%d page_bytes=%d "
        "neighbour_pages=%d share_bytes=%s verify=%s durability=%s directories=%s",
        namespace,
        places[0].mode.engine,
        str(places[0].mode.o_direct).lower(),
        engine.page_count(),
        slots.slot_count,
        payload_bytes,
        engine.neighbour_page_count(),
        "auto" if share is None else share,
        config.verify,
        config.durability,
        ",".join(modes),
    )
    return engine


def _share(size: int | None, writers: int) -> int | None:
    """What this rank process may take of a tier's ``size``: 0 if it never writes, None for auto."""
    if writers == 0:
        return 0
    if size is None:
        return None
    logger.info(
        "flexkv: size=%d is divided among %d rank processes that write: %d bytes each",
        size,
        writers,
        size // writers,
    )
    return size // writers
