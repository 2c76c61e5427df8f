"""Opens the tiers of one namespace: checks their directories, opens each by its type, and joins them to ``Tiers``."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexkv_sglang.backends.checksum import ACCEPTED_KINDS
from flexkv_sglang.backends.io.mover import PageMover
from flexkv_sglang.backends.io.probe import IoMode
from flexkv_sglang.backends.slots.manifest import note, noted
from flexkv_sglang.backends.slots.neighbours import NeighbourStore
from flexkv_sglang.backends.slots.opening import open_tier
from flexkv_sglang.backends.slots.retired import remove_folder, remove_unshared
from flexkv_sglang.backends.slots.space.disk_space import total_bytes
from flexkv_sglang.backends.slots.space.places import open_places, prepare_directory
from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.identity.keys import Identity
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.rank import Sharing
from flexkv_sglang.tier import Tier

logger = logging.getLogger(__name__)

_MANY_PAGES = 100_000


@dataclass(frozen=True, slots=True)
class Quota:
    """The space that one process may take of a tier for one namespace.

    ``byte_count``: 0: it never writes there; None: the size of an earlier run's files, else ``part`` of the size
    that is chosen when none is configured.
    """

    byte_count: int | None
    part: float = 1.0


@dataclass(frozen=True, slots=True)
class TierRequest:
    """The facts that a tier is opened with.

    ``number``: its place in ``config.tiers``, 0 is the fastest. ``modes``: its directories, proven by I/O.
    ``fields``: the meaning of ``namespace``, for people. ``payload_bytes``: of one page. ``quota``: the space that
    this process may take.
    """

    config: FlexKVConfig
    number: int
    modes: Mapping[str, IoMode]
    namespace: str
    fields: Mapping[str, object]
    payload_bytes: int
    quota: Quota
    metrics: Metrics


def prepare_tiers(config: FlexKVConfig) -> list[dict[str, IoMode]]:
    """Per tier: its directories and the I/O mode of each, proven by real I/O.

    Raises ``ConfigError``. Directories that fail are left out as long as one directory of the tier works:
    a lost disk does not keep a server from starting.
    """
    prepared = []
    for tier in config.tiers:
        modes: dict[str, IoMode] = {}
        problems: list[ConfigError] = []
        for path in tier.path:
            try:
                modes[path] = prepare_directory(
                    path, config.io_engine, require_mount=tier.require_mount
                )
            except ConfigError as exc:
                problems.append(exc)
        if not modes:
            raise problems[0]
        for problem in problems:
            logger.error("flexkv: a directory is left out: %s", problem)
        prepared.append(modes)
    return prepared


def check_capacity(config: FlexKVConfig, prepared: Sequence[Mapping[str, IoMode]]) -> None:
    """Raises ``ConfigError`` if a size is more than its whole disks hold. Opening the files checks more, but later."""
    for number, (tier, modes) in enumerate(zip(config.tiers, prepared, strict=True)):
        for path in modes:
            whole = total_bytes(Path(path).expanduser())
            share = None if tier.size is None else tier.size // len(tier.path)
            if share is not None and share > whole:
                raise ConfigError(
                    f"{_key_name(config, number)}: {share} bytes for {path}, whose file "
                    f"system has {whole}. Valid: a size that fits"
                )


def _key_name(config: FlexKVConfig, number: int) -> str:
    return "size" if len(config.tiers) == 1 else f"tiers[{number}].size"


def open_tiers(  # noqa: PLR0913 - one call, spelled out
    config: FlexKVConfig,
    prepared: Sequence[Mapping[str, IoMode]],
    namespace: str,
    fields: Mapping[str, object],
    payload_bytes: int,
    quotas: Sequence[Quota],
    metrics: Metrics,
    sharing: Sharing | None = None,
) -> Tiers:
    """Open ``namespace`` in every tier and recover its pages.

    ``fields``: the meaning of the namespace, for people. ``quotas``: per tier, the space of this process.
    ``sharing``: with other nodes. Raises ``ConfigError``.
    """
    for path in {path for modes in prepared for path in modes}:
        remove_unshared(Path(path).expanduser(), keep=str(fields.get("epoch", "")))
    tiers: list[Tier] = []
    try:
        for number, quota in enumerate(quotas):
            request = TierRequest(
                config, number, prepared[number], namespace, fields, payload_bytes, quota, metrics
            )
            tiers.append(OPENERS[config.tiers[number].type](request))
    except BaseException:
        for tier in tiers:
            tier.close()
        raise
    if sum(tier.page_count() for tier in tiers) >= _MANY_PAGES:
        _give_back_memory()
    remote = None
    if sharing is not None:
        remote = sharing.pages(namespace, fields, payload_bytes, metrics)
    if remote is not None:
        tiers.append(remote)
    writes = any(quota.byte_count != 0 for quota in quotas)
    return Tiers(tiers, metrics, backfill_bytes=payload_bytes if writes else 0)


def _give_back_memory() -> None:
    """Make glibc free the memory that loading used, 60 bytes per page; see malloc_trim(3)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reclaim(left: Tiers, prepared: Sequence[Mapping[str, IoMode]], old: Identity) -> None:
    """Delete the files of ``left``, which is closed and released, in the namespace ``old``, which is not used again.

    Raises ``OSError``.
    """
    left.discard()
    for path in {path for modes in prepared for path in modes} if old.epoch else ():
        remove_folder(Path(path).expanduser() / old.namespace)


