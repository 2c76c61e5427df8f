"""FlexKVConfig: the JSON of ``--hicache-storage-backend-extra-config``, parsed once, frozen, strict.

An unknown key, a wrong type or an impossible value is a ``ConfigError`` that names the key, the value
and what is valid. Nothing is read from the environment.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flexkv_sglang.errors import ConfigError

SGLANG_KEYS = frozenset(
    {
        # SGLang takes these out of the dict, but not on every path (decode offload leaves the first five).
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "prefetch_timeout_max",
        "hicache_storage_pass_prefix_keys",
        "tp_lcm_size",
        # These it leaves: the dynamic loader's own, and one it adds itself.
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "allocator",
        "file_storage_path",
    }
)
"""Keys that belong to SGLang: accepted, and none of our business."""

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$")
_SIZE_HELP = 'bytes as a number, or a string such as "200GB", "1.5TB" or "512MiB"'


@dataclass(frozen=True, slots=True)
class TierConfig:
    """One tier. ``path``: directories, striped evenly. ``size``: bytes one server may take over all of them
    and all its rank processes, or None (what an earlier run left, else a quarter of the free space, at
    most 64 GB per rank process and directory)."""

    path: tuple[str, ...] = ("~/.cache/flexkv-sglang",)
    size: int | None = None

    def describe(self) -> str:
        """For the log."""
        return f"path={','.join(self.path)} size={'auto' if self.size is None else self.size}"


@dataclass(frozen=True, slots=True)
class FlexKVConfig:
    """Effective settings of one storage instance. Field docs are the README's configuration table.

    ``tiers``: the fastest first. ``verify``: full | sampled | off. ``durability``: none | journal.
    ``io_engine``: auto | io_uring | threads | buffered. ``min_free``: bytes left to others on each disk,
    or None (2 % of the file system, at most 1 GiB). ``model_id``: names the weights instead of
    fingerprinting them. ``pool_density``: (name, pages per KV page) of host pools beside KV, for dividing the size.
    """

    tiers: tuple[TierConfig, ...] = (TierConfig(),)
    verify: str = "full"
    durability: str = "none"
    io_engine: str = "auto"
    min_free: int | None = None
    model_id: str | None = None
    pool_density: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any] | None) -> FlexKVConfig:
        """From SGLang's extra_config dict. Raises ``ConfigError``."""
        given = {
            key: value for key, value in (extra_config or {}).items() if key not in SGLANG_KEYS
        }
        _reject_unknown(given, [*_TIER_PARSERS, *_PARSERS], "", SGLANG_KEYS)
        tier = {key: given.pop(key) for key in tuple(given) if key in _TIER_PARSERS}
        if tier and "tiers" in given:
            raise ConfigError(
                f"tiers: {given['tiers']!r} is given beside {', '.join(tier)}={next(iter(tier.values()))!r}. "
                "Valid: either path and size (one tier), or tiers"
            )
        parsed = {key: _PARSERS[key](key, value) for key, value in given.items()}
        if tier:
            parsed["tiers"] = (_tier("", tier),)
        return cls(**parsed)

    def describe(self) -> str:
        """One line for the log."""
        tiers = "; ".join(tier.describe() for tier in self.tiers)
        return (
            f"tiers=[{tiers}] verify={self.verify} durability={self.durability} "
            f"io_engine={self.io_engine} model_id={self.model_id or 'fingerprint'} "
            f"pool_density={dict(self.pool_density) or 'default'}"
        )


def _reject_unknown(
    given: Mapping[str, Any], valid: list[str], where: str, also: Iterable[str] = ()
) -> None:
    unknown = sorted(set(given) - set(valid))
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*valid, *also], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{where}{unknown[0]}: unknown key, value {given[unknown[0]]!r}.{hint} Valid keys: "
            f"{', '.join(valid)}"
        )


