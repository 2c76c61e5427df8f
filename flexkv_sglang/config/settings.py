"""FlexKVConfig: the JSON of ``--hicache-storage-backend-extra-config``, parsed once, frozen, strict.

An unknown key, a wrong type or an impossible value is a ``ConfigError`` that names the key, the value and the
valid values. Nothing is read from the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flexkv_sglang.config.parsers import (
    choice,
    flag,
    parse_size,
    reject_unknown,
    shown,
    size_or_zero,
    text,
)
from flexkv_sglang.config.share import ShareConfig, address_list, parse_share, redis_url
from flexkv_sglang.errors import ConfigError

SGLANG_KEYS = frozenset(
    {
        # SGLang removes these from the dict, but not on every path (decode offload leaves the first five).
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "prefetch_timeout_max",
        "hicache_storage_pass_prefix_keys",
        "tp_lcm_size",
        # SGLang leaves these in the dict: keys of its dynamic loader, and one key that SGLang adds itself.
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "allocator",
        "file_storage_path",
    }
)
"""Keys that belong to SGLang: accepted and ignored."""


TIER_TYPES = ("slots",)
"""Kinds of tiers; the first is the default. ``cache.assembly.OPENERS`` opens each."""


@dataclass(frozen=True, slots=True)
class TierConfig:
    """One tier. ``path``: directories, striped evenly. ``size``: bytes that one server may take in all of them,
    with all its rank processes, or None (the size of an earlier run's files, else a quarter of the free space, at
    most 64 GB per rank process and directory). ``require_mount``: refuse a directory on the root file system.
    ``type``: one of ``TIER_TYPES``."""

    path: tuple[str, ...] = ("~/.cache/flexkv-sglang",)
    size: int | None = None
    require_mount: bool = False
    type: str = TIER_TYPES[0]

    def describe(self) -> str:
        """Format for the log."""
        mount = " require_mount=true" if self.require_mount else ""
        return (
            f"path={','.join(self.path)} size={'auto' if self.size is None else self.size}{mount}"
        )


_SHARE_DEFAULT = ShareConfig()


@dataclass(frozen=True, slots=True)
class FlexKVConfig:
    """Effective settings of one storage instance. Field docs: the table in README, "Settings".

    ``tiers``: the fastest first. ``verify``: full | sampled | off. ``durability``: none | journal.
    ``io_engine``: auto | io_uring | threads | buffered. ``min_free``: bytes left to others on each disk,
    or None (2 % of the file system, at most 1 GiB). ``model_id``: names the weights instead of
    fingerprinting them. ``pool_density``: (name, pages per KV page) of host pools beside KV, for dividing the size.
    ``share``: sharing with other nodes. ``given``: the parsed dict, without SGLang's keys.
    """

    tiers: tuple[TierConfig, ...] = (TierConfig(),)
    verify: str = "full"
    durability: str = "none"
    io_engine: str = "auto"
    min_free: int | None = None
    model_id: str | None = None
    pool_density: tuple[tuple[str, float], ...] = ()
    share: ShareConfig = _SHARE_DEFAULT
    given: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any] | None) -> FlexKVConfig:
        """Parse SGLang's extra_config dict. Raises ``ConfigError``."""
        if extra_config is not None and not isinstance(extra_config, Mapping):
            raise ConfigError(
                f"hicache-storage-backend-extra-config: {shown(extra_config)}. Valid: a JSON object, such as "
                '{"path": "/mnt/nvme0/flexkv", "size": "200GB"}'
            )
        given = {
            key: value for key, value in (extra_config or {}).items() if key not in SGLANG_KEYS
        }
        reject_unknown(given, [*_TIER_PARSERS, *_PARSERS], "", SGLANG_KEYS)
        original = dict(given)
        tier = {key: given.pop(key) for key in tuple(given) if key in _TIER_PARSERS}
        if tier and "tiers" in given:
            raise ConfigError(
                f"tiers: {shown(given['tiers'])} is given beside {', '.join(tier)}={shown(next(iter(tier.values())))}. "
                "Valid: either path and size (one tier), or tiers"
            )
        parsed = {key: _PARSERS[key](key, value) for key, value in given.items()}
        short = {key: parsed.pop(key) for key in tuple(parsed) if key in _SHARE_SHORT}
        for key in short:
            if key in (given.get("share") or {}):
                raise ConfigError(
                    f"{key}: {shown(given[key])} is given twice, also as share.{key}. Valid: one of them"
                )
        if short:
            parsed["share"] = replace(parsed.get("share", ShareConfig()), **short)
        if tier:
            parsed["tiers"] = (_tier("", tier),)
        return cls(**parsed, given=original)

    def describe(self) -> str:
        """Format as one line for the log."""
        tiers = "; ".join(tier.describe() for tier in self.tiers)
        min_free = "auto" if self.min_free is None else self.min_free
        return (
            f"tiers=[{tiers}] verify={self.verify} durability={self.durability} min_free={min_free} "
            f"io_engine={self.io_engine} model_id={self.model_id or 'fingerprint'} "
            f"pool_density={dict(self.pool_density) or 'default'} share={self.share.describe()}"
        )


