"""Parsers of single settings. Each takes the key's name and the value; its ``ConfigError`` names both and the
valid values. Pure.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flexkv_sglang.errors import ConfigError
from flexkv_sglang.printable import printable, without_secrets

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
_SIZE_HELP = 'bytes as a whole number, or a string such as "200GB", "1.5TB" or "512MiB"'


def shown(value: object, name: str = "") -> str:
    """Format a value for an error message, without secrets. ``name``: its key, which may say that it is one."""
    return printable(repr(without_secrets(value, name)))


def reject_unknown(
    given: Mapping[str, Any], valid: list[str], where: str, also: Iterable[str] = ()
) -> None:
    """Raise ``ConfigError`` for an unknown key. ``also``: further keys to suggest. ``where``: prefix of the key."""
    unknown = sorted(set(given) - set(valid))
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*valid, *also], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{where}{unknown[0]}: unknown key, value {shown(given[unknown[0]], unknown[0])}.{hint} Valid keys: "
            f"{', '.join(valid)}"
        )


def parse_size(key: str, value: object, *, least: int = 1) -> int:
    """Parse bytes: a positive number, or a string with a unit (powers of 1000: GB; of 1024: GiB)."""
    if isinstance(value, str):
        match = _SIZE.match(value)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ConfigError(f"{key}: {shown(value)} is not a size. Valid: {_SIZE_HELP}")
        amount = float(match[1]) * unit
    elif isinstance(value, int) and not isinstance(value, bool):
        amount = float(value)
    else:
        raise ConfigError(f"{key}: {shown(value)} is not a size. Valid: {_SIZE_HELP}")
    if not least <= amount < 2**63:
        bound = f"at least {least} bytes" if least != 1 else "at least 1 byte"
        raise ConfigError(f"{key}: {shown(value)} is out of range. Valid: {_SIZE_HELP}, {bound}")
    return int(value) if isinstance(value, int) else int(amount)


def size_or_zero(key: str, value: object) -> int:
    """Parse as ``parse_size``, or 0."""
    return parse_size(key, value, least=0)


def choice(*valid: str) -> Callable[[str, object], str]:
    """Make a parser of one of these words."""

    def parse(key: str, value: object) -> str:
        if not isinstance(value, str) or value not in valid:
            raise ConfigError(f"{key}: {shown(value)}. Valid: {', '.join(valid)}")
        return value

    return parse


def text(key: str, value: object) -> str:
    """Parse a non-empty string."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{key}: {shown(value)}. Valid: a non-empty string")
    return value


def flag(key: str, value: object) -> bool:
    """Parse true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: {shown(value)}. Valid: true or false")
    return value


def number(low: float, high: float, unit: str) -> Callable[[str, object], float]:
    """Make a parser of a number between ``low`` and ``high`` in ``unit``."""

    def parse(key: str, value: object) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise ConfigError(
                f"{key}: {shown(value)}. Valid: {_plain(low)} to {_plain(high)} {unit}"
            )
        return float(value)

    return parse


def _plain(bound: float) -> str:
    """1048576 and 0.5, never 1.04858e+06."""
    return str(int(bound)) if bound == int(bound) else repr(bound)