def parse_size(key: str, value: object) -> int:
    """Bytes from a positive number or a string with a unit (powers of 1000: GB; of 1024: GiB)."""
    if isinstance(value, str):
        match = _SIZE.match(value)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ConfigError(f"{key}: {value!r} is not a size. Valid: {_SIZE_HELP}")
        amount = float(match[1]) * unit
    elif isinstance(value, int) and not isinstance(value, bool):
        amount = float(value)
    else:
        raise ConfigError(f"{key}: {value!r} is a {type(value).__name__}. Valid: {_SIZE_HELP}")
    if not 1 <= amount < 2**63:
        raise ConfigError(f"{key}: {value!r} is out of range. Valid: {_SIZE_HELP}, at least 1 byte")
    return int(value) if isinstance(value, int) else int(amount)


def _size_or_zero(key: str, value: object) -> int:
    return 0 if value == 0 and not isinstance(value, bool) else parse_size(key, value)


def _paths(key: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if (
        not isinstance(items, list | tuple)
        or not items
        or not all(isinstance(i, str) and i for i in items)
    ):
        raise ConfigError(f"{key}: {value!r}. Valid: a directory, or a list of directories")
    if len(set(items)) != len(items):
        raise ConfigError(f"{key}: {value!r} names a directory twice. Valid: different directories")
    return tuple(items)


def _choice(*valid: str) -> Callable[[str, object], str]:
    def parse(key: str, value: object) -> str:
        if not isinstance(value, str) or value not in valid:
            raise ConfigError(f"{key}: {value!r}. Valid: {', '.join(valid)}")
        return value

    return parse


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{key}: {value!r}. Valid: a non-empty string")
    return value


def _tier(where: str, given: Mapping[str, Any]) -> TierConfig:
    return TierConfig(
        **{key: _TIER_PARSERS[key](where + key, value) for key, value in given.items()}
    )


def _tiers(key: str, value: object) -> tuple[TierConfig, ...]:
    help_text = (
        'a list of tiers, fastest first, such as [{"path": "/dev/shm/flexkv", "size": "32GiB"}]'
    )
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{key}: {value!r}. Valid: {help_text}")
    tiers = []
    for number, item in enumerate(value):
        where = f"{key}[{number}]."
        if not isinstance(item, Mapping):
            raise ConfigError(f"{key}[{number}]: {item!r}. Valid: {help_text}")
        given = dict(item)
        _choice("slots")(where + "type", given.pop("type", "slots"))
        _reject_unknown(given, ["type", *_TIER_PARSERS], where)
        if "path" not in given:
            raise ConfigError(f"{where}path: missing in {item!r}. Valid: {help_text}")
        tiers.append(_tier(where, given))
    paths = [path for tier in tiers for path in tier.path]
    if len(set(paths)) != len(paths):
        raise ConfigError(f"{key}: {value!r} names a directory twice. Valid: different directories")
    return tuple(tiers)


def _densities(key: str, value: object) -> tuple[tuple[str, float], ...]:
    help_text = (
        'pool names with how many of their pages are stored per KV page, such as {"mamba": 0.05}: '
        'above 0, at most 1, and not for "kv"'
    )
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: {value!r}. Valid: {help_text}")
    for name, density in value.items():
        number = isinstance(density, int | float) and not isinstance(density, bool)
        if not isinstance(name, str) or name in ("", "kv") or not number or not 0 < density <= 1:
            raise ConfigError(f"{key}.{name}: {density!r}. Valid: {help_text}")
    return tuple((name, float(density)) for name, density in value.items())


_TIER_PARSERS: dict[str, Callable[[str, object], Any]] = {"path": _paths, "size": parse_size}
_PARSERS: dict[str, Callable[[str, object], Any]] = {
    "tiers": _tiers,
    "verify": _choice("full", "sampled", "off"),
    "durability": _choice("none", "journal"),
    "min_free": _size_or_zero,
    "io_engine": _choice("auto", "io_uring", "threads", "buffered"),
    "model_id": _text,
    "pool_density": _densities,
}