def _paths(key: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if (
        not isinstance(items, list | tuple)
        or not items
        or not all(isinstance(i, str) and i for i in items)
    ):
        raise ConfigError(f"{key}: {shown(value)}. Valid: a directory, or a list of directories")
    _reject_twice(key, value, items)
    return tuple(items)


def _reject_twice(key: str, value: object, paths: Sequence[str]) -> None:
    """Two spellings of one directory count as one, links followed."""
    places = {os.path.realpath(os.path.expanduser(path)) for path in paths}
    if len(places) != len(paths):
        raise ConfigError(
            f"{key}: {shown(value)} names a directory twice. Valid: different directories"
        )


def _tier(where: str, given: Mapping[str, Any]) -> TierConfig:
    return TierConfig(
        **{key: _TIER_PARSERS[key](where + key, value) for key, value in given.items()}
    )


def _tiers(key: str, value: object) -> tuple[TierConfig, ...]:
    help_text = (
        'a list of tiers, fastest first, such as [{"path": "/dev/shm/flexkv", "size": "32GiB"}]'
    )
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{key}: {shown(value)}. Valid: {help_text}")
    tiers = []
    for number, item in enumerate(value):
        where = f"{key}[{number}]."
        if not isinstance(item, Mapping):
            raise ConfigError(f"{key}[{number}]: {shown(item)}. Valid: {help_text}")
        given = dict(item)
        kind = choice(*TIER_TYPES)(where + "type", given.pop("type", TIER_TYPES[0]))
        reject_unknown(given, ["type", *_TIER_PARSERS], where)
        if "path" not in given:
            raise ConfigError(f"{where}path: missing in {shown(item)}. Valid: {help_text}")
        tiers.append(replace(_tier(where, given), type=kind))
    _reject_twice(key, value, [path for tier in tiers for path in tier.path])
    return tuple(tiers)


def _densities(key: str, value: object) -> tuple[tuple[str, float], ...]:
    help_text = (
        'pool names with how many of their pages are stored per KV page, such as {"mamba": 0.05}: '
        'above 0, at most 1, and not for "kv"'
    )
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: {shown(value)}. Valid: {help_text}")
    for name, density in value.items():
        number = isinstance(density, int | float) and not isinstance(density, bool)
        if not isinstance(name, str) or name in ("", "kv") or not number or not 0 < density <= 1:
            raise ConfigError(f"{key}.{name}: {shown(density)}. Valid: {help_text}")
    return tuple((name, float(density)) for name, density in value.items())


_TIER_PARSERS: dict[str, Callable[[str, object], Any]] = {
    "path": _paths,
    "size": parse_size,
    "require_mount": flag,
}
_PARSERS: dict[str, Callable[[str, object], Any]] = {
    "tiers": _tiers,
    "verify": choice("full", "sampled", "off"),
    "durability": choice("none", "journal"),
    "min_free": size_or_zero,
    "io_engine": choice("auto", "io_uring", "threads", "buffered"),
    "model_id": text,
    "pool_density": _densities,
    "share": parse_share,
    "redis_url": redis_url,
    "peers": address_list,
}
_SHARE_SHORT = ("redis_url", "peers")
"""Settings of ``share`` that may also stand at the top level."""