def _open_slots(request: TierRequest) -> Tier:
    """A tier in slot files, on disks or in a memory file system."""
    config, modes, namespace = request.config, request.modes, request.namespace
    accepted = ACCEPTED_KINDS[config.verify]
    places = open_places(
        modes,
        namespace,
        request.fields,
        min_free=config.min_free,
        durable=config.durability == "journal",
    )
    slots, recovered = open_tier(
        places,
        namespace,
        request.payload_bytes,
        request.quota.byte_count,
        accepted=accepted,
        key_name=_key_name(config, request.number),
        auto_part=request.quota.part,
        whole_bytes=config.tiers[request.number].size,
        directories=len(config.tiers[request.number].path),
    )
    neighbours = NeighbourStore(
        [(place.directory, place.mode) for place in places],
        namespace,
        request.payload_bytes,
        [store.lock.owner for store in slots.stores],
        accepted,
    )
    engine = CacheEngine(
        slots,
        recovered,
        neighbours,
        PageMover(request.payload_bytes, request.metrics, modes={place.mode for place in places}),
        request.metrics,
        config.verify,
        min_free=config.min_free,
        level=request.number,
    )
    logger.info(
        "flexkv: tier ready: namespace=%s pool=%s io_engine=%s o_direct=%s pages=%d slots=%d page_bytes=%d "
        "neighbour_pages=%d share_bytes=%s verify=%s durability=%s directories=%s",
        namespace,
        request.fields.get("pool", "kv"),
        places[0].mode.engine,
        str(places[0].mode.o_direct).lower(),
        engine.page_count(),
        slots.slot_count,
        request.payload_bytes,
        engine.neighbour_page_count(),
        "auto" if request.quota.byte_count is None else request.quota.byte_count,
        config.verify,
        config.durability,
        ",".join(modes),
    )
    return engine


OPENERS: dict[str, Callable[[TierRequest], Tier]] = {"slots": _open_slots}
"""Per value of ``tiers[].type``, the function that opens it. ``config.settings.TIER_TYPES`` lists the same names."""


def remembered(prepared: Sequence[Mapping[str, IoMode]], namespace: str, name: str) -> object:
    """The fact that ``remember`` noted under this name in any directory; None if there is none."""
    for modes in prepared:
        for path in modes:
            found = noted(Path(path).expanduser() / namespace, name)
            if found:
                return found
    return None


def remember(
    prepared: Sequence[Mapping[str, IoMode]], namespace: str, facts: Mapping[str, object]
) -> None:
    """Add ``facts`` to the namespace's NAMESPACE.json, for the next start and for people. A fact that is empty and
    was not noted before is not noted."""
    for modes in prepared:
        for path in modes:
            directory = Path(path).expanduser() / namespace
            for name, fact in facts.items():
                if (noted(directory, name) or type(fact)()) == fact:
                    continue
                try:
                    note(directory, name, fact)
                except (OSError, ValueError) as exc:
                    logger.warning("flexkv: %s is not noted in %s: %s", name, path, exc)
